"""Nodes that decode palettized weights.

Codes become symbols by gathering from small constant tables, symbols become values by gathering from the LUT, spread
so that one index fetches all values of a symbol. Nothing shifts bits and nothing is wider than it must be: a runtime
that folds constants holds every intermediate value of every weight at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from converters.onnx.backend import load_onnx
from converters.onnx.format import CODES, CODES_HIGH, LUT, LUT_SCALE, part_name
from converters.onnx.write.builder import GraphBuilder
from converters.onnx.write.codes import Layout, code_planes, high_table, low_table
from edkm_export.palette import PalettizedTensor

__all__ = ["Barrier", "Rows", "StackNodes", "WeightNodes", "has_exact_products"]

_OFFSET = 128  # int8 entries are stored as uint8, which gathers and MatMulNBits take


@dataclass(frozen=True)
class Rows:
    """A range of the rows of indices of a weight, whole row groups or a part of one."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        """Rows in it."""
        return self.stop - self.start


@dataclass(frozen=True)
class Barrier:
    """Zeros whose value a runtime cannot infer before it runs: names of values, int64 [1].

    Attributes:
        codes: added to where a slice of codes starts. A runtime is free to compute at once what it can, the weights of
            all layers before the first, so this one comes from an activation that is there when the weight is due.
        luts: added to what spreads a LUT; tables are small, and one zero does for all.
    """

    codes: str
    luts: str


class WeightNodes:
    """The nodes of one palettized weight.

    Args:
        graph: receives them.
        tensor: the weight.
        barrier: what keeps a runtime from folding the weight. None: it may be folded.
    """

    def __init__(self, graph: GraphBuilder, tensor: PalettizedTensor, barrier: Barrier | None = None) -> None:
        self._graph, self._tensor, self._barrier = graph, tensor, barrier
        self._layout = Layout(tensor.n_bits)
        self.rows, columns = tensor.index_shape
        self.groups_out, self.groups_in = tensor.groups
        self.group_rows, self.group_columns = self.rows // self.groups_out, columns // self.groups_in
        self._row_weights = tensor.numel // self.rows

    def parts(self, largest: int) -> list[Rows]:
        """Cut the rows into ranges of at most `largest` weights: whole row groups, or parts of one."""
        fits = self.group_rows * self._row_weights <= largest
        span = self.rows if fits else self.group_rows  # no range goes beyond it
        unit = self.group_rows if fits else 1
        pieces = -(-span // (max(largest // (unit * self._row_weights), 1) * unit))
        count = -(-span // (pieces * unit)) * unit
        return [
            Rows(start, min(start + count, first + span))
            for first in range(0, self.rows, span)
            for start in range(first, first + span, count)
        ]

    def values(self, rows: Rows, dtype: int) -> str:
        """Decode rows to floats, as `PalettizedTensor.decode` does.

        Args:
            rows: which.
            dtype: TensorProto type of the result, FLOAT or FLOAT16.

        Returns:
            Name of the value [rows.count * dim, columns].
        """
        return self._decode(rows, self._lut_values(self._group_range(rows), dtype))

    def entries(self, rows: Rows) -> str:
        """Decode rows to entries of an int8 LUT plus 128, uint8 [rows.count * dim, columns]."""
        assert self._tensor.lut_scale is not None
        return self._decode(rows, self._slice(self._lut(), self._group_range(rows), self.groups_out))

    @staticmethod
    def can_pack(tensor: PalettizedTensor) -> bool:
        """Whether `nibbles` can decode a weight: scalars, and symbols of whole bytes without padding."""
        layout, columns = Layout(tensor.n_bits), tensor.index_shape[1] // tensor.groups[1]
        return tensor.dim == 1 and layout.in_symbol > 1 and layout.padded(columns) == columns

    def nibbles(self, rows: Rows) -> str:
        """Decode rows to entries of -8..7 plus 8, two in a byte, low bits first: uint8 [rows.count, columns / 2]."""
        graph, symbols = self._graph, self._layout.indices_of_symbol()
        lut = self._slice(self._lut(), self._group_range(rows), self.groups_out)
        low, high = (
            graph.node(
                "Cast",
                graph.node("Gather", lut, graph.constant(symbols[:, place::2]), axis=2),
                to=_types().INT32,
            )
            for place in (0, 1)
        )
        both = graph.node("Add", low, graph.node("Mul", high, graph.constant(16, np.int32)))
        both = graph.node("Sub", both, graph.constant(17 * (_OFFSET - 8), np.int32))
        packed = graph.node("Cast", both, to=_types().UINT8)
        return self._reshape(
            self._select(rows, packed, self._layout.in_symbol // 2),
            rows.count,
            self._tensor.index_shape[1] // 2,
        )

    def scales(self, rows: Rows, blocks: int) -> str:
        """Spread the scales of an int8 LUT over blocks of columns, float32 [rows.count * dim, blocks]."""
        onnx_float, groups = _types().FLOAT, self._group_range(rows)
        scale = self._graph.node("Cast", self._slice(self._scale(), groups, self.groups_out), to=onnx_float)
        height = rows.count // groups.count * self._tensor.dim
        size = (groups.count, height, self.groups_in, blocks // self.groups_in)
        open_axes = self._graph.node("Unsqueeze", scale, self._graph.integers(1, 3))
        spread = self._graph.node("Expand", open_axes, self._graph.integers(*size))
        return self._reshape(spread, groups.count * height, blocks)

    def lookup(self, ids: str, dtype: int) -> str:
        """Rows of the weight as an embedding: ids int64 [batch, new] -> float [batch, new, columns].

        Only the codes of these rows are touched.
        """
        assert self._tensor.dim == 1
        graph, layout, types = self._graph, self._layout, _types()
        planes = [graph.node("Gather", plane, ids) for plane in self._codes()]
        symbols = graph.node("Cast", self._join(planes, (0, 0)), to=types.INT32)
        if layout.in_symbol > 1:
            symbols = graph.node("Gather", graph.constant(layout.indices_of_symbol()), symbols)
        indices = self._reshape(symbols, 0, 0, self.groups_in, layout.padded(self.group_columns))
        entries = 1 << self._tensor.n_bits
        if self.groups_in > 1:
            places = np.arange(self.groups_in, dtype=np.int32)[:, None] * entries
            indices = graph.node("Add", indices, graph.constant(places))
        if self.groups_out > 1:
            group = graph.node("Div", ids, graph.integers(self.group_rows))
            first = graph.node("Mul", group, graph.integers(entries * self.groups_in))
            first = graph.node("Cast", first, to=types.INT32)
            first = graph.node("Unsqueeze", first, graph.integers(2, 3))
            indices = graph.node("Add", indices, first)
        lut = self._reshape(self._lut_values(Rows(0, self.groups_out), dtype), -1)
        values = self._trim(graph.node("Gather", lut, indices), 3)
        return self._reshape(values, 0, 0, self._tensor.index_shape[1])

    def _decode(self, rows: Rows, lut: str) -> str:
        """Gather from a LUT [row groups, groups_in, entries, dim] what the indices of rows select."""
        graph, layout, dim = self._graph, self._layout, self._tensor.dim
        if layout.in_symbol > 1:
            lut = graph.node("Gather", lut, self._spread(), axis=2)
        values = self._select(rows, lut, layout.in_symbol * dim)
        padded = layout.padded(self.group_columns)
        if dim == 1 and padded == self.group_columns:
            return self._reshape(values, rows.count, self._tensor.index_shape[1])
        values = self._trim(self._reshape(values, rows.count, self.groups_in, padded, dim), 2)
        if dim == 1:
            return self._reshape(values, rows.count, self._tensor.index_shape[1])
        values = self._reshape(values, rows.count, self._tensor.index_shape[1], dim)
        values = graph.node("Transpose", values, perm=[0, 2, 1])
        return self._reshape(values, rows.count * dim, self._tensor.index_shape[1])

    def _select(self, rows: Rows, tables: str, width: int) -> str:
        """Gather what the symbols of rows stand for from tables [row groups, groups_in, symbols, ...] of `width`."""
        graph = self._graph
        planes = self._planes(rows)
        symbols = graph.node("Cast", self._join(planes, (rows.count, self.groups_in)), to=_types().INT32)
        if (offsets := self._offsets(rows)) is not None:
            symbols = graph.node("Add", symbols, offsets)
        tables = self._reshape(tables, -1, width) if width > 1 else self._reshape(tables, -1)
        return graph.node("Gather", tables, symbols)  # type: ignore[no-any-return]

    def _planes(self, rows: Rows) -> list[str]:
        """Codes of rows, uint8 [rows.count, groups_in, bytes] each."""
        zero = None if self._barrier is None else self._barrier.codes
        return [self._slice(plane, rows, self.rows, zero) for plane in self._codes()]

    def _join(self, planes: list[str], leading: tuple[int, int]) -> str:
        """Planes to symbols, uint8 [rows, groups_in, ...]."""
        if not self._layout.split:
            return planes[0]
        graph = self._graph
        low, high = planes
        (_, quads) = self._layout.bytes_of(self.group_columns)
        # [..., quads, 2] -> [..., quads, 2, 2], and [..., quads] likewise
        shape = (*leading, self.groups_in, quads, 2) if leading == (0, 0) else (*leading, quads, 2)
        low = graph.node("Gather", graph.constant(low_table()), self._index(self._reshape(low, *shape)))
        high = graph.node("Gather", graph.constant(high_table()), self._index(high))
        return graph.node("BitwiseOr", low, high)  # type: ignore[no-any-return]

    def _index(self, codes: str) -> str:
        return self._graph.node("Cast", codes, to=_types().INT32)  # type: ignore[no-any-return]

    def _offsets(self, rows: Rows) -> str | None:
        """Where the table of each group starts, int32 [rows, groups_in, 1, ...]; None when there is one table."""
        groups = self._group_range(rows)
        if groups.count * self.groups_in == 1:
            return None
        height = rows.count // groups.count
        group = np.arange(rows.count)[:, None] // height * self.groups_in + np.arange(self.groups_in)
        axes = (1, 1, 1) if self._layout.split else (1,)
        offsets = (group * self._layout.symbols).astype(np.int32)
        return self._graph.constant(offsets.reshape(rows.count, self.groups_in, *axes))

    def _lut_values(self, groups: Rows, dtype: int) -> str:
        """LUTs of row groups as they decode; a product with a scale that float16 does not hold is rounded to it once.

        A runtime may fold these few values. It is what follows, their repetition for each symbol, that it must not.
        """
        graph, types = self._graph, _types()
        values = self._lut()
        if self._tensor.lut_scale is not None:
            entries = graph.node("Cast", values, to=types.FLOAT)
            entries = graph.node("Sub", entries, graph.constant(_OFFSET, np.float32))
            scale = graph.node("Cast", self._scale(), to=types.FLOAT)
            scale = graph.node("Unsqueeze", scale, graph.integers(2, 3))
            values, held = graph.node("Mul", entries, scale), types.FLOAT
            if not has_exact_products(self._tensor):
                values, held = graph.node("Cast", values, to=types.FLOAT16), types.FLOAT16
        else:
            held = types.FLOAT16
        if dtype != held:
            values = graph.node("Cast", values, to=dtype)
        return self._slice(values, groups, self.groups_out)

    def _group_range(self, rows: Rows) -> Rows:
        """The row groups that rows lie in."""
        return Rows(rows.start // self.group_rows, (rows.stop - 1) // self.group_rows + 1)

    def _spread(self) -> str:
        """Entries of each symbol, int32 [symbols, in_symbol]."""
        graph, indices = self._graph, self._graph.constant(self._layout.indices_of_symbol())
        if self._barrier is None:
            return indices
        return graph.node("Add", indices, graph.node("Cast", self._barrier.luts, to=_types().INT32))  # type: ignore[no-any-return]

    def _slice(self, value: str, rows: Rows, whole: int, zero: str | None = None) -> str:
        """A range of the first axis of an initializer; with a zero, one that cannot be folded."""
        if rows == Rows(0, whole) and zero is None:
            return value
        graph = self._graph
        start = graph.integers(rows.start)
        if zero is not None:
            start = graph.node("Add", start, zero) if rows.start else zero
        return graph.node(  # type: ignore[no-any-return]
            "Slice", value, start, graph.integers(rows.stop), graph.integers(0)
        )

    def _trim(self, values: str, axis: int) -> str:
        """Cut the padding of column groups off."""
        if self._layout.padded(self.group_columns) == self.group_columns:
            return values
        graph = self._graph
        end = graph.integers(self.group_columns)
        return graph.node("Slice", values, graph.integers(0), end, graph.integers(axis))  # type: ignore[no-any-return]

    def _reshape(self, value: str, *shape: int) -> str:
        return self._graph.node("Reshape", value, self._graph.integers(*shape))  # type: ignore[no-any-return]

    def _codes(self) -> list[str]:
        tensor = self._tensor
        sizes = self._layout.bytes_of(self.group_columns)

        def declare(place: int, part: str) -> str:
            shape = (self.rows, self.groups_in, sizes[place])
            return self._graph.weight(
                part_name(tensor.name, part), np.uint8, shape, lambda: code_planes(tensor)[place]
            )

        return [declare(place, part) for place, part in enumerate((CODES, CODES_HIGH)[: len(sizes)])]

    def _lut(self) -> str:
        """LUTs as stored, [groups_out, groups_in, entries, dim]."""
        name, lut = part_name(self._tensor.name, LUT), self._tensor.lut
        shape = tuple(lut.shape)
        if self._tensor.lut_scale is None:
            return self._graph.weight(name, np.float16, shape, lut.numpy)
        return self._graph.weight(name, np.uint8, shape, lambda: (lut.short() + _OFFSET).byte().numpy())

    def _scale(self) -> str:
        """Scales as stored, float16 [groups_out, groups_in]."""
        scale = self._tensor.lut_scale
        assert scale is not None
        name = part_name(self._tensor.name, LUT_SCALE)
        return self._graph.weight(name, np.float16, tuple(scale.shape), scale.numpy)


class StackNodes(WeightNodes):
    """The nodes of several weights with the same layout, stacked: as many nodes as one weight takes.

    Args:
        graph: receives them.
        tensors: the weights; of the same `layout`.
        barrier: as for one weight.
    """

    def __init__(self, graph: GraphBuilder, tensors: Sequence[PalettizedTensor], barrier: Barrier) -> None:
        super().__init__(graph, tensors[0], barrier)
        self._each = [WeightNodes(graph, tensor, barrier) for tensor in tensors]
        self.rows = sum(nodes.rows for nodes in self._each)
        self.groups_out = sum(nodes.groups_out for nodes in self._each)

    @staticmethod
    def layout(tensor: PalettizedTensor) -> tuple[Any, ...]:
        """What weights must have in common."""
        rows, columns = tensor.index_shape
        scaled = tensor.lut_scale is not None and (True, has_exact_products(tensor))
        return tensor.n_bits, tensor.dim, columns, tensor.groups[1], rows // tensor.groups[0], scaled

    def weights(self, dtype: int) -> dict[str, str]:
        """Decode all to a TensorProto type: {name of the weight: name of the value [rows * dim, columns]}."""
        values = self.values(Rows(0, self.rows), dtype)
        sizes = self._graph.integers(*(nodes.rows * self._tensor.dim for nodes in self._each))
        parts = self._graph.node("Split", values, sizes, outputs=len(self._each), axis=0)
        return dict(zip((nodes._tensor.name for nodes in self._each), parts, strict=True))

    def _planes(self, rows: Rows) -> list[str]:
        """All codes; those of the first weight depend on the barrier, and so does what they are concatenated with."""
        first, *others = self._each
        planes = zip(first._planes(Rows(0, first.rows)), *(nodes._codes() for nodes in others), strict=True)
        return [self._graph.node("Concat", *parts, axis=0) for parts in planes]

    def _lut(self) -> str:
        return self._graph.node("Concat", *(nodes._lut() for nodes in self._each), axis=0)  # type: ignore[no-any-return]

    def _scale(self) -> str:
        return self._graph.node("Concat", *(nodes._scale() for nodes in self._each), axis=0)  # type: ignore[no-any-return]


def has_exact_products(tensor: PalettizedTensor) -> bool:
    """Whether all entries times their scale are numbers of float16, so that decoding needs no rounding."""
    assert tensor.lut_scale is not None
    product = tensor.lut.float() * tensor.lut_scale.float()[:, :, None, None]
    return torch.equal(product, tensor.lut_values().float())


def _types() -> Any:
    return load_onnx().TensorProto
