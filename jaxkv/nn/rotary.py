"""Rotary position embedding: queries and keys are rotated by angles that grow with their position.

Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864. Angles are computed in float32 from the positions of the
call, so there is no table, no longest position, and a key can be re-rotated to another position later (`shift`), which
is what `Cache.remove` does. The scalings stretch a model to longer sequences than it was trained on; the results are
those of Hugging Face transformers 5 (`modeling_rope_utils.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxkv.cache.plain import exportable


@runtime_checkable
class Scaling(Protocol):
    """What a scaling does: changes the frequencies, and may change the length of what is rotated. Frozen, hashable."""

    @property
    def magnitude(self) -> float:
        """Factor on rotated queries and keys."""

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies to use. float64 [dim / 2], radians per token, falling; the same out."""


@exportable
@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`. Chen et al. 2023, https://arxiv.org/abs/2306.15595.

    Args:
      factor: how many times longer sequences become, at least 1.

    Raises:
      ValueError: for a factor below 1.

    >>> LinearScaling(4.0).scale(np.array([1.0, 0.1]), theta=100.0).tolist()
    [0.25, 0.025]
    """

    factor: float

    def __post_init__(self) -> None:
        _number("LinearScaling", "factor", self.factor, least=1.0)

    @property
    def magnitude(self) -> float:
        return 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / self.factor


@exportable
@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: fast dimensions stay, slow ones are interpolated, those between blend, and q and k grow a little.

    Peng et al. 2023, https://arxiv.org/abs/2309.00071. A dimension is fast if it turns at least `beta_fast` times
    within the trained length, slow if at most `beta_slow` times.

    Args:
      factor: how many times longer sequences become, at least 1.
      original_length: tokens the model was trained on (transformers: original_max_position_embeddings).
      beta_fast: turns from which on a dimension is left alone.
      beta_slow: turns up to which a dimension is fully interpolated, at most `beta_fast`.
      attention_factor: factor on rotated q and k; None computes it from `factor`: 0.1 ln(factor) + 1.
      mscale, mscale_all_dim: DeepSeek's variant of the computed factor, used if both are given and not 0.
      truncate: whether the blend starts and ends on whole dimensions.

    Raises:
      ValueError: for a factor below 1, a length below 1, or betas in the wrong order.

    >>> round(YarnScaling(4.0, 4096).magnitude, 4)
    1.1386
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _number("YarnScaling", "factor", self.factor, least=1.0)
        _number("YarnScaling", "original_length", self.original_length, least=1)
        _number("YarnScaling", "beta_slow", self.beta_slow, above=0.0)
        _number("YarnScaling", "beta_fast", self.beta_fast, least=self.beta_slow)
        if self.attention_factor is not None:
            _number("YarnScaling", "attention_factor", self.attention_factor, above=0.0)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def grow(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return grow(self.mscale) / grow(self.mscale_all_dim)
        return grow(1.0)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        if theta <= 1:
            raise ValueError(
                f"theta={theta} with YarnScaling: dimensions must rotate at different speeds, so theta is above 1"
            )
        half = len(frequencies)

        def dimension(turns: float) -> float:  # that turns so many times within original_length
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        if low == high:
            high += 0.001
        interpolated = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)  # 0: left alone
        return frequencies / self.factor * interpolated + frequencies * (1.0 - interpolated)


@exportable
@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling: long wavelengths are interpolated, short ones stay, those between blend.

    Llama Team 2024, "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, and Meta's llama-models.

    Args:
      factor: how many times longer sequences become, at least 1.
      low_freq_factor: wavelengths above original_length / low_freq_factor are divided by `factor`.
      high_freq_factor: wavelengths below original_length / high_freq_factor stay. Above low_freq_factor.
      original_length: tokens the model was trained on (transformers: original_max_position_embeddings).

    Raises:
      ValueError: for a factor below 1, a length below 1, or frequency factors in the wrong order.

    >>> Llama3Scaling().scale(np.array([1.0, 1e-5]), theta=500_000.0).tolist()
    [1.0, 1.25e-06]
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _number("Llama3Scaling", "factor", self.factor, least=1.0)
        _number("Llama3Scaling", "low_freq_factor", self.low_freq_factor, above=0.0)
        _number("Llama3Scaling", "high_freq_factor", self.high_freq_factor, above=self.low_freq_factor)
        _number("Llama3Scaling", "original_length", self.original_length, least=1)

    @property
    def magnitude(self) -> float:
        return 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_length * frequencies / (2 * math.pi)  # within original_length
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1.0 - kept) * frequencies / self.factor + kept * frequencies


@exportable
@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: every frequency is divided by its own factor, found by search, and q and k grow a little.

    Ding et al. 2024, https://arxiv.org/abs/2402.13753. Checkpoints such as Phi-3's bring two lists of factors, for
    sequences that stay within the length of training and for longer ones. A key that was rotated with one list does not
    fit queries rotated with the other, so one is chosen for all that a cache will hold.

    Args:
      factors: what each frequency is divided by, above 0, as many as half the rotated dimensions.
      factor: how many times longer than in training sequences become at most, at least 1.
      original_length: tokens the model was trained on (transformers: original_max_position_embeddings).
      attention_factor: factor on rotated q and k; None computes sqrt(1 + ln(factor) / ln(original_length)).

    Raises:
      ValueError: for factors that are not above 0, a factor below 1, or a length below 2.

    >>> LongRopeScaling((1.0, 2.0), factor=32.0, original_length=4096).scale(np.array([1.0, 0.1]), 1e4).tolist()
    [1.0, 0.05]
    """

    factors: tuple[float, ...]
    factor: float
    original_length: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for number in self.factors:
            _number("LongRopeScaling", "factors", number, above=0.0)
        _number("LongRopeScaling", "factor", self.factor, least=1.0)
        _number("LongRopeScaling", "original_length", self.original_length, least=2)
        if self.attention_factor is not None:
            _number("LongRopeScaling", "attention_factor", self.attention_factor, above=0.0)

    @property
    def num_pairs(self) -> int:
        """How many pairs of dimensions are rotated."""
        return len(self.factors)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_length))

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        if len(frequencies) != len(self.factors):
            raise ValueError(
                f"LongRopeScaling has {len(self.factors)} factors, but {len(frequencies)} pairs of dimensions are "
                "rotated; give a factor for each"
            )
        return frequencies / np.array(self.factors)


@exportable
@dataclasses.dataclass(frozen=True)
class ProportionalScaling:
    """Only the fastest pairs turn, each as fast as if all did; the slow ones stand still (full layers of Gemma 4).

    With `Rotary(dim=...)`, which turns leading dimensions alone, their speeds are spread over those dimensions instead.

    Args:
      part: of the pairs that turn, above 0, at most 1.
      factor: what their frequencies are divided by, at least 1.

    Raises:
      ValueError: for a part or a factor out of range.

    >>> ProportionalScaling(0.5).scale(np.array([1.0, 0.1]), theta=100.0).tolist()
    [1.0, 0.0]
    """

    part: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _number("ProportionalScaling", "part", self.part, above=0.0)
        if self.part > 1:
            raise ValueError(f"ProportionalScaling(part={self.part}): at most all pairs turn; give at most 1")
        _number("ProportionalScaling", "factor", self.factor, least=1.0)

    @property
    def magnitude(self) -> float:
        return 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        turned = np.arange(len(frequencies)) < int(self.part * len(frequencies))
        return np.where(turned, frequencies / self.factor, 0.0)


@exportable
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of one layer. Frozen and hashable: give the same to the module and to its LayerSpec.

    Dimension pair i turns by position * theta**(-2 i / dim) radians. Pairs are (i, i + dim / 2), as GPT-NeoX, Llama in
    Hugging Face's form and Gemma have them, or (2 i, 2 i + 1) if `interleaved`, as GPT-J and Llama in Meta's form.

    Args:
      theta: base of the wavelengths, above 0.
      dim: how many leading dimensions of a head are rotated, even; None rotates all.
      scaling: None, LinearScaling, YarnScaling, Llama3Scaling, LongRopeScaling or ProportionalScaling.
      interleaved: whether a pair is two neighbors instead of two halves.

    Raises:
      ValueError: for theta <= 0, an odd or non-positive dim, or a scaling that is none.

    >>> rotary = Rotary(theta=10_000.0)
    >>> k = jnp.ones((1, 3, 1, 4))                               # [B, T, K, H]
    >>> positions = jnp.arange(3)[None, :, None, None]           # [B, T, 1, 1]
    >>> moved = rotary.shift(rotary.rotate(k, positions), jnp.full((1, 3, 1, 1), 5))
    >>> bool(jnp.allclose(moved, rotary.rotate(k, positions + 5), atol=1e-6))
    True
    """

    theta: float = 10_000.0
    dim: int | None = None
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        _number("Rotary", "theta", self.theta, above=0.0)
        dim = self.dim
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2):
            raise ValueError(f"Rotary(dim={dim!r}): dimensions are rotated in pairs; give an even number of at least 2")
        if self.scaling is not None:
            if isinstance(self.scaling, type) or not isinstance(self.scaling, Scaling):
                raise ValueError(
                    f"Rotary(scaling={self.scaling!r}): give None, LinearScaling(...), YarnScaling(...), "
                    "Llama3Scaling(...), LongRopeScaling(...) or ProportionalScaling(...)"
                )
            self.frequencies(2 * getattr(self.scaling, "num_pairs", 1) if dim is None else dim)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per token of each pair. float32 [dim / 2].

        Args:
          head_dim: size of a head.

        Raises:
          ValueError: if `dim` is larger than head_dim, or None with an odd head_dim.

        >>> Rotary(theta=100.0).frequencies(4).tolist()
        [1.0, 0.10000000149011612]
        """
        dim = head_dim if self.dim is None else self.dim
        if dim > head_dim:
            raise ValueError(
                f"Rotary(dim={dim}) rotates more dimensions than a head has, {head_dim}; give that or less"
            )
        if dim % 2:
            raise ValueError(
                f"a head of {dim} dimensions can't be rotated in pairs; give Rotary(dim=...), even, below it"
            )
        frequencies = float(self.theta) ** (-np.arange(0, dim, 2) / dim)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies, float(self.theta))
        return frequencies.astype(np.float32)

    def rotate(self, x: Any, positions: Any) -> Any:
        """Returns queries or keys rotated to their positions.

        Args:
          x: [..., H], any floating dtype.
          positions: integers of x's rank, last axis 1, broadcasting against x: for q [B, T, N, H] this is
            `positions[:, :, None, None]`. EMPTY is as good as any other number; nobody sees the result.

        Returns:
          x's shape and dtype; computed in float32.

        Raises:
          ValueError: if ranks differ, the last axis of positions is not 1, or the head is too small.
          TypeError: if positions are not integers, or x is not floating.

        >>> Rotary(theta=100.0).rotate(jnp.array([[1.0, 0.0]]), jnp.array([[1]])).round(3).tolist()
        [[0.5400000214576721, 0.8410000205039978]]
        """
        return self._turn(x, positions, 1.0 if self.scaling is None else self.scaling.magnitude)

    def shift(self, k: Any, delta: Any) -> Any:
        """Returns already rotated keys re-rotated by `delta` tokens: shift(rotate(x, p), d) equals rotate(x, p + d).

        Args:
          k: rotated keys [..., H], any floating dtype.
          delta: integers of k's rank, last axis 1, broadcasting against k; negative turns back.

        Returns:
          k's shape and dtype; computed in float32.

        Raises:
          ValueError, TypeError: as for `rotate`.

        >>> Rotary().shift(jnp.array([[1.0, 0.0]]), jnp.array([[0]])).tolist()
        [[1.0, 0.0]]
        """
        return self._turn(k, delta, 1.0)

    def _turn(self, x: Any, tokens: Any, magnitude: float) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"only floating numbers can be rotated, x is {x.dtype}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"positions count tokens, so they are integers; these are {tokens.dtype}")
        if tokens.ndim != x.ndim or tokens.shape[-1] != 1:
            raise ValueError(
                f"positions of shape {tokens.shape} don't fit x of shape {x.shape}: they have x's rank and a last axis "
                "of 1; for positions [B, T] and x [B, T, N, H] give positions[:, :, None, None]"
            )
        frequencies = self.frequencies(x.shape[-1])
        dim = 2 * len(frequencies)
        angles = tokens.astype(jnp.float32) * frequencies.reshape((1,) * (x.ndim - 1) + (-1,))  # [..., dim / 2]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if magnitude != 1.0:
            cos, sin = cos * jnp.float32(magnitude), sin * jnp.float32(magnitude)
        y = x.astype(jnp.float32)
        if self.interleaved:
            a, b = y[..., 0:dim:2], y[..., 1:dim:2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*y.shape[:-1], dim)
        else:
            a, b = y[..., : dim // 2], y[..., dim // 2 : dim]
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        if dim < x.shape[-1]:
            turned = jnp.concatenate([turned, y[..., dim:]], axis=-1)
        return turned.astype(x.dtype)


def _number(owner: str, name: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}({name}={value!r}): {name} is a finite number")
    if least is not None and value < least:
        raise ValueError(f"{owner}({name}={value!r}): {name} is at least {least}")
    if above is not None and value <= above:
        raise ValueError(f"{owner}({name}={value!r}): {name} is above {above}")
