"""What parent and child process say to each other: a JSON object, then raw arrays. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frame", "pack_frame", "read_frame"]

_MOST_HEADER = 64 << 20
_LENGTH = 8  # bytes of the length of the header

Frame = tuple[dict[str, Any], dict[str, NDArray[Any]]]


def pack_frame(message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """A message as pieces to be written one after another."""
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    described = {name: {"dtype": array.dtype.str, "shape": list(array.shape)} for name, array in held.items()}
    header = json.dumps({"message": dict(message), "arrays": described}).encode()
    bodies = [array.reshape(-1).view(np.uint8).data for array in held.values() if array.size]
    return [len(header).to_bytes(_LENGTH, "little"), header, *bodies]


def read_frame(take: Callable[[int], bytearray]) -> Frame:
    """A message.

    Args:
        take: gives so many bytes.

    Raises:
        ValueError: what comes is no message.
    """
    length = int.from_bytes(take(_LENGTH), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"a message of {length} bytes")
    header = json.loads(take(length))
    arrays = {}
    for name, form in header["arrays"].items():
        dtype, shape = np.dtype(form["dtype"]), [int(size) for size in form["shape"]]
        if dtype.kind not in "fiu":
            raise ValueError(f"an array of {dtype}")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        arrays[name] = np.frombuffer(take(size), dtype).reshape(shape)
    return header["message"], arrays
