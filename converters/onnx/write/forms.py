"""How weights take part in a graph: what all profiles share, and those that decode to floats."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from converters.onnx.backend import load_onnx
from converters.onnx.format import INPUT_IDS
from converters.onnx.write.builder import GraphBuilder
from converters.onnx.write.weight_nodes import Barrier, StackNodes, WeightNodes
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor

__all__ = ["LARGEST_FOLDED", "ExactForms", "Forms", "LowMemoryForms"]

# onnxruntime folds no constant of 1 GiB or more; larger heads are decoded part by part. In weights of 4 bytes.
LARGEST_FOLDED = (1 << 30) // 4 - 1
_LARGEST_DECODED = 3 << 20  # weights that the low-memory profile decodes at a time
_SMALL = 1 << 12  # a dense parameter below so many elements is stored as float32


class Forms(ABC):
    """What the profiles have in common; a form for dense parameters.

    Args:
        graph: receives nodes and weights.
        checkpoint: the parameters.
        dtype: of activations, float32 or float16.

    Attributes:
        contrib: operators of onnxruntime's own may be used.
    """

    contrib = False

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        types = load_onnx().TensorProto
        self.graph, self.checkpoint = graph, checkpoint
        self.onnx_type: int = types.FLOAT16 if dtype == torch.float16 else types.FLOAT

    def linear(self, x: str, name: str) -> str:
        """Multiply x [batch, new, in] with a weight [out, in]: [batch, new, out]."""
        tensor = self.checkpoint.palettized.get(self._stored(name))
        if tensor is None:
            dense = self.graph.node("Transpose", self.dense(name), perm=[1, 0])
            return self.graph.node("MatMul", x, dense, name=f"{name}.product")  # type: ignore[no-any-return]
        return self._product(x, tensor)

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Multiply x [batch, new, in] with several weights."""
        return [self.linear(x, name) for name in names]

    def embedding(self, ids: str, name: str) -> str:
        """Rows of a weight: int64 [batch, new] -> [batch, new, columns]."""
        tensor = self.checkpoint.palettized.get(self._stored(name))
        if tensor is None:
            return self.dense(name, lambda value: self.graph.node("Gather", value, ids))
        if tensor.dim > 1:
            raise ConversionError(
                f"{self.checkpoint.path or 'checkpoint'}: {tensor.name}: an embedding whose LUT holds vectors of "
                f"{tensor.dim} cannot be looked up row by row; palettize it with scalar LUTs."
            )
        return WeightNodes(self.graph, tensor).lookup(ids, self.onnx_type)

    def vector(self, name: str, *, wide: bool = False) -> str:
        """A dense parameter, in the dtype of activations, or in float32."""
        return self.dense(name, wide=wide)

    def kernel(self, name: str) -> str:
        """The weight of a convolution along the text [channels, 1, size], in the dtype of activations."""
        if self._stored(name) in self.checkpoint.palettized:
            raise ConversionError(
                f"{self.checkpoint.path or 'checkpoint'}: {name}: a palettized convolution cannot be held in this "
                f"format; leave it dense (skip: true for {name.removesuffix('.weight')!r} in the recipe), it is small."
            )
        return self.dense(name)

    def dense(self, name: str, use: Callable[[str], Any] = lambda value: value, *, wide: bool = False) -> str:
        """A dense parameter, or what `use` takes of it, in the dtype of activations, or in float32.

        Stored as float16 when it is large and that loses nothing.
        """
        name = self._stored(name)
        tensor = self.checkpoint.dense[name]
        types = load_onnx().TensorProto
        exact = tensor.dtype == torch.float16 or (
            tensor.numel() >= _SMALL and torch.equal(tensor.half().float(), tensor.float())
        )
        half = exact and tensor.numel() >= _SMALL
        dtype = torch.float16 if half else torch.float32
        value = self.graph.weight(
            name, np.float16 if half else np.float32, tuple(tensor.shape), lambda: tensor.to(dtype).numpy()
        )
        stored = types.FLOAT16 if half else types.FLOAT
        used: str = use(value)
        wanted = types.FLOAT if wide else self.onnx_type
        return used if stored == wanted else self.graph.node("Cast", used, to=wanted)

    def _stored(self, name: str) -> str:
        held = name in self.checkpoint.palettized or name in self.checkpoint.dense
        return name if held else self.checkpoint.tied[name]

    @abstractmethod
    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        """Multiply x [batch, new, in] with a palettized weight: [batch, new, out]."""

    def _join(self, tensor: PalettizedTensor, parts: list[str]) -> str:
        """Outputs of row ranges, side by side."""
        return parts[0] if len(parts) == 1 else self.graph.node("Concat", *parts, axis=-1)


class ExactForms(Forms):
    """Tables that a runtime folds to dense weights while it loads."""

    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        nodes = WeightNodes(self.graph, tensor)
        parts = [
            self._times(x, tensor, nodes.values(rows, self.onnx_type)) for rows in nodes.parts(LARGEST_FOLDED)
        ]
        return self._join(tensor, parts)

    def _times(self, x: str, tensor: PalettizedTensor, weight: str) -> str:
        """Multiply x with rows of a weight [out, in]."""
        turned = self.graph.node("Transpose", weight, perm=[1, 0])
        return self.graph.node("MatMul", x, turned, name=f"{tensor.name}.product")  # type: ignore[no-any-return]


class LowMemoryForms(ExactForms):
    """Weights are decoded when they are used, three million at a time, and never kept.

    Small weights of a layer of the same layout are decoded together: onnxruntime takes some 4 KB for each node.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(graph, checkpoint, dtype)
        self._stacks = {tensor.name: stack for stack in _stacks(checkpoint) for tensor in stack}
        self._decoded: dict[str, str] = {}

    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        name = tensor.name
        if name in self._stacks:
            if name not in self._decoded:
                stack = StackNodes(self.graph, self._stacks[name], self._after(x))
                self._decoded |= stack.weights(self.onnx_type)
            return self._times(x, tensor, self._decoded[name])
        parts: list[str] = []
        for rows in WeightNodes(self.graph, tensor).parts(_LARGEST_DECODED):
            nodes = WeightNodes(self.graph, tensor, self._after(parts[-1] if parts else x))
            parts.append(self._times(x, tensor, nodes.values(rows, self.onnx_type)))
        return self._join(tensor, parts)

    def _after(self, activation: str) -> Barrier:
        """A barrier that falls when an activation [batch, ...] is there."""
        return Barrier(self._zero(activation), self._zero(INPUT_IDS))

    def _zero(self, activation: str) -> str:
        batch = self.graph.node("Shape", activation, start=0, end=1)
        return self.graph.node("Mul", batch, self.graph.integers(0))  # type: ignore[no-any-return]


def _stacks(checkpoint: Checkpoint) -> list[list[PalettizedTensor]]:
    """Weights of a layer with the same layout, as many as may be decoded at a time; two or more."""
    same: dict[Any, list[PalettizedTensor]] = {}
    for name, tensor in checkpoint.palettized.items():
        if layer := re.match(r".*?\.\d+\.", name):
            same.setdefault((layer[0], StackNodes.layout(tensor)), []).append(tensor)
    stacks: list[list[PalettizedTensor]] = []
    for tensors in same.values():
        room = 0
        for tensor in tensors:
            if room < tensor.numel:
                stacks.append([])
                room = _LARGEST_DECODED
            stacks[-1].append(tensor)
            room -= tensor.numel
    return [stack for stack in stacks if len(stack) > 1]
