"""Embedding and output head that were written in parts of rows, as one weight again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from converters.coreml.format import ROW_PART, SPLIT_KEY
from edkm_export.errors import PackageError, PaletteError
from edkm_export.palette import PalettizedTensor

__all__ = ["joined_dense", "joined_palettes", "read_splits"]


def read_splits(metadata: Mapping[str, str], where: str) -> dict[str, int]:
    """{weight that is held in parts: its LUT groups}, from the user-defined metadata.

    Raises:
        PackageError: the entry is not a JSON object of positive integers.
    """
    try:
        splits = json.loads(metadata.get(SPLIT_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{where}: metadata {SPLIT_KEY} is not JSON: {error}.") from error
    if not isinstance(splits, dict) or not all(type(count) is int and count > 0 for count in splits.values()):
        raise PackageError(f"{where}: metadata {SPLIT_KEY} is {splits!r}, expected an object of counts.")
    return splits


def joined_palettes(
    palettized: Mapping[str, PalettizedTensor], splits: Mapping[str, int], where: str
) -> dict[str, PalettizedTensor]:
    """Palettes as read from disk, with parts joined to the weights that they were cut from.

    Raises:
        PackageError: the parts do not make a weight.
    """
    found, parts = _sorted_parts(palettized, splits)
    for name, pieces in parts.items():
        _check_rows(name, [(start, end, tensor.shape[0]) for start, end, tensor in pieces], where)
        tensors = [tensor for _, _, tensor in pieces]
        whole = splits[name] == 1
        if whole and any(not _same_tables(tensors[0], other) for other in tensors):
            raise PackageError(
                f"{where}: {name}: its parts have different LUTs, but it was cut from one LUT."
            )
        tables = tensors[:1] if whole else tensors
        scales = [tensor.lut_scale for tensor in tables if tensor.lut_scale is not None]
        try:
            found[name] = PalettizedTensor.from_indices(
                name,
                torch.cat([tensor.lut for tensor in tables]),
                torch.cat([tensor.unpack_indices() for tensor in tensors]),
                shape=(sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]),
                lut_scale=torch.cat(scales) if scales else None,
            )
        except (PaletteError, RuntimeError) as error:
            raise PackageError(f"{where}: {name}: its parts do not fit together: {error}") from error
    return found


def joined_dense(dense: Mapping[str, Tensor], splits: Mapping[str, int], where: str) -> dict[str, Tensor]:
    """Dense constants as read from disk, with parts joined.

    Raises:
        PackageError: the parts do not make a weight.
    """
    found, parts = _sorted_parts(dense, splits)
    for name, pieces in parts.items():
        _check_rows(name, [(start, end, tensor.shape[0]) for start, end, tensor in pieces], where)
        found[name] = torch.cat([tensor for _, _, tensor in pieces])
    return found


_T = TypeVar("_T", PalettizedTensor, Tensor)


def _sorted_parts(
    weights: Mapping[str, _T], splits: Mapping[str, int]
) -> tuple[dict[str, _T], dict[str, list[tuple[int, int, _T]]]]:
    """Whole weights, and the parts of each split one in the order of their rows."""
    whole: dict[str, _T] = {}
    parts: dict[str, list[tuple[int, int, _T]]] = {}
    for name, weight in weights.items():
        match = ROW_PART.fullmatch(name)
        if match is None or match["name"] not in splits:
            whole[name] = weight
        else:
            parts.setdefault(match["name"], []).append((int(match["start"]), int(match["end"]), weight))
    return whole, {name: sorted(pieces, key=lambda piece: piece[0]) for name, pieces in parts.items()}


def _check_rows(name: str, spans: Sequence[tuple[int, int, int]], where: str) -> None:
    expected = 0
    for start, end, rows in spans:
        if start != expected or end - start != rows:
            raise PackageError(
                f"{where}: {name}: a part of {rows} rows is said to hold rows {start} to {end}, "
                f"expected from {expected}."
            )
        expected = end


def _same_tables(first: PalettizedTensor, other: PalettizedTensor) -> bool:
    """True when LUTs and scales are equal bit for bit."""
    pairs = [(first.lut, other.lut)]
    if first.lut_scale is not None and other.lut_scale is not None:
        pairs.append((first.lut_scale, other.lut_scale))
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in pairs
    )
