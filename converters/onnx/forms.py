"""How weights take part in a graph: what all profiles share, and those that decode to floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from converters.onnx.backend import load_onnx
from converters.onnx.builder import GraphBuilder
from converters.onnx.decoding import WeightNodes
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor

__all__ = ["LARGEST_FOLDED", "ExactForms", "Forms", "LowMemoryForms"]

# onnxruntime folds no constant of 1 GiB or more; larger heads are decoded part by part. In weights of 4 bytes.
LARGEST_FOLDED = (1 << 30) // 4 - 1
_LARGEST_DECODED = 1 << 21  # weights that the low-memory profile decodes at a time
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

    def vector(self, name: str) -> str:
        """A dense parameter, in the dtype of activations."""
        return self.dense(name)

    def dense(self, name: str, use: Callable[[str], Any] = lambda value: value) -> str:
        """A dense parameter, or what `use` takes of it, in the dtype of activations.

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
        return used if stored == self.onnx_type else self.graph.node("Cast", used, to=self.onnx_type)

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
        return self._multiply(x, tensor, WeightNodes(self.graph, tensor), LARGEST_FOLDED)

    def _multiply(self, x: str, tensor: PalettizedTensor, nodes: WeightNodes, largest: int) -> str:
        graph, parts = self.graph, []
        for rows in nodes.parts(largest):
            weight = graph.node("Transpose", nodes.values(rows, self.onnx_type), perm=[1, 0])
            parts.append(graph.node("MatMul", x, weight, name=f"{tensor.name}.product"))
        return self._join(tensor, parts)


class LowMemoryForms(ExactForms):
    """Weights are decoded when they are used, two million at a time, and never kept."""

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(graph, checkpoint, dtype)
        # A zero that a runtime cannot know, so that it cannot fold what depends on it.
        batch = graph.node("Shape", "input_ids", start=0, end=1)
        self._zero: str = graph.node("Mul", batch, graph.integers(0))

    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        return self._multiply(x, tensor, WeightNodes(self.graph, tensor, self._zero), _LARGEST_DECODED)
