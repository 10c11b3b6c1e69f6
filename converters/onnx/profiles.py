"""The three ways in which weights take part in a graph: exact, low-memory and fast."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from converters.onnx.backend import load_onnx
from converters.onnx.builder import CONTRIB, GraphBuilder
from converters.onnx.decoding import WeightNodes
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor

__all__ = ["PROFILES", "ExactForms", "FastForms", "Forms", "LowMemoryForms", "StandardFastForms"]

# onnxruntime folds no constant of 1 GiB or more; larger heads are decoded part by part. In weights of 4 bytes.
_LARGEST_FOLDED = (1 << 30) // 4 - 1
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
        return self._multiply(x, tensor, WeightNodes(self.graph, tensor), _LARGEST_FOLDED)

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


class _Int8Forms(Forms):
    """Entries on an int8 grid, multiplied in blocks of columns that share a scale.

    Raises:
        ConversionError: on construction, when a palette is not on an int8 grid.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(graph, checkpoint, dtype)
        check_int8_grid(checkpoint)

    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        nodes = WeightNodes(self.graph, tensor)
        block = _block_size(tensor, nodes.group_columns)
        blocks = -(-tensor.matrix_shape[1] // block)
        parts = [
            self._rows_product(
                x,
                tensor,
                nodes.steps(rows),
                nodes.scales(rows, blocks),
                rows.count * tensor.dim,
                blocks,
                block,
            )
            for rows in nodes.parts(_LARGEST_FOLDED)
        ]
        return self._join(tensor, parts)

    @abstractmethod
    def _rows_product(
        self, x: str, tensor: PalettizedTensor, steps: str, scales: str, out: int, blocks: int, block: int
    ) -> str:
        """Multiply x with some rows: steps uint8 [out, columns], scales float32 [out, blocks]."""

    def _typed(self, scales: str) -> str:
        """Scales in the dtype of activations."""
        if self.onnx_type == load_onnx().TensorProto.FLOAT16:
            return self.graph.node("Cast", scales, to=self.onnx_type)  # type: ignore[no-any-return]
        return scales


class FastForms(_Int8Forms):
    """Multiplied by MatMulNBits in 8 bits; activations are rounded to int8 in blocks."""

    contrib = True

    def _rows_product(
        self, x: str, tensor: PalettizedTensor, steps: str, scales: str, out: int, blocks: int, block: int
    ) -> str:
        graph, types, columns = self.graph, load_onnx().TensorProto, tensor.matrix_shape[1]
        blocked = self._blocked(steps, out, columns, blocks, block)
        half = self.onnx_type == types.FLOAT16
        if half:  # onnxruntime 1.22.1 and 1.32.0 multiply float16 with 8 bits wrongly at this accuracy level
            x = graph.node("Cast", x, to=types.FLOAT)
        product = graph.node(
            "MatMulNBits", x, blocked, scales,
            domain=CONTRIB, name=f"{tensor.name}.product", K=columns, N=out, bits=8, block_size=block,
            accuracy_level=4,
        )  # fmt: skip
        return graph.node("Cast", product, to=types.FLOAT16) if half else product  # type: ignore[no-any-return]

    def _blocked(self, steps: str, out: int, columns: int, blocks: int, block: int) -> str:
        """uint8 [out, columns] -> [out, blocks, block], padded with entry 128, which is zero."""
        graph = self.graph
        if missing := blocks * block - columns:
            padding = graph.constant(np.full((1, 1), 128, np.uint8))
            padding = graph.node("Expand", padding, graph.integers(out, missing))
            steps = graph.node("Concat", steps, padding, axis=1)
        return graph.node("Reshape", steps, graph.integers(out, blocks, block))  # type: ignore[no-any-return]


class StandardFastForms(_Int8Forms):
    """The same in standard operators, which onnxruntime fuses to MatMulNBits while it loads."""

    def _rows_product(
        self, x: str, tensor: PalettizedTensor, steps: str, scales: str, out: int, blocks: int, block: int
    ) -> str:
        graph = self.graph
        zero = graph.node(
            "Expand", graph.constant(np.full((1, 1), 128, np.uint8)), graph.integers(blocks, out)
        )
        weight = graph.node(
            "DequantizeLinear",
            graph.node("Transpose", steps, perm=[1, 0]),
            self._typed(graph.node("Transpose", scales, perm=[1, 0])),
            zero,
            axis=0,
            block_size=block,
        )
        return graph.node("MatMul", x, weight, name=f"{tensor.name}.product")  # type: ignore[no-any-return]


PROFILES: dict[str, type[Forms]] = {"exact": ExactForms, "low-memory": LowMemoryForms, "fast": FastForms}
"""By the name that the command line uses."""


def check_int8_grid(checkpoint: Checkpoint) -> None:
    """Refuse palettes that MatMulNBits could not multiply as they are.

    Raises:
        ConversionError: a LUT is float16; or its entries times their scale are not what PyTorch decodes.
    """
    source = str(checkpoint.path or "checkpoint")
    remedy = (
        "Palettize or train with --lut-dtype int8 (in a recipe: `lut_dtype: int8`), "
        "or use --runtime exact or low-memory."
    )
    floats = [name for name, tensor in checkpoint.palettized.items() if tensor.lut_scale is None]
    if floats:
        count = f"{len(floats)} weights have float16 LUTs, {floats[0]} among them"
        raise ConversionError(
            f"{source}: {count}, and --runtime fast takes LUTs on an int8 grid. Rounding a finished LUT would change "
            f"the model. {remedy}"
        )
    for name, tensor in checkpoint.palettized.items():
        assert tensor.lut_scale is not None
        product = tensor.lut.float() * tensor.lut_scale.float()[:, :, None, None]
        if not torch.equal(product, tensor.lut_values().float()):
            raise ConversionError(
                f"{source}: {name}: its int8 entries times their scale are rounded to float16 when they are decoded, "
                "and MatMulNBits does not round: the weights would not be the same. Palettize or train it again with "
                "this release, whose scales have few enough digits, or use --runtime exact or low-memory."
            )


def _block_size(tensor: PalettizedTensor, group_columns: int) -> int:
    """Columns that share a scale in MatMulNBits: 128, or what divides the columns of a group.

    It is also the block in which activations are rounded. 576 columns in padded blocks of 128 are multiplied a tenth
    faster than in blocks of 64, and the rounding costs half as much again in KL divergence.
    """
    if tensor.groups[1] == 1:
        return next((size for size in (128, 64, 32) if group_columns % size == 0), 32)
    block = math.gcd(group_columns, 128)
    if block < 16:
        raise ConversionError(
            f"{tensor.name}: its LUTs change every {group_columns} columns, and MatMulNBits wants a multiple of 16; "
            "use --runtime exact or low-memory."
        )
    return block
