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
    "COLUMN_STATES",
    "DESCRIPTION_KEY",
    "EMBEDDING_TABLE",
    "EXTEND",
    "FORMAT",
    "GATHERED",
    "GATHER_EMBEDDINGS",
    "HASH_FILE",
    "INPUT_IDS",
    "INTERFACES",
    "IN_STEP",
    "KEY_CACHE",
    "KEY_SCALES",
    "LOAD_EMBEDDINGS",
    "LOGITS",
    "MAIN",
    "METADATA_FILE",
    "POSITION_IDS",
    "PROMPT",
    "QUERY_LENGTHS",
    "RECURRENT_STATES",
    "SHORTEST_CONTEXT",
    "STATIC_KEY_CACHE",
    "STATIC_LOGITS",
    "STATIC_VALUE_CACHE",
    "TOKENIZER_FOLDER",
    "TOKEN_IDS",
    "TRANSFORMER_INPUT",
    "VALUE_CACHE",
    "VALUE_SCALES",
    "Interface",
    "context_ladder",
    "dense_digest",
    "gather_name",
    "palette_digest",
    "step_name",
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

KEY_SCALES, VALUE_SCALES = "keyScales", "valueScales"
"""Further states where keys and values are int8; Apple's engine does not know them."""

COLUMN_STATES, RECURRENT_STATES = "convStates", "recurrentStates"
"""States of layers without attention, which do not grow: the last inputs of convolutions, and recurrences."""

STATIC_KEY_CACHE, STATIC_VALUE_CACHE = "key_cache", "value_cache"
TOKEN_IDS, TRANSFORMER_INPUT = "in_new_token_ids", "transformer_input"
IN_STEP, CAUSAL_MASK, EMBEDDING_TABLE = "in_step", "causal_mask", "embedding_table"
GATHERED, STATIC_LOGITS = "out_transformer_input", "out_logits"
"""States, inputs and outputs of the static engine."""

LOAD_EMBEDDINGS, GATHER_EMBEDDINGS, EXTEND, PROMPT = (
    "load_embeddings",
    "gather_embeddings",
    "extend",
    "prompt_opt",
)
"""Functions of the static engine; all but the first are followed by the shapes that they are for."""

QUERY_LENGTHS = (8, 16, 64)
"""Tokens of one call of the static engine, as apple/coreai-models exports them."""

SHORTEST_CONTEXT = 256
"""Of the static engine's caches, which double from here."""


def context_ladder(context: int) -> list[int]:
    """Cache lengths of the static engine's functions, up to a context."""
    lengths, length = [], SHORTEST_CONTEXT
    while length <= context:
        lengths.append(length)
        length *= 2
    return lengths


def gather_name(tokens: int) -> str:
    """Function that looks up the embeddings of so many tokens."""
    return f"{GATHER_EMBEDDINGS}_{tokens}"


def step_name(function: str, context: int, tokens: int) -> str:
    """Function EXTEND or PROMPT for a cache length and so many tokens."""
    return f"{function}_{context}_{tokens}"


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
