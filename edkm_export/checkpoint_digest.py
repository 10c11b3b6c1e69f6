"""The sha256 of each part of a model.pt, by which damage is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked

__all__ = ["PARTS", "RECORD", "changed", "part_digests", "tensor_digest"]

RECORD = "sha256"
"""Key of the digests in the provenance."""

_TENSORS = ("palettized", "dense", "tokenizer")
_SETTINGS = ("config", "tied", "recipe", "provenance")
_OPTIONAL = ("embedding",)
PARTS = (*_TENSORS, *_SETTINGS)
"""What has a digest since format version 3; before, the first three had."""


def part_digests(contents: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each part of the contents of a model.pt; that of the provenance leaves the digests out."""
    return {part: _part_digest(contents, part) for part in (*PARTS, *_OPTIONAL) if part in contents}


def changed(contents: Mapping[str, Any], version: int) -> tuple[str, str, str] | None:
    """The first part that is not what was recorded.

    Args:
        contents: whose structure is as it should be.
        version: of the format, which says what has to be recorded; what is recorded beyond that has to fit, too.

    Returns:
        Part, digest found and digest recorded, which is empty where there is none; None: all are right.
    """
    recorded = contents["provenance"].get(RECORD)
    recorded = recorded if isinstance(recorded, dict) else {}
    needed = {*PARTS, *(part for part in _OPTIONAL if part in contents)} if version >= 3 else _TENSORS
    for part in (*PARTS, *_OPTIONAL):
        if part in needed or part in recorded:
            found = _part_digest(contents, part) if part in contents else ""
            if recorded.get(part) != found:
                return part, found, str(recorded.get(part) or "")
    return None


def _part_digest(contents: Mapping[str, Any], part: str) -> str:
    group = contents[part]
    if part in _TENSORS:
        return tensor_digest(group)
    if part == "provenance":
        group = {key: value for key, value in group.items() if key != RECORD}
    return hashlib.sha256(json.dumps(group, sort_keys=True).encode()).hexdigest()


def tensor_digest(group: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names.

    Args:
        group: {name: tensor, or dict of tensors and plain values}.
    """
    sha = hashlib.sha256()
    for name in tracked(sorted(group), "hashing", "tensors"):
        value = group[name]
        parts = value if isinstance(value, dict) else {"": value}
        for key in sorted(parts):
            part = parts[key]
            if isinstance(part, Tensor):
                sha.update(f"{name}/{key}/{part.dtype}/{list(part.shape)}\n".encode())
                sha.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                sha.update(f"{name}/{key}/{part}\n".encode())
    return sha.hexdigest()
