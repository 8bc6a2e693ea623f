"""One encoder-decoder, driven by a config: an encoder that listens, a decoder that writes. The shape is Whisper's.

Radford et al. 2022, https://arxiv.org/abs/2212.04356. The encoder's output goes into the Cross layers of the cache
once; every forward pass of the decoder reads it from there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY, LayerSpec
from jaxkv.meshes import like, rows_of
from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.mlp import MLP, gelu
from jaxkv.models.norm import Norm
from jaxkv.nn.nnx import Attention, CrossAttention
from jaxkv.nn.product import dot_general, tied
from jaxkv.nn.spread import spread


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """What an encoder-decoder is made of. Frozen and hashable.

    Args:
      vocab_size: tokens the decoder knows, V.
      width: size D of the streams that run through both halves, even.
      num_mel_bins: size of one frame of features (log-mel).
      encoder_layers, encoder_heads, encoder_mlp_dim: of the encoder; mlp_dim None means 4 * width.
      decoder_layers, decoder_heads, decoder_mlp_dim: of the decoder.
      max_source_positions: places of the longest encoder output; each stands for two frames.
      max_positions: tokens of the longest text.
      norm: "rms" or "layer".
      norm_eps: added to the mean square.
      activation: of the MLPs; the convolutions have "gelu".
      use_bias: as in `DecoderConfig`, for all attentions and MLPs.
      tied: whether the embedding table is the output head too.
      dtype: of the computation and the logits.
      param_dtype: of the parameters as they are made.

    Raises:
      ValueError: for sizes below 1 or that don't divide, and names that are not known.

    >>> config = EncoderDecoderConfig(vocab_size=8, width=16, encoder_heads=2, decoder_heads=2)
    >>> config.decoder.head_dim, config.max_frames
    (8, 3000)
    """

    vocab_size: int
    width: int
    num_mel_bins: int = 80
    encoder_layers: int = 4
    encoder_heads: int = 6
    encoder_mlp_dim: int | None = None
    decoder_layers: int = 4
    decoder_heads: int = 6
    decoder_mlp_dim: int | None = None
    max_source_positions: int = 1500
    max_positions: int = 448
    norm: str = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    use_bias: bool | tuple[str, ...] = ("query", "value", "out", "mlp")
    tied: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    def __post_init__(self) -> None:
        for name in ("num_mel_bins", "max_source_positions", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderDecoderConfig({name}={getattr(self, name)}): {name} is at least 1")
        if self.width % 2 or self.width < 4:
            raise ValueError(f"width={self.width}: sinusoid positions come in pairs; give an even width of at least 4")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, getattr(self.decoder, name))
        self._half(self.encoder_layers, self.encoder_heads, self.encoder_mlp_dim)

    @property
    def encoder(self) -> DecoderConfig:
        """The encoder's half, of which norms and MLPs are made."""
        return self._half(self.encoder_layers, self.encoder_heads, self.encoder_mlp_dim)

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder's half."""
        return self._half(self.decoder_layers, self.decoder_heads, self.decoder_mlp_dim)

    @property
    def max_frames(self) -> int:
        """Frames of the longest input."""
        return 2 * self.max_source_positions

    def _half(self, num_layers: int, num_heads: int, mlp_dim: int | None) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            rotary=None,
            max_positions=self.max_positions,
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=False,
            use_bias=self.use_bias,
            tied=self.tied,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


class EncoderBlock(nnx.Module):
    """One layer of the encoder: attention in both directions and MLP, each after a norm and added to what came in."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = Norm(config)
        self.attention = Attention(config.num_heads, config.width, **_kind(config, rngs))
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Any, positions: Any) -> Any:
        both_ways = jnp.ones(positions.shape, jnp.int32)
        x = x + self.attention(self.attention_norm(x), positions=positions, spans=both_ways)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Two convolutions, the second of which halves the frames, sinusoid positions, and layers that see all there is."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        kind = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        width = config.width
        self.config = config
        self.conv1 = nnx.Conv(config.num_mel_bins, width, kernel_size=(3,), padding=((1, 1),), **kind)
        self.conv2 = nnx.Conv(width, width, kernel_size=(3,), strides=(2,), padding=((1, 1),), **kind)
        self.positions = nnx.Embed(config.max_source_positions, width, embedding_init=_sinusoids, **kind)
        self.layers = nnx.List([EncoderBlock(config.encoder, rngs=rngs) for _ in range(config.encoder_layers)])
        self.norm = Norm(config.encoder)

    def __call__(self, features: Any, lengths: Any) -> Any:
        """Returns [B, S, D] for features [B, frames, num_mel_bins], of which `lengths` [B] are real; S is half of them.

        What lies beyond a length changes nothing before it, as if the row were alone.
        """
        x = _cut(features.astype(self.config.dtype), lengths)
        x = _cut(gelu(self.conv1(x)), lengths)
        x = gelu(self.conv2(x))
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        table = jax.lax.stop_gradient(self.positions.embedding[...])  # Whisper's are not trained
        x = x + table[: x.shape[1]].astype(x.dtype)[None]
        positions = jnp.where(positions < encoded_lengths(lengths)[:, None], positions, EMPTY)
        for block in self.layers:
            x = block(x, positions)
        return self.norm(x)


class DecoderBlock(nnx.Module):
    """One layer of the decoder: attention to the past, attention to the encoder's output, and MLP."""

    def __init__(self, config: DecoderConfig, size: int, *, rngs: nnx.Rngs) -> None:
        kind = _kind(config, rngs)
        self.attention_norm = Norm(config)
        self.attention = Attention(config.num_heads, config.width, **kind)
        self.cross_attention_norm = Norm(config)
        self.cross_attention = CrossAttention(config.num_heads, config.width, size=size, **kind)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Any, positions: Any, encoded: Any, lengths: Any, layer: Any, cross_layer: Any, step: Any
    ) -> tuple[Any, Any]:
        """Returns x after this block, and the layer of its past after the put; without a cache its last three are None.

        With one, positions, encoded and lengths are.
        """
        h = self.attention_norm(x)
        if layer is None:
            y = self.attention(h, positions=positions)
        else:
            y, layer = self.attention(h, layer, step)
        x = x + y
        h = self.cross_attention_norm(x)
        x = x + self.cross_attention(h, cross_layer, step, encoded=encoded, encoded_lengths=lengths)
        return x + self.mlp(self.mlp_norm(x)), layer


class EncoderDecoder(nnx.Module):
    """An encoder-decoder transformer, with a cache or without.

    With a cache, `cache = model.encode_into(cache, features)` once per sequence; then `model(tokens, positions, cache)`
    returns (logits, cache), and `jaxkv.nnx.functional(model)` makes it what `jaxkv.generate` takes. Without a cache,
    `model(tokens, features=features)` returns logits: training.

    Args:
      config: what it is made of.
      rngs: random streams of the parameters.

    >>> from flax import nnx
    >>> from jaxkv.models import EncoderDecoder, EncoderDecoderConfig
    >>> sizes = {"encoder_layers": 1, "encoder_heads": 2, "decoder_layers": 1, "decoder_heads": 2}
    >>> config = EncoderDecoderConfig(vocab_size=8, width=16, num_mel_bins=4, max_source_positions=10, **sizes)
    >>> model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    >>> cache = jaxkv.Cache.init(model.specs(), num_rows=2, capacity=16)
    >>> cache = model.encode_into(cache, jnp.ones((2, 20, 4)))
    >>> forward, params = jaxkv.nnx.functional(model)
    >>> jaxkv.generate(forward, params, [[1, 2], [3]], cache, max_new_tokens=4).tokens.shape
    (2, 4)
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        kind = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        half, size = config.decoder, config.max_source_positions
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.embed = nnx.Embed(config.vocab_size, config.width, **kind)
        self.positions = nnx.Embed(config.max_positions, config.width, **kind)
        self.layers = nnx.List([DecoderBlock(half, size, rngs=rngs) for _ in range(config.decoder_layers)])
        self.norm = Norm(half)
        head = (
            nnx.data(None)
            if config.tied
            else nnx.Linear(config.width, config.vocab_size, use_bias=False, dot_general=dot_general, **kind)
        )
        self.head = head

    def __call__(
        self,
        tokens: Any,
        positions: Any = None,
        cache: Cache | None = None,
        parents: Any = None,
        *,
        features: Any = None,
        lengths: Any = None,
    ) -> Any:
        """Returns the logits of the token after each, and the cache if one was given.

        Args:
          tokens: int [B, T].
          positions: int [B, T], EMPTY for padding; without a cache None means 0, 1, 2, ... in every row.
          cache: None, or what the tokens continue, made from `specs()`; a row without an encoder's output sees none.
          parents: with a cache: int [B, T], if the tokens are a tree, see `Cache.begin`.
          features: without a cache: float [B, frames, num_mel_bins].
          lengths: without a cache: int [B], frames of each row that are real; None means all.

        Returns:
          logits [B, T, V] in the config's dtype, or (logits, cache).

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a cache made for other layers.
        """
        self._check(tokens, positions, cache, features)
        if cache is None:
            lengths = self._frames(features, lengths)
        specs = rows_of(tokens) if cache is None else (rows_of(tokens), like(cache))
        return spread(EncoderDecoder._run, specs, self, tokens, positions, cache, parents, features, lengths)

    def _run(self, tokens: Any, positions: Any, cache: Cache | None, parents: Any, features: Any, lengths: Any) -> Any:
        step, depths = None, positions
        if cache is not None:
            cache, step = cache.begin(positions, parents=parents)
            depths = step.depths
        if depths is None:
            x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :])
        else:  # NaN of an unknown token in padding would spread
            x = self.embed(jnp.where(depths < 0, 0, tokens)) + self.positions(jnp.maximum(depths, 0))
        layers: list[Any] = []
        if cache is None:
            encoded, lengths = self.encoder(features, lengths), encoded_lengths(lengths)
            for block in self.layers:
                x, _ = block(x, positions, encoded, lengths, None, None, None)
        else:
            for block, layer, cross_layer in zip(self.layers, cache.layers[::2], cache.layers[1::2], strict=True):
                x, layer = block(x, None, None, None, layer, cross_layer, step)
                layers += [layer, cross_layer]
        x = self.norm(x)
        logits = tied(self.embed, x) if self.head is None else self.head(x)
        return logits if cache is None else (logits, cache.with_layers(layers))

    def encode(self, features: Any, lengths: Any = None) -> Any:
        """Returns the encoder's output, [B, S, D]: a place for every two frames.

        Args:
          features: float [B, frames, num_mel_bins], at most `config.max_frames` frames.
          lengths: int [B], frames of each row that are real; None means all.
        """
        lengths = self._frames(features, lengths)
        return spread(lambda self, *args: self.encoder(*args), rows_of(features), self, features, lengths)

    def write(self, encoded: Any, cache: Cache, lengths: Any = None, rows: Any = None) -> Cache:
        """Returns the cache with what `encode` gave in its Cross layers.

        Args:
          encoded: [B, S, D].
          cache: made from `specs()`.
          lengths: int [B], places of each row that are real: half its frames, rounded up; None means all, a negative
            one brings nothing.
          rows: int [B], the sequence of each batch row; None: batch row b is sequence b.
        """
        self._check_cache(cache)
        lengths = jnp.full(encoded.shape[:1], encoded.shape[1], jnp.int32) if lengths is None else lengths
        return spread(EncoderDecoder._write, like(cache), self, encoded, cache, lengths, rows)

    def _write(self, encoded: Any, cache: Cache, lengths: Any, rows: Any) -> Cache:
        cache, step = cache.begin_cross(lengths, rows)
        layers: list[Any] = []
        for block, layer, cross_layer in zip(self.layers, cache.layers[::2], cache.layers[1::2], strict=True):
            layers += [layer, block.cross_attention.write(encoded, cross_layer, step)]
        return cache.with_layers(layers)

    def encode_into(self, cache: Cache, features: Any, lengths: Any = None, rows: Any = None) -> Cache:
        """Returns the cache with a new encoder's output for some sequences: `encode`, then `write`.

        Several sequences at a time or one by one, before their first token or in between. Compiled and in place it is
        `nnx.jit(EncoderDecoder.encode_into, donate_argnums=1)`, called with the model before the cache.

        Args:
          cache: made from `specs()`.
          features: float [B, frames, num_mel_bins], at most `config.max_frames` frames.
          lengths: int [B], frames of each row that are real; None means all. A negative one brings nothing.
          rows: int [B], the sequence of each batch row; None: batch row b is sequence b.
        """
        encoded = self.encode(features, lengths)
        return self.write(encoded, cache, encoded_lengths(self._frames(features, lengths)), rows)

    def specs(self, k_storage: Any = None, v_storage: Any = None) -> list[LayerSpec]:
        """Returns the `LayerSpec`s for `Cache.init`: for each layer its past, then the encoder's output.

        Args:
          k_storage, v_storage: how keys and values are kept; None means Dense of the dtype of the computation.
        """
        parts = [part for block in self.layers for part in (block.attention, block.cross_attention)]
        return [part.layer_spec(k_storage=k_storage, v_storage=v_storage) for part in parts]

    def _frames(self, features: Any, lengths: Any) -> Any:
        """Returns the lengths, in frames, after a look at the features."""
        bins, most = self.config.num_mel_bins, self.config.max_frames
        shape = np.shape(features)
        if len(shape) != 3 or shape[2] != bins or not 1 <= shape[1] <= most:
            raise ValueError(
                f"features has shape {shape}; give float [B, frames, num_mel_bins={bins}] with at most {most} frames "
                "(transformers' feature extractors have the last two axes the other way round)"
            )
        lengths = jnp.full(shape[:1], shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths)
        if lengths.shape != shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"lengths must be int [B] = {shape[:1]}, frames of each row; got {lengths.dtype}{lengths.shape}"
            )
        return lengths.astype(jnp.int32)

    def _check(self, tokens: Any, positions: Any, cache: Cache | None, features: Any) -> None:
        if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            what = f"{tokens.dtype}{tokens.shape}" if hasattr(tokens, "shape") else type(tokens).__name__
            raise ValueError(f"tokens is {what}; give an integer array [B, T]")
        if positions is not None and np.shape(positions) != tokens.shape:
            raise ValueError(f"positions has shape {np.shape(positions)}, tokens {tokens.shape}; they must agree")
        if cache is None:
            if features is None:
                raise ValueError("without a cache give features=, float [B, frames, num_mel_bins]")
            longest, what = tokens.shape[1] if positions is None else 0, "the sequence has"
        else:
            self._check_cache(cache)
            if positions is None or features is not None:
                raise ValueError(
                    "with a cache give positions, int [B, T], and no features: those go in once, "
                    "cache = model.encode_into(cache, features)"
                )
            longest, what = cache.capacity, "the cache's capacity is"
        if longest > self.config.max_positions:
            raise ValueError(
                f"{what} {longest} tokens, the model's learned table max_positions={self.config.max_positions}; stay "
                "within it"
            )

    def _check_cache(self, cache: Cache) -> None:
        if len(cache.layers) != 2 * len(self.layers):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the model {2 * len(self.layers)}: make it from the model, "
                "Cache.init(model.specs(), ...)"
            )


def encoded_lengths(lengths: Any) -> Any:
    """Returns how many places the encoder makes of so many frames: int32, the shape of lengths; negative stays so.

    >>> encoded_lengths(np.array([3000, 5, 0, -1])).tolist()
    [1500, 3, 0, -1]
    """
    return jnp.where(lengths < 0, EMPTY, (lengths + 1) // 2)


def _cut(x: Any, lengths: Any) -> Any:
    """Returns x [B, frames, ...] with zeros beyond the lengths, as a convolution pads a row that is alone."""
    frames = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where((frames < lengths[:, None])[:, :, None], x, 0)


def _kind(config: DecoderConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    return {
        "use_bias": config.biases - {"mlp"},
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "rngs": rngs,
    }


def _sinusoids(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns Whisper's table of positions: sines, then cosines, of wavelengths from 2 pi to 10,000 * 2 pi."""
    length, width = shape
    rates = jnp.exp(-math.log(10_000.0) / (width // 2 - 1) * jnp.arange(width // 2, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)
