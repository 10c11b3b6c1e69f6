"""Tensors of a graph, from the file itself or from external data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.read.external import ExternalData, Location
from edkm_export.errors import PackageError

__all__ = ["DTYPES", "MAX_DIMENSION", "MAX_RANK", "read_tensor"]

MAX_DIMENSION = 1 << 31
"""Sizes from here on are taken for damage: no weight has two billion rows."""

MAX_RANK = 8

_EXTERNAL = 1  # TensorProto.DataLocation

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    4: np.dtype("<u2"),
    5: np.dtype("<i2"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    12: np.dtype("<u4"),
    13: np.dtype("<u8"),
}
"""By TensorProto.DataType. Sub-byte types and bfloat16 are in no graph of ours."""

# The typed field that holds the values when they are not raw (onnx.proto, TensorProto).
_FIELDS = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_INT32_FIELD = "int32_data"


def read_tensor(proto: Any, external: ExternalData, where: str) -> NDArray[Any]:
    """Read a TensorProto.

    Args:
        proto: the message.
        external: files of the model.
        where: the tensor, for messages.

    Returns:
        Array of the declared type and shape; read-only, external data is not copied.

    Raises:
        PackageError: type, shape and data do not fit together.
    """
    if proto.data_type not in DTYPES:
        raise PackageError(f"{where}: data type {proto.data_type} is not in graphs of this exporter.")
    dtype = DTYPES[proto.data_type]
    shape = tuple(proto.dims)
    if len(shape) > MAX_RANK or any(not 0 <= size < MAX_DIMENSION for size in shape):
        raise PackageError(f"{where}: shape {_short(shape)} is absurd.")
    count = math.prod(shape)  # whether the data has as many is checked before anything is allocated
    if proto.HasField("segment"):
        raise PackageError(f"{where}: is a segment of a tensor; not understood.")
    size_bytes = count * dtype.itemsize
    if proto.data_location == _EXTERNAL:
        if proto.HasField("raw_data") or _typed_count(proto):
            raise PackageError(f"{where}: has its data inside and outside of the model at once.")
        entries = [(entry.key, entry.value) for entry in proto.external_data]
        stored = external.claim(Location.parse(entries, where), size_bytes, where)
    elif len(proto.external_data):
        raise PackageError(f"{where}: names external data, but says that it has none.")
    else:
        stored = _inline(proto, dtype, count, where)
    if dtype.kind == "b" and count and int(stored.max()) > 1:
        raise PackageError(f"{where}: holds a boolean that is neither 0 nor 1.")
    return stored.view(dtype).reshape(shape)


def _inline(proto: Any, dtype: np.dtype[Any], count: int, where: str) -> NDArray[np.uint8]:
    """The bytes of a tensor inside the model, uint8 [count * itemsize]."""
    if proto.HasField("raw_data"):
        if _typed_count(proto):
            raise PackageError(f"{where}: has its data twice.")
        raw = np.frombuffer(proto.raw_data, np.uint8)
    else:
        field = _FIELDS.get(proto.data_type, _INT32_FIELD)
        values = getattr(proto, field)
        if len(values) != _typed_count(proto):
            raise PackageError(f"{where}: has data in a field that is not that of its type.")
        if len(values) != count:
            raise PackageError(f"{where}: has {len(values)} values, but its shape needs {count}.")
        wide = np.array(values, np.int32 if field == _INT32_FIELD else DTYPES[proto.data_type])
        if field == _INT32_FIELD:  # float16 is held as its bit pattern
            narrow = wide.astype(np.uint16 if dtype == np.float16 else dtype)
            if not np.array_equal(narrow.astype(np.int32), wide):
                raise PackageError(f"{where}: holds a value beyond its type.")
            wide = narrow
        raw = np.ascontiguousarray(wide).view(np.uint8).reshape(-1)
    if len(raw) != count * dtype.itemsize:
        raise PackageError(
            f"{where}: has {len(raw)} bytes, but its type and shape need {count * dtype.itemsize}."
        )
    return raw


def _typed_count(proto: Any) -> int:
    fields = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
    return sum(len(getattr(proto, field)) for field in fields)


def _short(shape: tuple[int, ...]) -> str:
    return str(list(shape[:8])) + (f" and {len(shape) - 8} more axes" if len(shape) > 8 else "")
