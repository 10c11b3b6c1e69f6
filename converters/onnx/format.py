"""What the writer and the reader of an ONNX folder must agree on; docs/onnx.md describes it."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "ATTENTION_MASK",
    "CACHE_PREFIX",
    "CODES",
    "CODES_HIGH",
    "COLUMNS",
    "DATA_FILE",
    "EMBEDDING",
    "FORMAT",
    "INDICES_IN_SYMBOL",
    "INPUT_IDS",
    "INTERFACES",
    "KEY",
    "KEY_SCALE",
    "LOGITS",
    "LUT",
    "LUT_SCALE",
    "METADATA_PREFIX",
    "MODEL_FILE",
    "PARTS",
    "POSITION_IDS",
    "PRESENT_PREFIX",
    "PROFILES",
    "RECURRENCE",
    "TOKEN_TYPES",
    "TWO_PLANES",
    "VALUE",
    "VALUE_SCALE",
    "VECTORS",
    "StateName",
    "part_name",
    "past_name",
    "past_of_present",
    "present_name",
]

INTERFACES = ("decoder", "embedding")
"""What a graph computes: logits with a cache, or token vectors and one vector a text."""

PROFILES = ("exact", "low-memory", "fast")
"""Runtime profiles, by the names that the command line uses."""

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
"""The name that transformers.js looks for."""

METADATA_PREFIX = "edkm_export."
"""Of our keys in `metadata_props`."""

FORMAT = "1"
"""Version of these conventions."""

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
"""Inputs and output beside the cache, as optimum names them."""

TOKEN_TYPES, VECTORS, EMBEDDING = "token_type_ids", "last_hidden_state", "sentence_embedding"
"""Further input and the outputs of an embedding model, as optimum and transformers.js name them."""

CACHE_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""Of keys and values among inputs and outputs, as optimum names them."""

StateName: TypeAlias = Literal["key", "value", "key_scale", "value_scale", "conv", "recurrent"]
"""What a layer keeps: keys, values and, where they are int8, scales; last columns of a convolution; a recurrence."""

KEY: StateName = "key"
VALUE: StateName = "value"
KEY_SCALE: StateName = "key_scale"
VALUE_SCALE: StateName = "value_scale"
COLUMNS: StateName = "conv"
RECURRENCE: StateName = "recurrent"

CODES, CODES_HIGH, LUT, LUT_SCALE = PARTS = ("codes", "codes_high", "lut", "lut_scale")
"""Endings of the initializers of one palettized weight."""

INDICES_IN_SYMBOL = {1: 8, 2: 4, 3: 2, 4: 2, 6: 1, 8: 1}
"""Indices that are stored together, by bits of an index."""

TWO_PLANES = (3, 6)
"""Bits of an index whose symbols have 6 bits: they are stored as a plane of 4 bits and one of 2."""


def past_name(layer: int | str, what: StateName) -> str:
    """Input that holds a state of a layer; convolutions and recurrences as transformers.js names them."""
    return f"past_{what}.{layer}" if what in (COLUMNS, RECURRENCE) else f"{CACHE_PREFIX}{layer}.{what}"


def present_name(layer: int | str, what: StateName) -> str:
    """Output that gives a state of a layer."""
    return f"present_{what}.{layer}" if what in (COLUMNS, RECURRENCE) else f"{PRESENT_PREFIX}{layer}.{what}"


def past_of_present(name: str) -> str:
    """Input that takes what an output gives."""
    if name.startswith(PRESENT_PREFIX):
        return name.replace(PRESENT_PREFIX, CACHE_PREFIX, 1)
    return name.replace("present_", "past_", 1)


def part_name(name: str, part: str) -> str:
    """Initializer that holds one of `PARTS` of a palettized weight."""
    return f"{name}.{part}"
