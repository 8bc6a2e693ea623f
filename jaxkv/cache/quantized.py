"""Storages that keep less than they are given: codes of 8 or 4 bits, and a scale for each few of them.

What is kept of a vector depends on that vector alone, so putting, moving and forgetting a token never touches another.
A vector with a number in it that is not finite comes back as NaN, all of it: its scale is NaN or infinite, its codes
are those of 0. A vector of zeros has the scale 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.bits import pack, unpack, without_gradient
from jaxkv.cache.rotation import rotate
from jaxkv.cache.storage import whole

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@dataclasses.dataclass(frozen=True)
class Int8:
    """Keeps numbers as integers of 8 bits, with one float32 scale per token and head: 0.27 of float32's bytes.

    Symmetric: the largest number of a vector becomes 127 or -127. What was put is read back with an error of about
    0.6 % of the vector's length. Gradients don't flow through stored numbers.

    Args:
      rotate: whether vectors are rotated (Hadamard) before they are rounded and back after they are read, which costs
        little and keeps single large channels from taking the precision of all others.

    >>> storage = Int8()
    >>> x = jnp.array([3.0, -1.0, 0.5, 2.0])
    >>> bool(jnp.abs(storage.decode(storage.encode(x)) - x).max() < 0.02)
    True
    """

    rotate: bool = True

    def __post_init__(self) -> None:
        _check_rotate(self)

    @property
    def dtype(self) -> Any:
        """What `decode` gives."""
        return jnp.dtype("float32")

    def check(self, size: int) -> None:
        """Every size of a vector fits."""

    def zeros(self, lead: tuple[int, ...], size: int) -> Any:
        """Returns the empty storage: {"codes": int8 [*lead, size], "scales": float32 [*lead, 1]}."""
        return {"codes": jnp.zeros((*lead, size), jnp.int8), "scales": jnp.ones((*lead, 1), jnp.float32)}

    def encode(self, x: Any) -> Any:
        """Returns x [..., H] as it is stored."""
        x = _given(self, x)
        scales = _scales(jnp.abs(x).max(-1, keepdims=True) * np.float32(1 / 127))
        return {"codes": jnp.rint(_divided(x, scales)).astype(jnp.int8), "scales": scales}

    def decode(self, stored: Any) -> Any:
        """Returns the numbers [..., H] that `encode` stored, rounded: float32."""
        return _taken(self, stored)

    def pieces(self, stored: Any) -> tuple[tuple[Any, Any], ...]:
        """Returns the stored vectors in the form that matrix products need: see `Dense.pieces`."""
        return ((stored["codes"], stored["scales"]),)

    def basis(self, x: Any) -> Any:
        """Returns x [..., H] in the basis of `pieces`, or from there in its own."""
        return rotate(x) if self.rotate else x


@dataclasses.dataclass(frozen=True)
class Int4:
    """Keeps numbers as integers of 4 bits, two per byte, in small groups: 0.16 of float32's bytes.

    A vector has one scale, and each group of its numbers a byte: by how many scales (1 to 16) its integers are apart,
    and which of them (0 to 15) is 0. What was put is read back with an error of about 5.5 % of the vector's length.
    Gradients don't flow through stored numbers.

    Args:
      group: neighboring numbers that share such a byte; a divisor of half of head_dim. Groups of 32 take 0.14 of the
        bytes, with an error of about 8 %.
      rotate: as for `Int8`. Without it, 4 bits are too few for the keys of many models.

    Raises:
      ValueError: for a group below 1.

    >>> LayerSpec = jaxkv.LayerSpec
    >>> spec = LayerSpec(jaxkv.Full(), num_kv_heads=8, head_dim=128, k_storage=jaxkv.Int8(), v_storage=jaxkv.Int4())
    >>> jaxkv.plan_memory([spec], num_rows=1, capacity=4096).bytes_per_token
    1712
    """

    group: int = 8
    rotate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", checked_size("Int4", "group", self.group, 1))
        _check_rotate(self)

    @property
    def dtype(self) -> Any:
        """What `decode` gives."""
        return jnp.dtype("float32")

    def check(self, size: int) -> None:
        """Raises ValueError unless vectors of `size` numbers can be stored."""
        if size % 2:
            raise ValueError(
                f"Int4 puts two numbers into a byte, and a vector of {size} has an odd number; take Int8()"
            )
        if size % (2 * self.group):
            fits = max(n for n in range(1, min(self.group, size // 2) + 1) if size % (2 * n) == 0)
            raise ValueError(
                f"groups of {self.group} don't divide the halves of a vector of {size} numbers; give Int4(group={fits})"
            )

    def zeros(self, lead: tuple[int, ...], size: int) -> Any:
        """Returns the empty storage: {"codes": uint8 [*lead, H / 2], "groups": uint8 [*lead, H / group], "scales":
        bfloat16 [*lead, 1], or its bits}."""
        return {
            "codes": jnp.zeros((*lead, size // 2), jnp.uint8),
            "groups": jnp.zeros((*lead, size // self.group), jnp.uint8),
            "scales": pack(jnp.ones((*lead, 1), jnp.bfloat16)),
        }

    def encode(self, x: Any) -> Any:
        """Returns x [..., H] as it is stored; number i of a vector shares a byte with number i + H / 2."""
        x = _given(self, x)
        groups = x.reshape(*x.shape[:-1], -1, self.group)
        low = jnp.minimum(groups.min(-1, keepdims=True), 0)
        wide = (jnp.maximum(groups.max(-1, keepdims=True), 0) - low) * np.float32(1 / 15)
        kept = _scales((wide.max(-2, keepdims=True) * np.float32(1 / 16)).astype(jnp.bfloat16))
        scales = kept.astype(jnp.float32)

        def rounded(levels: Any) -> tuple[Any, Any, Any, Any]:
            levels = jnp.clip(levels, 1, 16)
            steps = levels * scales
            zeros = jnp.clip(jnp.rint(_divided(-low, steps)), 0, 15)
            codes = jnp.clip(jnp.rint(_divided(groups, steps)) + zeros, 0, 15)
            return jnp.square((codes - zeros) * steps - groups).sum(-1, keepdims=True), levels, zeros, codes

        enough = jnp.ceil(_divided(wide, scales))
        best = rounded(enough)
        for near in (-1, 1):  # a finer step cuts off what is farthest from 0, a wider one may meet more numbers
            other = rounded(enough + near)
            better = other[0] < best[0]
            best = tuple(jnp.where(better, new, old) for new, old in zip(other, best, strict=True))  # type: ignore[assignment]
        levels, zeros, codes = (y.astype(jnp.uint8) for y in best[1:])
        first, second = jnp.split(codes.reshape(x.shape), 2, -1)
        return {
            "codes": first | (second << 4),
            "groups": (((levels - 1) << 4) | zeros)[..., 0],
            "scales": pack(kept[..., 0]),
        }

    def decode(self, stored: Any) -> Any:
        """Returns the numbers [..., H] that `encode` stored, rounded: float32."""
        return _taken(self, stored)

    def pieces(self, stored: Any) -> tuple[tuple[Any, Any], ...]:
        """Returns the stored vectors in the form that matrix products need, in two halves: see `Dense.pieces`."""
        codes, scales = stored["codes"], unpack(stored["scales"], jnp.bfloat16).astype(jnp.float32)

        def half(codes: Any, groups: Any) -> Any:
            levels, zeros = ((y.astype(jnp.int32)[..., None]).astype(jnp.float32) for y in (groups >> 4, groups & 15))
            x = codes.astype(jnp.int32).astype(jnp.float32).reshape(*groups.shape, self.group)
            return (x * (levels + 1) - zeros * (levels + 1)).reshape(codes.shape)

        low, high = jnp.split(stored["groups"], 2, -1)
        return (half(codes & 15, low), scales), (half(codes >> 4, high), scales)

    def basis(self, x: Any) -> Any:
        """Returns x [..., H] in the basis of `pieces`, or from there in its own."""
        return rotate(x) if self.rotate else x


@dataclasses.dataclass(frozen=True)
class Float8:
    """Keeps numbers as floats of 8 bits, with one float32 scale per token and head: 0.27 of float32's bytes.

    The largest number of a vector becomes the largest that the format has, so that nothing overflows. What was put is
    read back with an error of about 2.6 % (e4m3) or 5 % (e5m2) of each number, and numbers far below the largest of
    their vector keep that precision. Gradients don't flow through stored numbers.

    Args:
      format: "e4m3", with 3 bits of mantissa, or "e5m2", with 2 and a wider range.

    Raises:
      ValueError: for another format.

    >>> storage = Float8("e4m3")
    >>> storage.decode(storage.encode(jnp.array([448.0, 1.0, -0.25]))).tolist()
    [448.0, 1.0, -0.25]
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"Float8(format={self.format!r}): give {' or '.join(map(repr, FORMATS))}")

    @property
    def dtype(self) -> Any:
        """What `decode` gives."""
        return jnp.dtype("float32")

    def check(self, size: int) -> None:
        """Every size of a vector fits."""

    def zeros(self, lead: tuple[int, ...], size: int) -> Any:
        """Returns the empty storage: {"codes": uint8 [*lead, size], "scales": float32 [*lead, 1]}."""
        return {"codes": jnp.zeros((*lead, size), jnp.uint8), "scales": jnp.ones((*lead, 1), jnp.float32)}

    def encode(self, x: Any) -> Any:
        """Returns x [..., H] as it is stored."""
        x = _given(self, x)
        kind = FORMATS[self.format]
        largest = float(jnp.finfo(kind).max)
        scales = _scales(jnp.abs(x).max(-1, keepdims=True) * np.float32(1 / largest))
        return {"codes": pack(jnp.clip(_divided(x, scales), -largest, largest).astype(kind)), "scales": scales}

    def decode(self, stored: Any) -> Any:
        """Returns the numbers [..., H] that `encode` stored, rounded: float32."""
        return _taken(self, stored)

    def pieces(self, stored: Any) -> tuple[tuple[Any, Any], ...]:
        """Returns the stored vectors in the form that matrix products need: see `Dense.pieces`.

        As float16, whose bits are those of the code moved to the left: a CPU has no conversion from 8 bits.
        """
        codes, scales = stored["codes"].astype(jnp.uint16), stored["scales"]
        if self.format == "e5m2":
            finite = (codes & 128) | jnp.minimum(codes & 127, 123)  # whatever lies where nothing was stored
            return ((lax.bitcast_convert_type(finite << 8, jnp.float16), scales),)
        bits = ((codes & 128) << 8) | ((codes & 127) << 7)  # the exponent's bias is 7 there and 15 here
        return ((lax.bitcast_convert_type(bits, jnp.float16), scales * np.float32(2**8)),)

    def basis(self, x: Any) -> Any:
        """Returns x as it is: vectors are not rotated."""
        return x


def _check_rotate(storage: Any) -> None:
    if not isinstance(storage.rotate, bool):
        raise ValueError(f"{type(storage).__name__}(rotate={storage.rotate!r}): give True or False")


def _given(storage: Any, x: Any) -> Any:
    """Returns x as float32 in the basis in which it is stored; to differentiate it is an error."""
    return without_gradient(storage.basis(x.astype(jnp.float32)), repr(storage))


def _taken(storage: Any, stored: Any) -> Any:
    """Returns the numbers that the pieces are, in their own basis: float32 [..., H]."""
    return storage.basis(whole(storage.pieces(stored)))


def _scales(scales: Any) -> Any:
    return jnp.where(scales == 0, jnp.ones_like(scales), scales)


def _divided(x: Any, scales: Any) -> Any:
    """Returns x / scales, 0 where the scale is not finite."""
    return jnp.where(jnp.isfinite(scales), x / scales, 0)
