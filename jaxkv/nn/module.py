"""What the attention modules of `jaxkv.nnx` and `jaxkv.linen` say and do alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import LayerSpec
from jaxkv.nn.arguments import check_cross_call, check_encoded
from jaxkv.nn.heads import Heads, qk_normed

# Into the docstrings of the classes, behind the arguments that differ.
SIZES = """qkv_features: num_heads * head_dim, in all; None means in_features.
      out_features: size of the output; None means in_features.
      num_kv_heads: heads K of keys and values, a divisor of num_heads; None means num_heads."""
OPTIONS = """head_dim: size H of a head, instead of qkv_features.
      reach: which past tokens a query may see, with a cache and without: Full(), Window(size, sinks) or Chunk(size).
      shares: None, or the number of an earlier layer of the model whose keys and values this one reads: it then has no
        projections for them (Gemma 3n and 4, YOCO).
      rotary: None, or `jaxkv.Rotary(...)`, which rotates q and k by their positions.
      qk_norm: whether each head's q and k are RMS-normalized before they are rotated, as in Qwen 3 and Gemma 3 (whose
        checkpoints hold scale - 1). "together": all heads of a token as one vector, with a scale for each number
        (OLMo 2); "centered": each head, with a scale of its own, after its mean is subtracted (Command R+); "plain":
        each head, and no scale (Llama 4).
      qk_norm_epsilon: added to the mean square.
      value_norm: whether each head's v is RMS-normalized, with no scale (Gemma 4).
      tied_values: whether values are what the key projection gives, before it is normalized and rotated: there is no
        value projection (full layers of Gemma 4). Where keys and values then differ by nothing but the rotation, a spec
        with v_in_k=True and rotary_at="read" keeps both once.
      softcap: None, or the bound c of c * tanh(scores / c).
      scale: factor of the scores; None means head_dim ** -0.5.
      temperature: None, or `jaxkv.QueryTemperature(...)`, which lets queries grow with their positions.
      gated: whether what a head reads is multiplied by the sigmoid of a gate, number by number; the projection of
        queries gives the gate too, behind each head's query (Qwen3-Next).
      sink_logits: whether one learned score per query head joins the softmax and brings no value (gpt-oss).
      use_bias: True, False, or the names of the projections that have a bias, out of "query", "key", "value", "out".
      dropout_rate: share of the attention weights left out in training, at least 0, below 1. With a cache there is no
        dropout.
      broadcast_dropout: whether all rows and heads leave out the same, as in Flax.
      deterministic: True for evaluation, False for training; the call's own goes first. One of them must say it if the
        dropout_rate is above 0.
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
      precision: of the projections, see `jax.lax.Precision`.
      kernel_init, bias_init: initializers of the projections, called as Flax calls them. Sharding annotations come with
        them: `with_partitioning(init, (None, "heads", None))` of your flavor for query, key and value, whose kernels
        are [D, N, H], [D, K, H], [D, K, H].
      out_kernel_init, out_bias_init: the same for the output, whose kernel is [N, H, out_features]; None means
        kernel_init, bias_init.
      implementation: of `jaxkv.attend`."""
CROSS = """num_heads: query heads N.
      in_features: size D of the input x.
      encoded_features: size of the encoder's output; None means in_features.
      {SIZES}
      size: most places that an encoder's output has.
      head_dim, qk_norm, qk_norm_epsilon, softcap, scale, use_bias: as in `Attention`.
      dropout_rate, broadcast_dropout, deterministic: as in `Attention`.
      dtype, param_dtype, precision, implementation: as in `Attention`.
      kernel_init, bias_init, out_kernel_init, out_bias_init: as in `Attention`.""".replace("{SIZES}", SIZES)


class AttentionModule:
    """A module with an attention's attributes: its spec, and when it drops weights."""

    heads: Heads
    dtype: Any
    param_dtype: Any
    deterministic: bool | None
    dropout_rate: float
    qk_norm: bool | str
    qk_norm_epsilon: Any
    value_norm: bool
    query: Any
    key: Any
    value: Any
    out: Any
    gated = False  # of CrossAttention
    query_norm: Any
    key_norm: Any

    def layer_spec(self, *, k_storage: Any = None, v_storage: Any = None) -> LayerSpec:
        """Returns what a cache must keep for this module: its reach, kv heads, head size and rotary.

        Args:
          k_storage, v_storage: how keys and values are kept; None means `Dense` of the dtype of the computation.

        Raises:
          ValueError: if the size of a head is not known: none of head_dim, qkv_features and in_features was given.

        >>> jaxkv.linen.Attention(num_heads=2, head_dim=4, reach=jaxkv.Window(4)).layer_spec().reach
        Window(size=4, sinks=0)
        """
        return self._heads().layer_spec(k_storage, v_storage, self._kept_dtype)

    @property
    def _kept_dtype(self) -> Any:
        return self.param_dtype if self.dtype is None else self.dtype

    def _heads(self) -> Heads:
        return self.heads

    def _normed(self, x: Any, norm: Any) -> Any:
        """Returns queries or keys normalized as `qk_norm` says; `norm` returns the scale, None without one."""
        if not self.qk_norm:
            return x
        return qk_normed(self.qk_norm, x, None if norm is None else norm(), self.qk_norm_epsilon)

    def _keys_and_values(self, k: Any, v: Any, norm: Any) -> tuple[Any, Any]:
        """Returns keys, not yet rotated, and values of what was projected; v is None if k is both."""
        both, v = v is None, k if v is None else v
        k = self._normed(k, norm)
        if not self.value_norm:
            return k, v
        return k, k if both and self.qk_norm == "plain" else qk_normed("plain", v, None, self.qk_norm_epsilon)

    def _ungated(self, q: Any) -> tuple[Any, Any]:
        """Returns queries as projected without their gates, and what the gates let through, None for all."""
        if not self.gated:
            return q, None
        q, gate = jnp.split(q, 2, -1)
        return q, jax.nn.sigmoid(gate)


class CrossAttentionModule(AttentionModule):
    """A module with query, key, value and out, that reads an encoder's output."""

    in_features: int
    encoded_features: int | None

    def write(self, encoded: Any, layer: Any, step: Any) -> Any:
        """Returns the layer with the keys and values of an encoder's output in it.

        Args:
          encoded: [B, S, encoded_features], S at most `size`; what lies beyond a row's length is padding.
          layer: this module's layer of a cache.
          step: from `cache.begin_cross(lengths)`.

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a step of `begin`.
        """
        check_encoded(self._heads(), encoded, layer)
        k, v = self._project(encoded)
        return layer.put(step, k, v)

    def _read(self, x: Any, layer: Any, step: Any, encoded: Any, lengths: Any, dropout_key: Any) -> Any:
        heads = self._heads()
        check_cross_call(heads, x, layer, step, encoded)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this module was made for in_features={self.in_features}")
        q = self._normed(self.query(x), self.query_norm)
        k, v = (None, None) if encoded is None else self._project(encoded)
        return self.out(heads.cross_attend(q, layer, step, k, v, lengths=lengths, dropout_key=dropout_key))

    def _project(self, encoded: Any) -> tuple[Any, Any]:
        features = self.in_features if self.encoded_features is None else self.encoded_features
        if encoded.shape[-1] != features:
            raise ValueError(
                f"encoded has {encoded.shape[-1]} features, this module was made for encoded_features={features}"
            )
        return self._normed(self.key(encoded), self.key_norm), self.value(encoded)
