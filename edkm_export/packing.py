"""b-bit little-endian bit streams.

The checkpoint, Core ML's weight.bin and the codes of an ONNX graph all hold indices in this one form: value i
occupies the bits [i * n_bits, (i + 1) * n_bits) of the stream, least significant bit first, so that 3- and
6-bit values straddle byte borders. The last byte is padded with zero bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edkm_export.errors import PaletteError

__all__ = ["SUPPORTED_BITS", "pack", "packed_size_bytes", "padding_bits", "unpack"]

SUPPORTED_BITS = (1, 2, 3, 4, 6, 8)

# Values are handled in blocks of a whole number of bytes, to bound the temporaries.
_BLOCK = 1 << 22


def _check_bits(n_bits: int) -> None:
    if n_bits not in SUPPORTED_BITS:
        raise PaletteError(
            f"n_bits is {n_bits}; no deployment target can hold that. Use one of {', '.join(map(str, SUPPORTED_BITS))}."
        )


def packed_size_bytes(count: int, n_bits: int) -> int:
    """Bytes that `count` values of `n_bits` take."""
    _check_bits(n_bits)
    return (count * n_bits + 7) // 8


def padding_bits(count: int, n_bits: int) -> int:
    """Unused bits at the end of the last byte of a stream of `count` values."""
    return packed_size_bytes(count, n_bits) * 8 - count * n_bits


def pack(values: Tensor, n_bits: int) -> Tensor:
    """Pack values into a bit stream, least significant bit first.

    Args:
        values: uint8, any shape, row-major; each below 2**n_bits. They are packed on the device where they are.
        n_bits: one of 1, 2, 3, 4, 6, 8.

    Returns:
        uint8 [packed_size_bytes(values.numel(), n_bits)], on the CPU.

    Raises:
        PaletteError: unsupported n_bits, or a value that does not fit.
    """
    _check_bits(n_bits)
    if values.dtype != torch.uint8:
        raise PaletteError(f"indices are {values.dtype}, expected torch.uint8.")
    flat = values.detach().reshape(-1)
    if n_bits == 8:
        return flat.to("cpu", copy=True)
    if flat.numel() and int(flat.max()) >= 1 << n_bits:
        raise PaletteError(
            f"index {int(flat.max())} is beyond the {1 << n_bits} entries of a {n_bits}-bit LUT."
        )
    out = torch.empty(packed_size_bytes(flat.numel(), n_bits), dtype=torch.uint8)
    per_unit, unit_bytes = _unit(n_bits)
    for start in range(0, flat.numel(), _BLOCK * per_unit):
        block = flat[start : start + _BLOCK * per_unit]
        packed = _pack_block(block, n_bits)
        first = start // per_unit * unit_bytes
        out[first : first + packed.numel()] = packed.cpu()
    return out


def unpack(stream: Tensor, n_bits: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        stream: uint8 [packed_size_bytes(count, n_bits)], padding bits zero.
        n_bits: one of 1, 2, 3, 4, 6, 8.
        count: number of values in the stream.

    Returns:
        uint8 [count].

    Raises:
        PaletteError: unsupported n_bits, wrong length, or padding bits that are set.
    """
    _check_bits(n_bits)
    expected = packed_size_bytes(count, n_bits)
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() != expected:
        raise PaletteError(
            f"a stream of {count} {n_bits}-bit indices takes {expected} bytes of uint8, "
            f"found {stream.numel()} of {stream.dtype}."
        )
    pad = padding_bits(count, n_bits)
    if pad and int(stream[-1]) >> (8 - pad):
        raise PaletteError(
            f"the {pad} padding bits at the end of the index stream are not zero: it is damaged."
        )
    if n_bits == 8:
        return stream.clone()
    out = torch.empty(count, dtype=torch.uint8)
    per_unit, unit_bytes = _unit(n_bits)
    for start in range(0, count, _BLOCK * per_unit):
        stop = min(start + _BLOCK * per_unit, count)
        first = start // per_unit * unit_bytes
        out[start:stop] = _unpack_block(
            stream[first : first + packed_size_bytes(stop - start, n_bits)], n_bits
        )[: stop - start]
    return out


def _unit(n_bits: int) -> tuple[int, int]:
    """Smallest number of values that fills whole bytes, and those bytes."""
    return {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3)}[n_bits]


def _pack_block(values: Tensor, n_bits: int) -> Tensor:
    per_unit, unit_bytes = _unit(n_bits)
    short = -values.numel() % per_unit
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    lanes = padded.view(-1, per_unit)  # [units, per_unit]
    out = torch.zeros(lanes.shape[0], unit_bytes, dtype=torch.uint8, device=values.device)
    for lane in range(per_unit):
        byte, shift = divmod(lane * n_bits, 8)
        out[:, byte] |= lanes[:, lane] << shift
        if shift + n_bits > 8:
            out[:, byte + 1] |= lanes[:, lane] >> (8 - shift)
    return out.view(-1)[: packed_size_bytes(values.numel(), n_bits)]


def _unpack_block(stream: Tensor, n_bits: int) -> Tensor:
    """Look up 8 bits at a time, or 12 where values straddle bytes: far faster than shifting each value out."""
    octets = stream.numpy()
    if n_bits in (1, 2, 4):
        words = octets
    else:
        octets = np.pad(octets, (0, -len(octets) % 3)).reshape(-1, 3)
        words = np.empty((len(octets), 2), np.uint16)
        words[:, 0] = octets[:, 0] | (octets[:, 1] & 15).astype(np.uint16) << 8
        words[:, 1] = octets[:, 1] >> 4 | octets[:, 2].astype(np.uint16) << 4
    return torch.from_numpy(_table(n_bits)[words.reshape(-1)].view(np.uint8))


@functools.cache
def _table(n_bits: int) -> NDArray[Any]:
    """The values in each word of 8 or 12 bits, side by side in one integer of as many bytes."""
    width = 8 if n_bits in (1, 2, 4) else 12
    words = np.arange(1 << width, dtype=np.uint16)[:, None]
    values = (words >> np.arange(0, width, n_bits, dtype=np.uint16)) & ((1 << n_bits) - 1)
    return values.astype(np.uint8).view(f"u{width // n_bits}").reshape(-1)
