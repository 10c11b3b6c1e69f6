"""What makes a program a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from converters.coreml.read.ops.registry import op


@op("classify", moves=True)
def classify(probabilities: Tensor, classes: tuple) -> tuple[Any, dict[Any, float]]:  # type: ignore[type-arg]
    """The class of the largest probability, and all probabilities by class."""
    values = probabilities.reshape(-1).tolist()
    if len(values) != len(classes) or not values:
        raise ValueError(f"{len(values)} probabilities for {len(classes)} classes")
    best = max(range(len(values)), key=values.__getitem__)  # the first of equals
    return classes[best], dict(zip(classes, values, strict=True))
