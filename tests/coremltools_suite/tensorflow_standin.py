"""The few functions of TensorFlow that coremltools' op tests take expected values from, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["FUNCTIONS"]


class _Tensor:
    """A constant or a variable."""

    def __init__(self, value: Any, dtype: Any = None) -> None:
        self.value = np.array(value, dtype)

    def numpy(self) -> np.ndarray:
        return self.value.copy()


_MODES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "update": lambda old, new: new,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _scatter(mode: str, nd: bool) -> Callable[[_Tensor, np.ndarray, np.ndarray], None]:
    def scatter(variable: _Tensor, indices: np.ndarray, updates: np.ndarray) -> None:
        places = indices.shape[:-1] if nd else indices.shape
        for place in np.ndindex(*places):
            target = tuple(indices[place]) if nd else (indices[place],)
            variable.value[target] = _MODES[mode](variable.value[target], updates[place])

    return scatter


class _LayerNormalization:
    def __init__(self, axis: Any, epsilon: float) -> None:
        self.axes, self.epsilon = tuple(np.atleast_1d(axis).tolist()), epsilon

    def __call__(self, x: _Tensor) -> _Tensor:
        mean, variance = (how(x.value, self.axes, keepdims=True) for how in (np.mean, np.var))
        return _Tensor((x.value - mean) / np.sqrt(variance + self.epsilon))


def _non_max_suppression(
    boxes: np.ndarray, scores: np.ndarray, max_output_size: int, iou_threshold: float, score_threshold: float
) -> _Tensor:
    """Boxes are (y1, x1, y2, x2); those above the score threshold, best first, that overlap no better one."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if len(kept) == max_output_size or scores[index] <= score_threshold:
            break
        if all(_overlap(boxes[index], boxes[other]) <= iou_threshold for other in kept):
            kept.append(int(index))
    return _Tensor(kept, np.int32)


def _overlap(one: np.ndarray, two: np.ndarray) -> float:
    sides = np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    union = sum(float(np.prod(box[2:] - box[:2])) for box in (one, two)) - shared
    return shared / union if union > 0 else 0.0


FUNCTIONS = {
    "float32": np.float32,
    "constant": _Tensor,
    "Variable": _Tensor,
    "random": SimpleNamespace(set_seed=lambda seed: None),
    "image": SimpleNamespace(non_max_suppression=_non_max_suppression),
    "keras": SimpleNamespace(layers=SimpleNamespace(LayerNormalization=_LayerNormalization)),
    "compat": SimpleNamespace(
        v1=SimpleNamespace(
            **{f"scatter_{mode}": _scatter(mode, False) for mode in _MODES},
            **{f"scatter_nd_{mode}": _scatter(mode, True) for mode in _MODES},
        )
    ),
}
