"""The fast profile: entries of LUTs as whole numbers, multiplied in blocks of columns that share a scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from converters.onnx.backend import load_onnx
from converters.onnx.write.builder import CONTRIB, GraphBuilder
from converters.onnx.write.forms import LARGEST_FOLDED, Forms
from converters.onnx.write.weight_nodes import Rows, WeightNodes, has_exact_products
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.lut_dtypes import LUT_DTYPES
from edkm_export.palette import PalettizedTensor

__all__ = ["FastForms", "StandardFastForms"]


@dataclass(frozen=True)
class _Blocks:
    """How MatMulNBits holds a weight.

    Attributes:
        columns: of the weight.
        size: columns that share a scale.
        bits: of an entry, 4 or 8.
    """

    columns: int
    size: int
    bits: int

    @property
    def count(self) -> int:
        """Blocks in a row."""
        return -(-self.columns // self.size)

    @property
    def zero(self) -> int:
        """The byte whose entries are all zero: 128, or 8 twice."""
        return 128 if self.bits == 8 else 0x88

    @property
    def padding_bytes(self) -> int:
        """Bytes that a row lacks to fill its last block."""
        return (self.count * self.size - self.columns) * self.bits // 8


class _Int8Forms(Forms):
    """Entries on an int8 grid.

    Raises:
        ConversionError: on construction, when a palette is not on an int8 grid.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(graph, checkpoint, dtype)
        check_int8_grid(checkpoint)

    def _product(self, x: str, tensor: PalettizedTensor) -> str:
        nodes = WeightNodes(self.graph, tensor)
        parts = [self._rows_product(x, tensor, nodes, rows) for rows in nodes.parts(LARGEST_FOLDED)]
        return self._join(tensor, parts)

    @abstractmethod
    def _rows_product(self, x: str, tensor: PalettizedTensor, nodes: WeightNodes, rows: Rows) -> str:
        """Multiply x with some rows of a weight."""


class FastForms(_Int8Forms):
    """Multiplied by MatMulNBits; activations are rounded to int8 in blocks.

    A weight whose entries are all within the range of int4 is held in 4 bits, any other in 8. Weights that multiply the
    same input are stacked in one product.
    """

    contrib = True

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Multiply x [batch, new, in] with several weights, in one product if they have the same layout.

        A product costs some 15 microseconds whatever its size.
        """
        tensors = [self.checkpoint.palettized.get(self._stored(name)) for name in names]
        held = [tensor for tensor in tensors if tensor is not None]
        if (
            len(held) < max(len(names), 2)
            or len({_blocks_of(tensor) for tensor in held}) > 1
            or sum(tensor.numel for tensor in held) > LARGEST_FOLDED
        ):
            return super().linears(x, names)
        graph, operands = self.graph, []
        for tensor in held:
            nodes = WeightNodes(graph, tensor)
            operands.append(self._operands(tensor, nodes, Rows(0, nodes.rows)))
        entries, scales = (graph.node("Concat", *each, axis=0) for each in zip(*operands, strict=True))
        sizes = [tensor.matrix_shape[0] for tensor in held]
        joint = f"{held[0].name}.products"
        product = self._multiply(x, entries, scales, sum(sizes), _blocks_of(held[0]), joint)
        results = [graph.unique(f"{tensor.name}.product") for tensor in held]
        graph.append("Split", (product, graph.integers(*sizes)), results, axis=-1)
        return results

    def _rows_product(self, x: str, tensor: PalettizedTensor, nodes: WeightNodes, rows: Rows) -> str:
        entries, scales = self._operands(tensor, nodes, rows)
        out = rows.count * tensor.dim
        return self._multiply(x, entries, scales, out, _blocks_of(tensor), f"{tensor.name}.product")

    def _operands(self, tensor: PalettizedTensor, nodes: WeightNodes, rows: Rows) -> tuple[str, str]:
        """Entries uint8 [out, blocks, bytes of a block] and scales float32 [out, blocks] of some rows."""
        graph, blocks = self.graph, _blocks_of(tensor)
        out = rows.count * tensor.dim
        entries = nodes.nibbles(rows) if blocks.bits == 4 else nodes.entries(rows)
        if blocks.padding_bytes:
            padding = graph.constant(np.full((1, 1), blocks.zero, np.uint8))
            padding = graph.node("Expand", padding, graph.integers(out, blocks.padding_bytes))
            entries = graph.node("Concat", entries, padding, axis=1)
        shape = graph.integers(out, blocks.count, blocks.size * blocks.bits // 8)
        return graph.node("Reshape", entries, shape), nodes.scales(rows, blocks.count)

    def _multiply(self, x: str, entries: str, scales: str, out: int, blocks: _Blocks, name: str) -> str:
        graph, types = self.graph, load_onnx().TensorProto
        half = self.onnx_type == types.FLOAT16
        if half:  # onnxruntime 1.22.1 and 1.32.0 multiply float16 with 8 bits wrongly at this accuracy level
            x = graph.node("Cast", x, to=types.FLOAT)
        product = graph.node(
            "MatMulNBits", x, entries, scales,
            domain=CONTRIB, name=name, K=blocks.columns, N=out, bits=blocks.bits, block_size=blocks.size,
            accuracy_level=4,
        )  # fmt: skip
        return graph.node("Cast", product, to=types.FLOAT16) if half else product  # type: ignore[no-any-return]


class StandardFastForms(_Int8Forms):
    """The same in standard operators, which onnxruntime fuses to MatMulNBits while it loads; always in 8 bits."""

    def _rows_product(self, x: str, tensor: PalettizedTensor, nodes: WeightNodes, rows: Rows) -> str:
        graph, size = self.graph, _block_size(tensor)
        count, out = -(-tensor.matrix_shape[1] // size), rows.count * tensor.dim
        zero = graph.node(
            "Expand", graph.constant(np.full((1, 1), 128, np.uint8)), graph.integers(count, out)
        )
        scales = graph.node("Transpose", nodes.scales(rows, count), perm=[1, 0])
        if self.onnx_type == load_onnx().TensorProto.FLOAT16:
            scales = graph.node("Cast", scales, to=self.onnx_type)
        weight = graph.node(
            "DequantizeLinear",
            graph.node("Transpose", nodes.entries(rows), perm=[1, 0]),
            scales,
            zero,
            axis=0,
            block_size=size,
        )
        return graph.node("MatMul", x, weight, name=f"{tensor.name}.product")  # type: ignore[no-any-return]


def check_int8_grid(checkpoint: Checkpoint) -> None:
    """Refuse palettes that MatMulNBits could not multiply as they are.

    Raises:
        ConversionError: a LUT is float16; or its entries times their scale are not what PyTorch decodes.
    """
    source = str(checkpoint.path or "checkpoint")
    remedy = (
        "Palettize or train with --lut-dtype int8, or int4 for up to 3 bits (in a recipe: `lut_dtype: int8`), "
        "or use --runtime exact or low-memory."
    )
    floats = [
        name for name, tensor in checkpoint.palettized.items() if not LUT_DTYPES[tensor.lut_dtype].scaled
    ]
    if floats:
        count = f"{len(floats)} weights have float16 LUTs, {floats[0]} among them"
        raise ConversionError(
            f"{source}: {count}, and --runtime fast takes LUTs on an int8 grid. Rounding a finished LUT would change "
            f"the model. {remedy}"
        )
    for name, tensor in checkpoint.palettized.items():
        if not has_exact_products(tensor):
            raise ConversionError(
                f"{source}: {name}: its int8 entries times their scale are rounded to float16 when they are decoded, "
                "and MatMulNBits does not round: the weights would not be the same. Palettize or train it again with "
                "this release, whose scales have few enough digits, or use --runtime exact or low-memory."
            )


def _blocks_of(tensor: PalettizedTensor) -> _Blocks:
    # By the entries, not by `lut_dtype`: a checkpoint of format version 1 calls an int4 LUT int8.
    small = LUT_DTYPES["int4"].holds(tensor.lut) and WeightNodes.can_pack(tensor)
    return _Blocks(tensor.matrix_shape[1], _block_size(tensor), 4 if small else 8)


def _block_size(tensor: PalettizedTensor) -> int:
    """Columns that share a scale in MatMulNBits: 128, or what divides the columns of a group.

    It is also the block in which activations are rounded. 576 columns in padded blocks of 128 are multiplied a tenth
    faster than in blocks of 64, and the rounding costs half as much again in KL divergence.
    """
    columns, groups = tensor.matrix_shape[1], tensor.groups[1]
    if groups == 1:
        return next((size for size in (128, 64, 32) if columns % size == 0), 32)
    block = math.gcd(columns // groups, 128)
    if block < 16:
        raise ConversionError(
            f"{tensor.name}: its LUTs change every {columns // groups} columns, and MatMulNBits wants a multiple of "
            "16; use --runtime exact or low-memory."
        )
    return block
