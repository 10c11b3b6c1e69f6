"""Composed operations, which a program holds with a body of simpler ones.

The runtime for Linux knows composed operations by their names and does not run their bodies; another one may. So a body
that does not do what the name says is refused, as far as the name says it.
"""

from __future__ import annotations

import re

from converters.coreai.read.operations import Operation
from converters.coreai.read.program import Program
from edkm_export.errors import PackageError

__all__ = ["check_composed"]

_VERSION = re.compile(r"_v\d+$")
_ELEMENTWISE, _REDUCTION, _PRIMITIVE = "broadcasting_", "reduce_", "primitive."
_ARITHMETIC = {
    "add",
    "sub",
    "mul",
    "divide",
    "modulo",
    "pow",
    "maximum",
    "minimum",
    "equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "and",
    "or",
    "batch_matmul",
    "abs",
    "cos",
    "erf",
    "exp",
    "log",
    "sin",
    "sqrt",
    "rsqrt",
    "tanh",
}
_REDUCED_BY = {"sum": "add", "max": "maximum", "min": "minimum", "product": "mul"}
_SOFTMAX = {"primitive.exp", "reduce_sum", "broadcasting_divide"}


def check_composed(program: Program) -> None:
    """Check the bodies whose contents follow from their names.

    Raises:
        PackageError: a body computes something else.
    """
    for function in program.functions.values():
        for block in function.body.inner():
            for operation in block.operations:
                if operation.regions:
                    _check(function.name, operation)


def _check(function: str, operation: Operation) -> None:
    name = _plain(operation.name)
    if name == "softmax":
        found = {
            _plain(each.name) for region in operation.regions for block in region for each in block.operations
        }
        wanted, found = _SOFTMAX, {each for each in found if _computes(each)}
    else:
        kind = None
        if name.startswith(_ELEMENTWISE):
            kind = name.removeprefix(_ELEMENTWISE)
        elif name.startswith(_REDUCTION):
            kind = _REDUCED_BY.get(name.removeprefix(_REDUCTION))
        if kind not in _ARITHMETIC:
            return
        wanted, found = {f"{_PRIMITIVE}{kind}"}, {each for each in _inner(operation) if _computes(each)}
    if found != wanted:
        raise PackageError(
            f"function {function}: the body of {operation.name} computes {', '.join(sorted(found)) or 'nothing'}, "
            f"expected {', '.join(sorted(wanted))}."
        )


def _inner(operation: Operation) -> set[str]:
    return {
        _plain(each.name)
        for region in operation.regions
        for outer in region
        for block in outer.inner()
        for each in block.operations
    }


def _plain(name: str) -> str:
    return _VERSION.sub("", name)


def _computes(name: str) -> bool:
    """Not a constant, and nothing that only moves or shapes values."""
    return name.startswith((_ELEMENTWISE, _REDUCTION)) or name.removeprefix(_PRIMITIVE) in _ARITHMETIC
