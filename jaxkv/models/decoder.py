"""One decoder, driven by a config: embed, then attend and mix layer by layer, then score the next token.

What the well-known families differ in is a field of the config; `jaxkv.models.families` fills it in from theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import Full, LayerSpec, Reach
from jaxkv.meshes import like, rows_of
from jaxkv.models.beside import ExpertsBeside
from jaxkv.models.experts import Experts, ExpertsConfig
from jaxkv.models.latent import LatentConfig
from jaxkv.models.layer_inputs import LayerInput, LayerInputs
from jaxkv.models.mixers import MixerConfig
from jaxkv.models.mlp import ACTIVATIONS, MLP
from jaxkv.models.norm import NORMS, Norm
from jaxkv.nn.heads import PROJECTIONS, QueryTemperature
from jaxkv.nn.nnx import Attention
from jaxkv.nn.product import dot_general, tied
from jaxkv.nn.rotary import Rotary
from jaxkv.nn.spread import spread


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder. Frozen and hashable; fields that are None get their defaults.

    Args:
      vocab_size: tokens the model knows, V.
      width: size D of the stream that runs through the layers.
      num_layers: how many layers.
      num_heads: query heads N of a layer.
      num_kv_heads: heads K of keys and values, a divisor of num_heads; None means num_heads. A pattern repeated like
        `reaches` if layers differ, and so for the next two.
      head_dim: size H of a head; None means width / num_heads.
      mlp_dim: hidden size of the MLP; None means 4 * width.
      reaches: which past tokens the layers see, a pattern repeated from the first layer on:
        (Window(128), Window(128), Full()) is two window layers to a full one.
      mixers: what layers have in attention's place, such as ShortConvConfig(): one for all, a pattern repeated like
        `reaches`, with None for attention, or None.
      shares: for each layer, None or the number of an earlier layer whose keys and values it reads: it has none of its
        own (Gemma 4). None: no layer does.
      rotary: how queries and keys are rotated by position: one Rotary, a pattern repeated like `reaches`, or None.
      max_positions: length of a learned table of positions, added to the embeddings; None for no table.
      norm: "rms" or "layer": before attention, before the MLP, and at the end.
      norm_bias: whether norms of the kind "layer" have a bias.
      norm_eps: added to the mean square.
      pre_norms: whether what attention and MLP read is normalized (OLMo 2: no).
      post_norms: whether what attention and MLP give is normalized, before it is added (Gemma 2 and 3, OLMo 2).
      parallel: whether the MLP reads what attention reads, and both are added at once (Cohere).
      activation: of the MLP: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      gated: whether the MLP multiplies two projections (SwiGLU with "silu", GeGLU with "gelu") or has one.
      experts: which layers have experts in the MLP's place, or beside it: one ExpertsConfig for all, a pattern repeated
        like `reaches`, with None for an MLP, or None.
      use_bias: True, False, or the names of the projections that have a bias, out of "query", "key", "value", "out" and
        "mlp".
      latent: None, or the sizes of multi-head latent attention (DeepSeek): head_dim is then what a head makes of the
        latent, and num_kv_heads, qk_norm, temperature, attention_softcap and sink_logits have no part in it.
      qk_norm: whether each head's queries and keys are RMS-normalized before they are rotated; "together", "centered"
        or "plain" in other ways, see `jaxkv.nnx.Attention`. A pattern repeated like `reaches` if layers differ.
      value_norm: whether each head's values are RMS-normalized, with no scale (Gemma 4).
      tied_values: whether values are what the key projection gives, see `jaxkv.nnx.Attention`. A pattern if layers
        differ.
      attention_scale: factor of the scores; None means head_dim ** -0.5.
      temperature: None, or what queries are multiplied by, position by position. A pattern if layers differ.
      attention_softcap: None, or the bound c of c * tanh(scores / c).
      gated_attention: whether what a head reads is multiplied by the sigmoid of a gate, which the projection of queries
        gives too, behind each head's query (Qwen3-Next).
      sink_logits: whether one learned score per query head joins the softmax and brings no value (gpt-oss).
      embed_scale: factor of the embeddings, rounded to the dtype of the computation (Gemma: width ** 0.5).
      layer_input_dim: None, or the size of a vector that each layer reads of each token besides, out of a table and a
        projection of the embedding: per-layer embeddings (Gemma 4).
      layer_input_vocab: tokens of that table; None means vocab_size.
      layer_scales: whether what a layer gives is multiplied by one learned number (Gemma 4).
      residual_scale: factor of what attention and MLP give, before it is added (Granite).
      logit_scale: factor of the logits (Cohere, Granite).
      logit_softcap: None, or the bound of the logits, as `attention_softcap`.
      tied: whether the embedding table is the output head too.
      dtype: of the computation and the logits.
      param_dtype: of the parameters as they are made.

    Raises:
      ValueError: for sizes below 1 or that don't divide, and names that are not known.

    >>> config = DecoderConfig(vocab_size=256, width=64, num_layers=4, num_heads=4)
    >>> config.head_dim, config.num_kv_heads, config.mlp_dim
    (16, 4, 256)
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: Any = None
    head_dim: Any = None
    mlp_dim: Any = None
    reaches: tuple[Reach, ...] = (Full(),)
    mixers: MixerConfig | tuple[MixerConfig | None, ...] | None = None
    shares: tuple[int | None, ...] | None = None
    rotary: Rotary | tuple[Rotary | None, ...] | None = Rotary()
    max_positions: int | None = None
    norm: str = "rms"
    norm_bias: bool = True
    norm_eps: float = 1e-6
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    experts: ExpertsConfig | tuple[ExpertsConfig | None, ...] | None = None
    use_bias: bool | tuple[str, ...] = False
    latent: LatentConfig | None = None
    qk_norm: bool | str | tuple[bool | str, ...] = False
    value_norm: bool = False
    tied_values: bool | tuple[bool, ...] = False
    attention_scale: float | None = None
    temperature: QueryTemperature | tuple[QueryTemperature | None, ...] | None = None
    attention_softcap: float | None = None
    gated_attention: bool = False
    sink_logits: bool = False
    embed_scale: float | None = None
    layer_input_dim: int | None = None
    layer_input_vocab: Any = None
    layer_scales: bool = False
    residual_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    tied: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocab_size", "width", "num_layers", "num_heads")}
        if self.layer_input_dim is not None:
            sizes["layer_input_dim"] = self.layer_input_dim
        if self.head_dim is None and self.num_heads > 0 and self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}; give head_dim")
        defaults = {"num_kv_heads": self.num_heads, "mlp_dim": 4 * self.width, "layer_input_vocab": self.vocab_size}
        defaults["head_dim"] = self.width // max(self.num_heads, 1)
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            sizes[name] = getattr(self, name)
        for name, size in sizes.items():
            if min(size if isinstance(size, tuple) else (size,), default=0) < 1:
                raise ValueError(f"DecoderConfig({name}={size}): {name} is at least 1")
        for heads in self.num_kv_heads if isinstance(self.num_kv_heads, tuple) else (self.num_kv_heads,):
            if self.num_heads % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} is not a multiple of num_kv_heads={heads}: every key head serves as "
                    "many query heads"
                )
        if self.max_positions is not None and self.max_positions < 1:
            raise ValueError(f"max_positions={self.max_positions}: a table has at least 1; None for no table")
        if not self.reaches or not all(isinstance(reach, Reach) for reach in self.reaches):
            raise ValueError(f"reaches={self.reaches!r}: give a tuple of Full(), Window(size) or Chunk(size)")
        if self.shares is not None:
            self._check_shares(self.shares)
        known_biases = (*PROJECTIONS, "mlp")
        if not isinstance(self.use_bias, bool) and not (
            isinstance(self.use_bias, tuple) and set(self.use_bias) <= set(known_biases)
        ):
            raise ValueError(
                f"use_bias={self.use_bias!r}: give True, False, or a tuple of names out of {', '.join(known_biases)}"
            )
        for name in ("mixers", "rotary", "experts", "qk_norm", "temperature", "tied_values"):
            if getattr(self, name) == ():
                raise ValueError(f"{name}=(): a pattern has at least one entry; None or False for none")
        if self.parallel and not self.pre_norms:
            raise ValueError("parallel=True needs pre_norms: attention and MLP share the norm of what they read")
        for name in ("attention_softcap", "logit_softcap"):
            if (bound := getattr(self, name)) is not None and not bound > 0:
                raise ValueError(f"{name}={bound}: it is a bound, so it is above 0; None for none")
        for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: known are {', '.join(known)}")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"{name}={getattr(self, name)}: give a floating dtype such as 'float32'")

    def _check_shares(self, shares: tuple[int | None, ...]) -> None:
        if len(shares) != self.num_layers:
            raise ValueError(f"shares={shares}: give an entry for each of {self.num_layers} layers")
        if self.latent is not None:
            raise ValueError(f"shares={shares} with latent={self.latent}: layers share keys and values, not latents")
        for i, source in enumerate(shares):
            if source is not None and not (0 <= source < i and shares[source] is None):
                raise ValueError(
                    f"shares={shares}: layer {i} shares layer {source}; give the number of an earlier layer, one with "
                    "keys and values of its own"
                )

    @property
    def biases(self) -> frozenset[str]:
        """The names of the projections that have a bias."""
        if isinstance(self.use_bias, bool):
            return frozenset((*PROJECTIONS, "mlp") if self.use_bias else ())
        return frozenset(self.use_bias)

    def rotated_dim(self, layer: int) -> int:
        """Returns how many numbers of a head there are to be rotated."""
        return self.layer_heads(layer)[1] if self.latent is None else self.latent.rotary_dim

    def reach(self, layer: int) -> Reach:
        """Returns the reach of a layer."""
        return self.reaches[layer % len(self.reaches)]

    def layer_mixer(self, layer: int) -> MixerConfig | None:
        """Returns what a layer has in attention's place, or None if it attends."""
        return self._of_layer("mixers", layer)

    def source(self, layer: int) -> int:
        """Returns the number of the layer whose keys and values a layer reads: its own, unless it shares."""
        source = None if self.shares is None else self.shares[layer]
        return layer if source is None else source

    def layer_heads(self, layer: int) -> tuple[int, int]:
        """Returns how many heads of keys and values a layer has, and their size."""
        return self._of_layer("num_kv_heads", layer), self._of_layer("head_dim", layer)

    def layer_mlp_dim(self, layer: int) -> int:
        """Returns the hidden size of a layer's MLP."""
        return self._of_layer("mlp_dim", layer)

    def layer_ties_values(self, layer: int) -> bool:
        """Returns whether a layer's values are what its key projection gives."""
        return self._of_layer("tied_values", layer)

    def layer_rotary(self, layer: int) -> Rotary | None:
        """Returns how a layer rotates queries and keys."""
        return self._of_layer("rotary", layer)

    def layer_experts(self, layer: int) -> ExpertsConfig | None:
        """Returns the experts of a layer, or None if it has an MLP."""
        return self._of_layer("experts", layer)

    def layer_qk_norm(self, layer: int) -> bool | str:
        """Returns how queries and keys of a layer are normalized."""
        return self._of_layer("qk_norm", layer)

    def layer_temperature(self, layer: int) -> QueryTemperature | None:
        """Returns what the queries of a layer are multiplied by."""
        return self._of_layer("temperature", layer)

    def _of_layer(self, name: str, layer: int) -> Any:
        value = getattr(self, name)
        return value[layer % len(value)] if isinstance(value, tuple) else value


class Block(nnx.Module):
    """One layer: attention, or what is in its place, and MLP, each between norms, if the family has them, and added to
    what came in."""

    def __init__(self, config: DecoderConfig, index: int, *, rngs: nnx.Rngs) -> None:
        kind = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        experts, mixer = config.layer_experts(index), config.layer_mixer(index)
        self.residual_scale, self.hands_on = config.residual_scale, config.shares is not None
        self.attention_norm = Norm(config) if config.pre_norms else nnx.data(None)
        self.mixer: Any = nnx.data(None) if mixer is None else mixer.make(config.width, **kind)
        self.attention: Any = _attention(config, index, rngs=rngs) if mixer is None else nnx.data(None)
        self.attention_post_norm = Norm(config) if config.post_norms else nnx.data(None)
        self.mlp_norm = Norm(config) if config.pre_norms and not config.parallel else nnx.data(None)
        mlp_dim = config.layer_mlp_dim(index)
        self.beside: Any = nnx.data(None)
        if experts is not None and experts.beside_mlp:
            self.beside, experts = ExpertsBeside(config, experts, rngs=rngs), None
        self.mlp = MLP(config, mlp_dim, rngs=rngs) if experts is None else Experts(config, experts, rngs=rngs)
        self.mlp_post_norm = Norm(config) if config.post_norms else nnx.data(None)
        self.parallel = config.parallel
        self.input = nnx.data(None) if config.layer_input_dim is None else LayerInput(config, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((1,), config.param_dtype)) if config.layer_scales else nnx.data(None)

    def __call__(self, x: Any, positions: Any, layer: Any, step: Any, inputs: Any = None) -> tuple[Any, Any]:
        h = _normed(self.attention_norm, x)
        mixes = self.attention if self.mixer is None else self.mixer
        if step is not None:
            y, layer = mixes(h, layer, step)
        elif self.hands_on and self.mixer is None:  # what layers share is then the keys and values themselves
            y, layer = self.attention(h, kv=layer, return_kv=True, positions=positions)
        else:
            y = mixes(h, positions=positions)
        x = x + self._scaled(_normed(self.attention_post_norm, y))
        y = self.mlp(h if self.parallel else _normed(self.mlp_norm, x))
        if self.beside is not None:
            y = self.beside(y, x)
        x = x + self._scaled(_normed(self.mlp_post_norm, y))
        if self.input is not None:
            x = x + self.input(x, inputs)
        return x if self.scale is None else x * self.scale[...].astype(x.dtype)[None, None], layer

    def _scaled(self, y: Any) -> Any:
        return y if self.residual_scale is None else y * jnp.asarray(self.residual_scale, y.dtype)


def _attention(config: DecoderConfig, index: int, *, rngs: nnx.Rngs) -> Any:
    """Returns the attention of a layer."""
    if config.latent is not None:
        return config.latent.attention(config, index, rngs=rngs)
    num_kv_heads, head_dim = config.layer_heads(index)
    return Attention(
        config.num_heads,
        config.width,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        reach=config.reach(index),
        shares=None if config.shares is None else config.shares[index],
        rotary=config.layer_rotary(index),
        qk_norm=config.layer_qk_norm(index),
        qk_norm_epsilon=config.norm_eps,
        value_norm=config.value_norm,
        tied_values=config.layer_ties_values(index),
        scale=config.attention_scale,
        temperature=config.layer_temperature(index),
        softcap=config.attention_softcap,
        gated=config.gated_attention,
        sink_logits=config.sink_logits,
        use_bias=config.biases - {"mlp"},
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _normed(norm: Norm | None, x: Any) -> Any:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only transformer, with a cache or without.

    `model(tokens)` and `model(tokens, positions)` return logits: training. `model(tokens, positions, cache)` returns
    (logits, cache): decoding. `jaxkv.nnx.functional(model)` makes it what `jaxkv.generate` takes.

    Args:
      config: what it is made of.
      rngs: random streams of the parameters.

    >>> from flax import nnx
    >>> from jaxkv.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=8, width=16, num_layers=1, num_heads=2), rngs=nnx.Rngs(0))
    >>> forward, params = jaxkv.nnx.functional(model)
    >>> cache = jaxkv.Cache.init(model.specs(), num_rows=1, capacity=16)
    >>> logits, cache = jax.jit(forward)(params, jnp.array([[3, 1, 4]]), jnp.array([[0, 1, 2]]), cache)
    >>> logits.shape, cache.lengths.tolist()
    ((1, 3, 8), [3])
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        kind = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.width, **kind)
        table = config.max_positions
        self.positions = nnx.data(None) if table is None else nnx.Embed(table, config.width, **kind)
        self.inputs = nnx.data(None) if config.layer_input_dim is None else LayerInputs(config, rngs=rngs)
        self.layers = nnx.List([Block(config, i, rngs=rngs) for i in range(config.num_layers)])
        self.norm = Norm(config)
        head = (
            nnx.data(None)
            if config.tied
            else nnx.Linear(config.width, config.vocab_size, use_bias=False, dot_general=dot_general, **kind)
        )
        self.head = head

    def __call__(self, tokens: Any, positions: Any = None, cache: Cache | None = None, parents: Any = None) -> Any:
        """Returns the logits of the token after each, and the cache if one was given.

        Args:
          tokens: int [B, T]. One outside the vocabulary makes logits NaN; of padding the token doesn't matter.
          positions: int [B, T], EMPTY for padding; without a cache None means 0, 1, 2, ... in every row.
          cache: None, or what the tokens continue, made from `specs()`.
          parents: int [B, T], if the tokens are a tree, see `Cache.begin`; with a cache only.

        Returns:
          logits [B, T, V] in the config's dtype, or (logits, cache).

        Raises:
          ValueError: for tokens that are not int [B, T] or, outside of jit, not in the vocabulary; for positions that
            don't fit tokens, or, as far as sizes tell, the learned table; for a cache made for other layers.
        """
        self._check(tokens, positions, cache)
        specs = rows_of(tokens) if cache is None else (rows_of(tokens), like(cache))
        return spread(Decoder._run, specs, self, tokens, positions, cache, parents)

    def _run(self, tokens: Any, positions: Any, cache: Cache | None, parents: Any) -> Any:
        layers: list[Any] = [None] * len(self.layers)
        step = None
        if cache is not None:
            cache, step = cache.begin(positions, parents=parents)
            layers, positions = list(cache.layers), step.depths
        if positions is not None:  # NaN of an unknown token in padding would spread: 0 * NaN is NaN
            tokens = jnp.where(positions < 0, 0, tokens)
        x = self._embed(tokens, positions)  # [B, T, D]
        inputs = [None] * len(self.layers) if self.inputs is None else self.inputs(tokens, x)
        for i, (block, own) in enumerate(zip(self.layers, inputs, strict=True)):
            source = self.config.source(i)
            x, layers[source] = block(x, positions, layers[source], step, own)
        x = self.norm(x)
        logits = tied(self.embed, x) if self.head is None else self.head(x)
        if self.config.logit_scale is not None:
            logits = logits * jnp.asarray(self.config.logit_scale, logits.dtype)
        if (bound := self.config.logit_softcap) is not None:
            logits = bound * jnp.tanh(logits / bound)
        return logits if cache is None else (logits, cache.with_layers(layers))

    def specs(self, k_storage: Any = None, v_storage: Any = None) -> list[LayerSpec]:
        """Returns the `LayerSpec` of each attention layer, for `Cache.init`.

        Args:
          k_storage, v_storage: how keys and values are kept; None means Dense of the dtype of the computation.
        """
        return [
            block.attention.layer_spec(k_storage=k_storage, v_storage=v_storage)
            if block.mixer is None
            else block.mixer.layer_spec()
            for block in self.layers
        ]

    def _embed(self, tokens: Any, positions: Any) -> Any:
        x = self.embed(tokens)
        if self.config.embed_scale is not None:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is None:
            return x
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        return x + self.positions(jnp.maximum(positions, 0))

    def _check(self, tokens: Any, positions: Any, cache: Cache | None) -> None:
        if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            what = f"{tokens.dtype}{tokens.shape}" if hasattr(tokens, "shape") else type(tokens).__name__
            raise ValueError(f"tokens is {what}; give an integer array [B, T]")
        if positions is not None and np.shape(positions) != tokens.shape:
            raise ValueError(f"positions has shape {np.shape(positions)}, tokens {tokens.shape}; they must agree")
        if cache is not None and positions is None:
            raise ValueError("with a cache give positions too, int [B, T]: cache.lengths[:, None] + arange(T) goes on")
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}; make it from the model: "
                "Cache.init(model.specs(), ...)"
            )
        table = self.config.max_positions
        longest, what = (cache.capacity, "the cache's capacity is") if cache is not None else (0, "")
        if cache is None and positions is None:
            longest, what = tokens.shape[1], "the sequence has"
        if table is not None and longest > table:
            raise ValueError(
                f"{what} {longest} tokens, the model's learned table max_positions={table}; stay within it"
            )
        if not isinstance(tokens, jax.core.Tracer) and not isinstance(positions, jax.core.Tracer):
            real = np.asarray(tokens) if positions is None else np.asarray(tokens)[np.asarray(positions) >= 0]
            wrong = real[(real < 0) | (real >= self.config.vocab_size)]
            if wrong.size:
                raise ValueError(f"token {wrong[0]} is not in the vocabulary of {self.config.vocab_size}")
