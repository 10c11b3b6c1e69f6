"""Whether a program has the functions, inputs, states and outputs that one of Apple's engines demands.

The demands are those of `swift/Sources/CoreAILanguageModels/InferenceEngines` in apple/coreai-models, commit 86b363d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from converters.coreai.format import (
    CAUSAL_MASK,
    COLUMN_STATES,
    EMBEDDING_TABLE,
    EXTEND,
    GATHERED,
    IN_STEP,
    INPUT_IDS,
    KEY_CACHE,
    KEY_SCALES,
    LOAD_EMBEDDINGS,
    LOGITS,
    MAIN,
    POSITION_IDS,
    PROMPT,
    QUERY_LENGTHS,
    RECURRENT_STATES,
    STATIC_KEY_CACHE,
    STATIC_LOGITS,
    STATIC_VALUE_CACHE,
    TOKEN_IDS,
    TRANSFORMER_INPUT,
    VALUE_CACHE,
    VALUE_SCALES,
    context_ladder,
    gather_name,
    step_name,
)
from converters.coreai.read.description import Description
from converters.coreai.read.element_types import TensorType
from converters.coreai.read.program import Function, Program
from edkm_export.errors import PackageError
from edkm_export.kv_cache import INT8

__all__ = ["check_interface"]

_MOST_STATE_ROW = 1 << 24  # elements of a state for each position
_MOST_FIXED = 1 << 30  # elements of a state that does not grow; real ones have some ten millions


def check_interface(program: Program, description: Description) -> None:
    """Check the program against the engine that its description names.

    Raises:
        PackageError: a function is missing, or has other inputs, states or outputs.
    """
    if description.interface == "dynamic":
        _check_dynamic(program, description)
    else:
        _check_static(program, description)


def _check_dynamic(program: Program, description: Description) -> None:
    """`CoreAISequentialEngine` takes inputs and output by their place, and asks for float16 logits."""
    function = _function(program, MAIN)
    anything = TensorType("int32", (1, None))
    _same(function, "inputs", function.inputs, {INPUT_IDS: anything, POSITION_IDS: anything})
    logits = TensorType("float16", (1, None, description.vocab_size))
    _same(function, "outputs", function.outputs, {LOGITS: logits})
    others = [name for name in (COLUMN_STATES, RECURRENT_STATES) if name in function.states]
    coded = description.kv_cache == INT8
    growing = [KEY_CACHE, VALUE_CACHE, *([KEY_SCALES, VALUE_SCALES] if coded else [])]
    if list(function.states) != [*growing, *others]:
        raise PackageError(
            f"function {MAIN} has states {_words(function.states)}; expected {' and '.join(growing)}, in this order, "
            f"and behind them at most {COLUMN_STATES} and {RECURRENT_STATES}."
        )
    for name in others:
        _check_fixed(function, name)
    keys, values = function.states[KEY_CACHE], function.states[VALUE_CACHE]
    shape = keys.shape
    fixed = [size for axis, size in enumerate(shape) if axis != 3 and size is not None]
    free = len(shape) == 5 and shape[3] is None and len(fixed) == 4 and shape[1] == 1
    row = 1
    for size in fixed:
        row *= size
    element = "int8" if coded else "float16"
    if keys != values or keys.element != element or not free or not 0 < row <= _MOST_STATE_ROW:
        raise PackageError(
            f"function {MAIN} has states {_words(function.states)}; expected both as {element} [layers, 1, kv_heads, "
            "?, head_dim]."
        )
    scales = TensorType("float16", (*shape[:4], 1))
    if any(function.states[name] != scales for name in growing[2:]):
        raise PackageError(
            f"function {MAIN} has states {_words(function.states)}; expected scales as {scales}."
        )


def _check_fixed(function: Function, name: str) -> None:
    """A state that does not grow: [layers, 1, width, channels], or [layers, 1, heads, key_dim, value_dim]."""
    kind = function.states[name]
    element, rank = ("float16", 4) if name == COLUMN_STATES else ("float32", 5)
    sizes = [size for size in kind.shape if size is not None]
    whole = len(sizes) == len(kind.shape) == rank and sizes[1] == 1
    if kind.element != element or not whole or not 0 < math.prod(sizes) <= _MOST_FIXED:
        raise PackageError(
            f"function {function.name} has states {_words(function.states)}; expected {name} as {element} of {rank} "
            "axes, the second of size one."
        )


def _check_static(program: Program, description: Description) -> None:
    """`StaticShapeEngine` finds functions, inputs, outputs and states by their names."""
    ladder = context_ladder(description.context)
    if not ladder or ladder[-1] != description.context:
        raise PackageError(
            f"its metadata says {description.context} positions, which no cache of the static engine has."
        )
    load = _function(program, LOAD_EMBEDDINGS)
    table = load.outputs.get(EMBEDDING_TABLE)
    hidden = table.shape[2] if table is not None and len(table.shape) == 3 else None
    wanted = TensorType("float16", (description.vocab_size, 1, hidden))
    _same(load, "inputs", load.inputs, {})
    _same(load, "outputs", load.outputs, {EMBEDDING_TABLE: wanted})
    if hidden is None or not 0 < hidden <= _MOST_STATE_ROW:
        raise PackageError(
            f"function {load.name} has outputs {_words(load.outputs)}, whose size is not fixed."
        )
    width = _state_width(program, ladder[-1])
    for count in QUERY_LENGTHS:
        gather, rows = _function(program, gather_name(count)), TensorType("float16", (1, count, 1, hidden))
        ids = TensorType("int32", (1, count))
        _same(gather, "inputs", gather.inputs, {TOKEN_IDS: ids, EMBEDDING_TABLE: wanted})
        _same(gather, "outputs", gather.outputs, {GATHERED: rows})
        for length in ladder:
            logits = TensorType("float16", (1, 1, count, description.vocab_size))
            for name, output in ((EXTEND, logits), (PROMPT, TensorType("float16", ()))):
                step = _function(program, step_name(name, length, count))
                inputs = {
                    TRANSFORMER_INPUT: rows,
                    POSITION_IDS: TensorType("uint16", (1, count)),
                    IN_STEP: TensorType("int32", (1,)),
                    CAUSAL_MASK: TensorType("float16", (1, length, 1, count)),
                }
                state = TensorType("float16", (*width, length))
                _same(step, "inputs", step.inputs, inputs)
                _same(step, "outputs", step.outputs, {STATIC_LOGITS: output})
                _same(step, "states", step.states, {STATIC_KEY_CACHE: state, STATIC_VALUE_CACHE: state})


def _state_width(program: Program, length: int) -> tuple[int, ...]:
    """Everything but the length of the states, [layers, 1, kv_heads * head_dim, 1]."""
    function = _function(program, step_name(EXTEND, length, QUERY_LENGTHS[0]))
    keys = function.states.get(STATIC_KEY_CACHE)
    shape = () if keys is None else keys.shape
    layers, one, width, other, last = shape if len(shape) == 5 else (None,) * 5
    if layers is None or width is None or (one, other, last) != (1, 1, length):
        raise PackageError(f"function {function.name} has states {_words(function.states)}.")
    if not 0 < layers * width <= _MOST_STATE_ROW or max(layers, width) > length:
        raise PackageError(
            f"function {function.name} has states {_words(function.states)}; the engine takes their largest dimension "
            "for their length."
        )
    return layers, 1, width, 1


def _function(program: Program, name: str) -> Function:
    if name not in program.public:
        known = ", ".join(program.public) or "none"
        raise PackageError(f"the program has no function {name!r}; it has {known}.")
    return program.public[name]


def _same(
    function: Function, what: str, found: Mapping[str, TensorType], wanted: Mapping[str, TensorType]
) -> None:
    """Names, order and types."""
    if list(found.items()) != list(wanted.items()):
        raise PackageError(
            f"function {function.name} has {what} {_words(found)}; expected {_words(wanted)}, in this order."
        )


def _words(types: Mapping[str, TensorType]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in types.items()) or "none"
