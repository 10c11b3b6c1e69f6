"""Do weights sit in the layers that their names say?

The cache shows where a layer is: everything that `present.3.key` is computed from comes before it. So a weight of
layer 3 must not reach the cache of an earlier layer, and must reach that of the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from converters.onnx.format import present_name
from converters.onnx.read.graph import Graph, Node
from edkm_export.errors import PackageError

__all__ = ["Layers"]

_KEYS_ALONE, _VALUES_ALONE = ("k_proj",), ("v_proj",)
_KEYS_AND_VALUES = ("qkv_proj", "c_attn", "query_key_value")


class Layers:
    """The order of layers in a graph, by its cache.

    Args:
        graph: a decoder with cache.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def check(self, name: str, results: Mapping[str, Node]) -> None:
        """Compare the place of a weight with its name.

        Args:
            name: of the parameter; one without the number of a layer is not looked at.
            results: what it gives where it is used: {value: the node that uses it}.

        Raises:
            PackageError: it is used in another layer, or for keys instead of values.
        """
        number = re.search(r"\.(?:layers|h)\.(\d{1,6})\.", name)
        if number is None or not self._reach["key"]:
            return
        layer, module = int(number[1]), name.split(".")[-2]
        for result, node in results.items():
            key, value = (self._reach[what].get(result, math.inf) for what in ("key", "value"))
            wanted_key = layer if module in _KEYS_ALONE + _KEYS_AND_VALUES else self._after(layer)
            valued = module in _VALUES_ALONE + _KEYS_AND_VALUES
            valued = valued or (module in _KEYS_ALONE and not self._has_values(name))
            wanted_value = layer if valued else self._after(layer)
            if (key, value) != (wanted_key, wanted_value):
                found = "no layer's" if key == value == math.inf else f"layer {min(key, value)}'s"
                raise PackageError(
                    f"{self._graph.path}: {name}: {node} reaches {found} keys or values first, which a weight of this "
                    "name does not; weights of the graph are exchanged."
                )

    def _has_values(self, name: str) -> bool:
        """Whether there is a projection to values beside one to keys; without it, values are the projected keys."""
        other = name.replace("k_proj", "v_proj")
        return any(each.startswith(other) for node in self._graph.nodes for each in node.inputs)

    def _after(self, layer: int) -> float:
        return layer + 1 if present_name(layer + 1, "key") in self._graph.outputs else math.inf

    @cached_property
    def _reach(self) -> dict[str, dict[str, float]]:
        """The first layer whose keys, or values, a value of the graph takes part in."""
        found: dict[str, dict[str, float]] = {"key": {}, "value": {}}
        for what, reach in found.items():
            for name in self._graph.outputs:
                if layer := re.fullmatch(rf"present\.(\d{{1,6}})\.{what}", name):
                    reach[name] = int(layer[1])
            for node in reversed(self._graph.nodes):
                for outputs, inputs in _flows(node):
                    first = min((reach.get(value, math.inf) for value in outputs), default=math.inf)
                    if first < math.inf:
                        for value in filter(None, inputs):
                            reach[value] = min(first, reach.get(value, math.inf))
        return found


def _flows(node: Node) -> list[tuple[Sequence[str], Sequence[str]]]:
    """Which results of a node are computed from which of its inputs.

    Attention (opset 23) hands keys and values on: its second result takes inputs 1 and 4, its third 2 and 5.
    """
    if (node.domain, node.op) != ("", "Attention"):
        return [(node.outputs, node.inputs)]
    return [
        (node.outputs[:1], node.inputs),
        (node.outputs[1:2], (*node.inputs[1:2], *node.inputs[4:5])),
        (node.outputs[2:3], (*node.inputs[2:3], *node.inputs[5:6])),
    ]
