"""Building a graph: nodes, constants that are shared, and weights that are written when all is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.backend import load_onnx

__all__ = ["CONTRIB", "GraphBuilder", "Weight"]

CONTRIB = "com.microsoft"
"""Domain of onnxruntime's own operators."""

Array = NDArray[Any]

_INLINE_BYTES = 1024  # larger constants go to the external data, as weights do


@dataclass(frozen=True)
class Weight:
    """An initializer in the external data.

    Attributes:
        name: of the initializer.
        dtype: numpy dtype.
        shape: sizes.
        produce: makes the array; called once, while the file is written.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    produce: Callable[[], Array]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without alignment."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass
class GraphBuilder:
    """A graph that grows.

    Attributes:
        opset: version of the standard operators.
        nodes: in order.
        weights: initializers in the external data, by name.
        contrib: an operator of onnxruntime's own domain is used.
    """

    opset: int
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    contrib: bool = False
    _constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _inline: list[Any] = field(default_factory=list)
    _results: dict[Any, Any] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def node(
        self, op: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any
    ) -> Any:
        """Append a node, or return the results of an equal one.

        Args:
            op: operator.
            inputs: value names; "" for one that is left out.
            outputs: how many results it has.
            domain: "" for the standard operators.
            name: of the node and the stem of its results; by default the operator's.
            attributes: of the node.

        Returns:
            The name of its result, or a tuple of names when `outputs` is above 1.
        """
        key = (op, inputs, outputs, domain, repr(sorted(attributes.items())))
        if key not in self._results:
            stem = self.unique(name or op)
            results = [stem] if outputs == 1 else [f"{stem}.{i}" for i in range(outputs)]
            made = load_onnx().helper.make_node(
                op, list(inputs), results, name=stem, domain=domain or None, **attributes
            )
            self.nodes.append(made)
            self.contrib |= domain == CONTRIB
            self._results[key] = results[0] if outputs == 1 else tuple(results)
        return self._results[key]

    def append(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Append a node whose results have names already; it is named after the first one."""
        made = load_onnx().helper.make_node(
            op, list(inputs), list(outputs), name=outputs[0], domain=domain or None, **attributes
        )
        self.nodes.append(made)
        self.contrib |= domain == CONTRIB

    def drop(self, name: str) -> None:
        """Take the node away that gives a value, which nothing uses so far; another one is to give it."""
        place = next(i for i in reversed(range(len(self.nodes))) if name in self.nodes[i].output)
        assert not any(name in node.input for node in self.nodes[place:]), f"{name} is used already"
        del self.nodes[place]

    def unique(self, stem: str) -> str:
        """Return a name that no value or node has yet, and take it."""
        name, number = stem, 0
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    def constant(self, values: Any, dtype: Any = None) -> str:
        """Name a constant; equal ones are stored once."""
        array = np.ascontiguousarray(np.asarray(values, dtype))
        array = array.reshape(np.shape(values))  # ascontiguousarray makes a vector of a scalar
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.unique("constant")
            if array.nbytes > _INLINE_BYTES:
                self.weights[name] = Weight(name, array.dtype, array.shape, lambda: array)
            else:
                self._inline.append(load_onnx().numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, dtype: Any, shape: Sequence[int], produce: Callable[[], Array]) -> str:
        """Declare an initializer in the external data, once."""
        if name not in self.weights:
            assert name not in self._names, f"{name} is a value already"
            self._names.add(name)
            self.weights[name] = Weight(name, np.dtype(dtype), tuple(shape), produce)
        return name

    def integers(self, *values: int) -> str:
        """Name a constant int64 vector."""
        return self.constant(values, np.int64)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give values the names of outputs of the graph: {old: new}."""
        for node in self.nodes:
            for values in (node.input, node.output):
                for place, name in enumerate(values):
                    if name in names:
                        values[place] = names[name]

    def prune(self, outputs: Sequence[str]) -> None:
        """Drop nodes, constants and weights that no output needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: weight for name, weight in self.weights.items() if name in needed}
        self._inline = [tensor for tensor in self._inline if tensor.name in needed]

    @property
    def inline(self) -> list[Any]:
        """Constants that are held in the graph itself."""
        return self._inline
