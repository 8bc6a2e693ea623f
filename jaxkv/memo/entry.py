"""What is known about one function for items of one form: where its outputs are kept, and how they are put together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import aligned
from jaxkv.memo.call import Call, Form
from jaxkv.memo.hashing import SIZE, Hash, as_bytes
from jaxkv.memo.program import digest_of


@dataclasses.dataclass(frozen=True)
class Output:
    """One array that comes out, per item.

    Attributes:
      path: where it stands in the output.
      dtype, shape: of one item.
    """

    path: str
    dtype: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where outputs are kept, and what they look like.

    Attributes:
      form: of the calls.
      namespace: 16 bytes that stand for the function and everything but the items.
      template: the output with shapes in place of arrays. (Unlike its structure alone, it can be pickled.)
      outputs: the arrays that come out.
    """

    form: Form
    namespace: bytes
    template: Any
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one item's outputs."""
        return sum(output.nbytes for output in self.outputs)

    def keys(self, call: Call, hashing: Hash) -> list[bytes]:
        """Returns the key of each item: 16 bytes for the function, 16 for the item."""
        namespace = self.namespace_of(call, hashing)
        columns = call.columns if hashing.on_device else [np.asarray(column) for column in call.columns]
        return [namespace + row for row in hashing.rows(columns)]

    def namespace_of(self, call: Call, hashing: Hash) -> bytes:
        """Returns the namespace of a call: that of the entry, or one made of it and of what all items share."""
        if not call.shared:
            return self.namespace
        return digest([self.namespace.hex(), *(digest_of(array, hashing) for array in call.shared)])

    def payloads(self, arrays: Sequence[np.ndarray]) -> list[bytes]:
        """Returns the bytes of each item, from the arrays [B, ...] that came out."""
        columns = [as_bytes(array) for array in arrays]
        if len(columns) == 1:
            return [row.tobytes() for row in columns[0]]
        return [b"".join(row.tobytes() for row in rows) for rows in zip(*columns, strict=True)]

    def assemble(self, payloads: Sequence[Any]) -> Any:
        """Returns the output for items with these bytes: fresh, writable arrays [B, ...], that share nothing."""
        size, arrays, begin = len(payloads), [], 0
        for output in self.outputs:
            nbytes, end = output.nbytes, begin + output.nbytes
            parts = payloads if nbytes == self.nbytes else [memoryview(payload)[begin:end] for payload in payloads]
            column = aligned.empty((size * nbytes,), np.uint8)  # which JAX takes as it is
            data = column.data
            for row, part in enumerate(parts):
                data[row * nbytes : (row + 1) * nbytes] = part
            arrays.append(column.view(output.dtype).reshape(size, *output.shape))
            begin = end
        return jax.tree.unflatten(jax.tree.structure(self.template), arrays)

    def about(self, name: str, version: str | None) -> dict[str, Any]:
        """Returns what the table of a store says about the namespace."""
        return {
            "function": name,
            "version": version,
            "inputs": str(self.form),
            "outputs": [
                {"path": output.path, "dtype": output.dtype.name, "shape": list(output.shape)}
                for output in self.outputs
            ],
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        }


def digest(parts: Any) -> bytes:
    """Returns 16 bytes for what can be written as JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=SIZE).digest()
