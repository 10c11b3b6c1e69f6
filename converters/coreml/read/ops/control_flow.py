"""Branches and loops over nested blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from converters.coreml.read.ops.registry import Call, op

_MAX_STEPS = 100_000  # of a loop; one that has not ended by then is taken for endless


@op("cond", moves=True, blocks=2)
def cond(pred: bool, call: Call) -> tuple[Any, ...]:
    """What the first block returns where `pred` is true, else what the second does."""
    return call.blocks[0 if pred else 1]()


@op("while_loop", moves=True, blocks=2)
def while_loop(loop_vars: list[Any], call: Call) -> tuple[Any, ...]:
    """Let the second block make new values as long as the first one says so."""
    condition, body = call.blocks
    values = tuple(loop_vars)
    for _ in range(_MAX_STEPS):
        (more,) = condition(*values)
        if not isinstance(more, Tensor) or more.numel() != 1:
            raise TypeError("the condition is not a scalar")
        if not more.item():
            return values
        values = body(*values)
    raise ValueError(f"the loop has not ended after {_MAX_STEPS} steps")
