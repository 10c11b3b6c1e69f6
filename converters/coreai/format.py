"""What the writer and the reader of a Core AI model must agree on; docs/coreai.md describes it.

Names of functions, inputs, outputs and states are those of apple/coreai-models, whose Swift engines look for them.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias, get_args

__all__ = [
    "ASSET_SUFFIX",
    "BUNDLE_VERSION",
    "BYTECODE_FILE",
    "CAUSAL_MASK",
    "DESCRIPTION_KEY",
    "EMBEDDING_TABLE",
    "FORMAT",
    "HASH_FILE",
    "INPUT_IDS",
    "INTERFACES",
    "IN_STEP",
    "KEY_CACHE",
    "LOGITS",
    "MAIN",
    "METADATA_FILE",
    "POSITION_IDS",
    "STATIC_KEY_CACHE",
    "STATIC_VALUE_CACHE",
    "TOKENIZER_FOLDER",
    "VALUE_CACHE",
    "Interface",
    "dense_digest",
    "palette_digest",
]

Interface: TypeAlias = Literal["dynamic", "neural-engine"]
INTERFACES: tuple[Interface, ...] = get_args(Interface)
"""Which of Apple's engines runs the model; docs/coreai.md describes each."""

ASSET_SUFFIX = ".aimodel"
BYTECODE_FILE, HASH_FILE, METADATA_FILE = "main.mlirb", "main.hash", "metadata.json"
"""Files of an asset."""

BUNDLE_VERSION = "0.2"
"""Of the metadata.json beside the asset."""

TOKENIZER_FOLDER = "tokenizer"
"""Beside it."""

DESCRIPTION_KEY = "edkm_export"
"""Our entry in the custom metadata of an asset."""

FORMAT = 1
"""Version of that entry."""

MAIN = "main"
INPUT_IDS, POSITION_IDS, LOGITS = "input_ids", "position_ids", "logits"
KEY_CACHE, VALUE_CACHE = "keyCache", "valueCache"
"""Function, inputs, output and states of the dynamic engine."""

STATIC_KEY_CACHE, STATIC_VALUE_CACHE = "key_cache", "value_cache"
IN_STEP, CAUSAL_MASK, EMBEDDING_TABLE = "in_step", "causal_mask", "embedding_table"
"""States and further inputs of the static engine."""


def palette_digest(
    n_bits: int, index_shape: tuple[int, int], indices: bytes, lut: Any, scale: Any | None
) -> str:
    """SHA-256 of a palette as it is stored, by which the reader tells weights apart.

    Args:
        n_bits: of a stored index.
        index_shape: (out / dim, in).
        indices: packed.
        lut: array [G_out, G_in, 2**n_bits, dim].
        scale: array [G_out, G_in], or None.
    """
    digest = hashlib.sha256(f"{n_bits} {list(index_shape)} {list(lut.shape)} {lut.dtype}".encode())
    digest.update(indices)
    digest.update(lut.tobytes())
    digest.update(b"" if scale is None else scale.tobytes())
    return digest.hexdigest()


def dense_digest(values: bytes) -> str:
    """SHA-256 of the float16 values of a weight that is not palettized."""
    return hashlib.sha256(values).hexdigest()
