"""weight.bin: our reader against coremltools' own writer and reader, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil.mil import types
from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.coreml.read.blob import BlobFile
from converters.coreml.read.values import DTYPES, DType, decode_bytes
from edkm_export.errors import PackageError

BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
# name of our dtype -> (suffix of the methods of coremltools, lowest value, one beyond the highest)
KINDS = {
    "float16": ("fp16", -100, 100),
    "float32": ("float", -100, 100),
    "int8": ("int8", -128, 128),
    "uint8": ("uint8", 0, 256),
    "int16": ("int16", -(2**15), 2**15),
    "uint16": ("uint16", 0, 2**16),
    "int32": ("int32", -(2**31), 2**31),
    "uint32": ("uint32", 0, 2**32),
    "int4": ("int4", -8, 8),
    "uint1": ("uint1", 0, 2),
    "uint2": ("uint2", 0, 4),
    "uint3": ("uint3", 0, 8),
    "uint4": ("uint4", 0, 16),
    "uint6": ("uint6", 0, 64),
}
COUNT = 35  # odd: leaves padding bits at every width below a byte


def _values(name: str) -> np.ndarray:
    _, low, high = KINDS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    if name.startswith("float"):
        return rng.standard_normal(COUNT).astype(name)
    values = rng.integers(low, high, COUNT)
    values[:2] = low, high - 1
    return values.astype(name if BY_NAME[name].bits >= 8 else ("int8" if name == "int4" else "uint8"))


def _write(path: Path, name: str, values: np.ndarray) -> int:
    write = getattr(_BlobStorageWriter(str(path)), f"write_{KINDS[name][0]}_data")
    if name == "float16":
        values = values.view(np.uint16)
    elif BY_NAME[name].bits < 8:
        values = values.astype(types.nptype_from_builtin(types.string_to_builtin(name)))
    return int(write(values))


def _read(path: Path, offset: int, dtype: DType, count: int = COUNT) -> np.ndarray:
    assert dtype.blob_code is not None
    data = BlobFile(path).read(offset, "w", dtype_code=dtype.blob_code, bits=dtype.bits, count=count)
    return decode_bytes(data, dtype, (count,), "w").numpy()


@pytest.mark.parametrize("name", KINDS)
def test_reads_what_coremltools_writes(name: str, tmp_path: Path) -> None:
    path, values = tmp_path / "weight.bin", _values(name)
    offset = _write(path, name, values)
    found = _read(path, offset, BY_NAME[name])
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()
    theirs = getattr(_BlobStorageReader(str(path)), f"read_{KINDS[name][0]}_data")(offset)
    assert (
        np.asarray(theirs).astype(values.dtype if name != "float16" else theirs.dtype).tobytes()
        == found.tobytes()
    )


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4, 6]), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_sub_byte_streams_against_numpy(bits: int, count: int, seed: int, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("stream") / "weight.bin"
    values = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    offset = _write(path, f"uint{bits}", values)
    raw = BlobFile(path).read(
        offset, "w", dtype_code=BY_NAME[f"uint{bits}"].blob_code, bits=bits, count=count
    )
    stream = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    assert np.array_equal(stream @ (1 << np.arange(bits)), values)
    assert np.array_equal(_read(path, offset, BY_NAME[f"uint{bits}"], count), values)


def test_dtype_codes_are_distinct_and_complete() -> None:
    codes = {dtype.name: dtype.blob_code for dtype in DTYPES.values() if dtype.blob_code is not None}
    assert len(set(codes.values())) == len(codes)
    assert set(codes) == {*KINDS, "bfloat16"}  # coremltools has no writer for bfloat16


RECORD = struct.Struct("<IIQQQ")


@pytest.fixture
def uint3(tmp_path: Path) -> tuple[Path, int]:
    """A blob file with one record of 35 values of 3 bits, 14 bytes and 7 bits of padding, and zeros behind."""
    path = tmp_path / "weight.bin"
    offset = _write(path, "uint3", _values("uint3"))
    path.write_bytes(path.read_bytes() + bytes(100))
    return path, offset


def _patch(path: Path, offset: int, **fields: int) -> None:
    data = bytearray(path.read_bytes())
    names = ("sentinel", "dtype", "size", "start", "padding")
    record = dict(zip(names, RECORD.unpack_from(data, offset), strict=True)) | fields
    RECORD.pack_into(data, offset, *record.values())
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sentinel": 0xDEADBEE0}, "sentinel is 0xDEADBEE0"),
        ({"dtype": 11}, "dtype code is 11"),
        ({"dtype": 4_000_000_000}, "dtype code is 4000000000"),
        ({"size": 15}, "size in bytes is 15"),
        ({"size": 13}, "size in bytes is 13"),
        ({"size": 2**63}, "9223372036854775808 bytes at data offset 128 reach beyond"),
        ({"size": 2**64 - 1}, "18446744073709551615 bytes at data offset 128 reach beyond"),
        ({"start": 130}, "data offset 130 is not a multiple of 64"),
        ({"start": 0}, "data offset 0 overlaps the header"),
        ({"start": 64}, "data offset 64 overlaps the header or its own record"),
        ({"start": 2**20}, "14 bytes at data offset 1048576 reach beyond"),
        ({"start": 2**64 - 64}, "reach beyond the end"),
        ({"padding": 0}, "padding bits is 0"),
        ({"padding": 2**40}, "padding bits is 1099511627776"),
    ],
    ids=str,
)
def test_damaged_record(fields: dict[str, int], message: str, uint3: tuple[Path, int]) -> None:
    path, offset = uint3
    _patch(path, offset, **fields)
    with pytest.raises(PackageError) as caught:
        _read(path, offset, BY_NAME["uint3"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert ": w: " in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "record offset 0 is inside"),
        (65, "record offset 65 is not a multiple of 64"),
        (128, "sentinel is"),
        (192, "record offset 192 is beyond"),
        (256, "record offset 256 is beyond"),
        (2**40, "record offset 1099511627776 is beyond"),
        (2**64 - 64, "is beyond the end"),
    ],
)
def test_bad_record_offset(offset: int, message: str, uint3: tuple[Path, int]) -> None:
    with pytest.raises(PackageError, match=message):
        _read(uint3[0], offset, BY_NAME["uint3"])


def test_set_padding_bits(uint3: tuple[Path, int]) -> None:
    path, offset = uint3
    data = bytearray(path.read_bytes())
    data[128 + 13] |= 0x80
    path.write_bytes(data)
    with pytest.raises(PackageError, match="padding bits at the end of the index stream are not zero"):
        _read(path, offset, BY_NAME["uint3"])


@pytest.mark.parametrize("length", [0, 1, 63])
def test_file_shorter_than_its_header(length: int, uint3: tuple[Path, int]) -> None:
    path, _ = uint3
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PackageError, match=f"{length} bytes, shorter than the 64-byte header"):
        BlobFile(path)


def test_every_truncation_is_noticed(uint3: tuple[Path, int]) -> None:
    path, offset = uint3
    whole = path.read_bytes()
    for length in range(64, 128 + 14):
        path.write_bytes(whole[:length])
        with pytest.raises(PackageError, match="beyond the end of the file"):
            _read(path, offset, BY_NAME["uint3"])


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 127), value=st.integers(0, 255))
def test_any_byte_of_the_metadata(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One byte changed: an error of ours or the right values, never anything else."""
    path = tmp_path_factory.mktemp("fuzz") / "weight.bin"
    offset = _write(path, "uint3", _values("uint3"))
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        found = _read(path, offset, BY_NAME["uint3"])
    except PackageError:
        return
    assert np.array_equal(found, _values("uint3"))


def test_version(uint3: tuple[Path, int]) -> None:
    path, _ = uint3
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 4, 3)
    path.write_bytes(data)
    with pytest.raises(PackageError, match="blob file version 3, expected 2"):
        BlobFile(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot be read"):
        BlobFile(tmp_path / "weight.bin")
