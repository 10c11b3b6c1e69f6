"""Whether a program has the functions, inputs, states and outputs that one of Apple's engines demands.

The demands are those of `swift/Sources/CoreAILanguageModels/InferenceEngines` in apple/coreai-models, commit 86b363d.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.coreai.format import INPUT_IDS, KEY_CACHE, LOGITS, MAIN, POSITION_IDS, VALUE_CACHE
from converters.coreai.read.description import Description
from converters.coreai.read.element_types import TensorType
from converters.coreai.read.program import Function, Program
from edkm_export.errors import PackageError

__all__ = ["check_interface"]

_MOST_STATE_ROW = 1 << 24  # elements of a state for each position


def check_interface(program: Program, description: Description) -> None:
    """Check the program against the engine that its description names.

    Raises:
        PackageError: a function is missing, or has other inputs, states or outputs.
    """
    if description.interface == "dynamic":
        _check_dynamic(program, description)


def _check_dynamic(program: Program, description: Description) -> None:
    """`CoreAISequentialEngine` takes inputs and output by their place, and asks for float16 logits."""
    function = _function(program, MAIN)
    anything = TensorType("int32", (1, None))
    _same(function, "inputs", function.inputs, {INPUT_IDS: anything, POSITION_IDS: anything})
    logits = TensorType("float16", (1, None, description.vocab_size))
    _same(function, "outputs", function.outputs, {LOGITS: logits})
    if list(function.states) != [KEY_CACHE, VALUE_CACHE]:
        raise PackageError(
            f"function {MAIN} has states {_words(function.states)}; expected {KEY_CACHE} and {VALUE_CACHE}, in this "
            "order."
        )
    keys, values = function.states.values()
    shape = keys.shape
    fixed = [size for axis, size in enumerate(shape) if axis != 3 and size is not None]
    free = len(shape) == 5 and shape[3] is None and len(fixed) == 4 and shape[1] == 1
    row = 1
    for size in fixed:
        row *= size
    if keys != values or keys.element != "float16" or not free or not 0 < row <= _MOST_STATE_ROW:
        raise PackageError(
            f"function {MAIN} has states {_words(function.states)}; expected both as float16 [layers, 1, kv_heads, ?, "
            "head_dim]."
        )


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
