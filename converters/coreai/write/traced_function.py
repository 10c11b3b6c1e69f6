"""A function of a program before it is converted: module, example inputs, and the names of its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["TracedFunction"]


@dataclass(frozen=True)
class TracedFunction:
    """What `torch.export` and the converter need to know.

    Attributes:
        name: of the function in the program.
        module: in eval mode; takes inputs and states in this order.
        examples: arguments to trace it with.
        dynamic_shapes: of each argument, for `torch.export`; None: all are fixed.
        inputs: names of the inputs.
        states: names of the states, which the module updates in place.
        outputs: names of the results.
        static_shapes: {label: {input or state: shape}}; the function is replaced by one for each label, whose name it
            ends with. None: it stays as it is.
    """

    name: str
    module: nn.Module
    examples: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any] | None, ...] | None
    inputs: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[str, ...]
    static_shapes: dict[str, dict[str, tuple[int, ...]]] | None = None
