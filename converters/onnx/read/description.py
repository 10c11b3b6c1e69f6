"""What an exported graph says about itself in `metadata_props`; docs/onnx.md lists the keys.

Everything here is a claim of the file. Names and shapes that come from it are checked against the graph by whoever
uses them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from converters.onnx.format import FORMAT, INTERFACES, METADATA_PREFIX, PROFILES
from converters.onnx.read.tensors import MAX_DIMENSION
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.errors import PackageError
from edkm_export.kv_cache import FLOAT, INT8, KV_CACHES, KVCache
from edkm_export.packing import SUPPORTED_BITS

__all__ = ["Description", "read_description"]


@dataclass(frozen=True)
class Description:
    """The metadata of an exported graph.

    Attributes:
        profile: "exact", "low-memory" or "fast".
        context: positions that its tables hold.
        palettized: {parameter: (dense shape, bits of an index)}.
        dense: {parameter: shape}.
        tied: {alias: parameter that is stored}.
        interface: "decoder" or "embedding"; older files have no such key and are decoders.
        embedding: what an embedding model says of its pooling and prompts; None: nothing, or it is none.
        pads_left: an embedding model whose embeddings do not change with padding on the left.
        kv_cache: how keys and values are held; files that do not say it hold floats.
    """

    profile: str
    context: int
    palettized: Mapping[str, tuple[tuple[int, ...], int]]
    dense: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    interface: str = INTERFACES[0]
    embedding: EmbeddingSettings | None = None
    pads_left: bool = False
    kv_cache: KVCache = FLOAT


def read_description(metadata: Mapping[str, str], path: Path) -> Description:
    """Parse and check the metadata.

    Raises:
        PackageError: a key is missing or its value makes no sense.
    """
    found = metadata.get(f"{METADATA_PREFIX}format")
    if found != FORMAT:
        raise PackageError(
            f"{path}: {METADATA_PREFIX}format is {found!r}, expected {FORMAT!r}; export it with this release."
        )
    profile, context = (
        metadata.get(f"{METADATA_PREFIX}runtime"),
        metadata.get(f"{METADATA_PREFIX}context_length", ""),
    )
    if profile not in PROFILES:
        raise PackageError(
            f"{path}: {METADATA_PREFIX}runtime is {profile!r}, expected one of {', '.join(PROFILES)}."
        )
    if not (context.isascii() and context.isdigit() and 0 < len(context) < 10 and int(context) > 0):
        raise PackageError(
            f"{path}: {METADATA_PREFIX}context_length is {context[:40]!r}, expected a number of positions."
        )
    palettized = {}
    for name, value in _object(metadata, "palettized", path).items():
        shape = _shape(value.get("shape") if isinstance(value, dict) else None, name, path, rank=2)
        n_bits = value.get("n_bits")
        if n_bits not in SUPPORTED_BITS or type(n_bits) is not int:
            raise PackageError(f"{path}: {name}: its metadata says {n_bits!r} bits.")
        palettized[name] = (shape, n_bits)
    tied = _object(metadata, "tied", path)
    for alias, name in tied.items():
        if not isinstance(name, str):
            raise PackageError(f"{path}: {alias}: its metadata says that it is tied to {name!r:.60}.")
    interface = metadata.get(f"{METADATA_PREFIX}interface", INTERFACES[0])
    if interface not in INTERFACES:
        raise PackageError(
            f"{path}: {METADATA_PREFIX}interface is {interface!r}, expected one of {', '.join(INTERFACES)}."
        )
    kv_cache = metadata.get(f"{METADATA_PREFIX}kv_cache", FLOAT)
    if kv_cache not in KV_CACHES:
        raise PackageError(
            f"{path}: {METADATA_PREFIX}kv_cache is {kv_cache!r:.60}, expected one of {', '.join(KV_CACHES)}."
        )
    return Description(
        interface=interface,
        kv_cache=INT8 if kv_cache == INT8 else FLOAT,
        embedding=_embedding(metadata, path) if interface == "embedding" else None,
        pads_left=metadata.get(f"{METADATA_PREFIX}padding") == "either",
        profile=profile,
        context=int(context),
        palettized=palettized,
        dense={name: _shape(value, name, path) for name, value in _object(metadata, "dense", path).items()},
        tied=tied,
    )


def _embedding(metadata: Mapping[str, str], path: Path) -> EmbeddingSettings:
    try:
        return EmbeddingSettings.model_validate(_object(metadata, "embedding", path))
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise PackageError(
            f"{path}: metadata {METADATA_PREFIX}embedding: {where}: {detail['msg']}."
        ) from error


def _object(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(METADATA_PREFIX + key, ""))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path}: metadata {METADATA_PREFIX}{key} is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise PackageError(f"{path}: metadata {METADATA_PREFIX}{key} is no object.")
    return value


def _shape(value: Any, name: str, path: Path, rank: int = 0) -> tuple[int, ...]:
    """A shape of at least `rank` axes."""
    plain = isinstance(value, list) and all(type(size) is int and 0 < size < MAX_DIMENSION for size in value)
    if not plain or not rank <= len(value) <= 8 or math.prod(value) >= MAX_DIMENSION * 8:
        raise PackageError(f"{path}: {name}: its metadata says that its shape is {value!r:.80}.")
    return tuple(value)
