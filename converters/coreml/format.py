"""What writer and reader of a Core ML package must agree on: names of interfaces, states, metadata."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

__all__ = [
    "COLUMN_CACHE",
    "COUNT",
    "DECODE",
    "EMBEDDING",
    "EMBEDDING_KEY",
    "HIDDEN_IN",
    "HIDDEN_OUT",
    "INTERFACES",
    "KEY_CACHE",
    "LOGITS",
    "MASK",
    "METADATA_PREFIX",
    "PARAMETERS_KEY",
    "POSITION",
    "PREFILL",
    "RECURRENCE_CACHE",
    "REMAINDER_CACHE",
    "ROW_PART",
    "SPLIT_KEY",
    "STATES",
    "TEXT",
    "TEXT_MASK",
    "TOKENS",
    "VALUE_CACHE",
    "Interface",
    "row_part",
]

Interface: TypeAlias = Literal["swift-transformers", "neural-engine", "logits", "embedding"]
INTERFACES: tuple[Interface, ...] = get_args(Interface)
"""How an app calls a package; docs/coreml.md describes each."""

KEY_CACHE, VALUE_CACHE = "keyCache", "valueCache"
"""Names of the states of attention, as swift-transformers looks for them."""

COLUMN_CACHE, RECURRENCE_CACHE, REMAINDER_CACHE = "convolutionCache", "recurrenceCache", "recurrenceRemainder"
"""States of layers without attention: the last inputs of a convolution, and a recurrence as the sum of two."""

STATES = (KEY_CACHE, VALUE_CACHE, COLUMN_CACHE, RECURRENCE_CACHE, REMAINDER_CACHE)

TOKENS, MASK, POSITION, LOGITS = "inputIds", "fullAttentionMask", "position", "logits"
"""Inputs and output of an interface with cache, as swift-transformers names them; the position is our own."""

TEXT = "input_ids"
"""Input of the interfaces without cache: the whole text, padded."""

TEXT_MASK, EMBEDDING = "attention_mask", "sentence_embedding"
"""Further input and output of an embedding model: 1 for a token, 0 for padding; and one vector."""

COUNT = "tokenCount"
"""Input of a prefill function whose states padding must not enter: how many of its tokens are real."""

PREFILL, DECODE = "prefill", "decode"
"""Functions of the interface for the Neural Engine."""

HIDDEN_IN, HIDDEN_OUT = "hiddenStates", "hiddenStatesOut"
"""What one chunk hands to the next: the output of the one is the input of the other."""

METADATA_PREFIX = "com.github.edkm-export."
"""Of our keys in the user-defined metadata of a package."""

PARAMETERS_KEY = f"{METADATA_PREFIX}parameters"
"""JSON {name of the output of the op that decodes a weight: name of the parameter}."""

EMBEDDING_KEY = f"{METADATA_PREFIX}embedding"
"""JSON of the settings of an embedding model: pooling, prompts, longest text."""

SPLIT_KEY = f"{METADATA_PREFIX}split"
"""JSON {name of a weight that is held in parts of rows: number of its LUT groups of rows}."""

ROW_PART = re.compile(r"(?P<name>.+)_rows_(?P<start>\d+)_(?P<end>\d+)")
"""Name of a part of rows of a weight."""


def row_part(name: str, start: int, end: int) -> str:
    """Name of the rows `start` to `end`, exclusive, of a weight."""
    return f"{name}_rows_{start}_{end}"
