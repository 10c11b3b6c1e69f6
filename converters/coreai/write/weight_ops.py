"""Weights as operators of our own, so that a trace holds names instead of numbers.

`torch.export` sees an operator that gives a weight of some shape; its lowering puts the palette into the program as it
is. A palettized weight is therefore never decoded, and any number of bits goes in that the format can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.coreai.backend import load_authoring
from edkm_export.packing import pack
from edkm_export.palette import PalettizedTensor

__all__ = ["Lowering", "named_weights", "stored_form"]


@torch.library.custom_op("edkm::weight", mutates_args=())
def _weight(like: Tensor, name: str, rows: int, columns: int) -> Tensor:
    return like.new_zeros(rows, columns)


@_weight.register_fake
def _(like: Tensor, name: str, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns)


class _Named(nn.Module):
    """A module whose weight [rows, columns] is known by its name."""

    like: Tensor

    def __init__(self, name: str, shape: tuple[int, int], like: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("like", like, persistent=False)

    def weight_of(self) -> Tensor:
        return torch.ops.edkm.weight(self.like, self.name, *self.shape)  # type: ignore[no-any-return]


class _NamedLinear(_Named):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_of(), self.bias)


class _NamedEmbedding(_Named):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight_of())


def named_weights(
    model: nn.Module, palettized: Mapping[str, PalettizedTensor], tied: Mapping[str, str], like: Tensor
) -> None:
    """Put modules with named weights in the place of those whose weight is palettized.

    Args:
        model: on any device; its other parameters stay as they are.
        palettized: by the name of the parameter.
        tied: {alias: name of the parameter that it shares}.
        like: an empty tensor of the dtype that the weights have in the trace.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        parameter = tied.get(f"{name}.weight", f"{name}.weight")
        if parameter not in palettized:
            continue
        shape = (int(module.weight.shape[0]), int(module.weight.shape[1]))
        kind = _NamedLinear if isinstance(module, nn.Linear) else _NamedEmbedding
        bias = getattr(module, "bias", None)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kind(parameter, shape, like, bias))


def stored_form(tensor: PalettizedTensor, *, pad_3bit: bool) -> PalettizedTensor:
    """What goes into the file: the palette itself, or one of 3 bits with its indices held in 4."""
    if not pad_3bit or tensor.n_bits != 3:
        return tensor
    lut = torch.cat([tensor.lut, torch.zeros_like(tensor.lut)], dim=2)  # entries that no index selects
    return replace(
        tensor, n_bits=4, lut=lut, indices=pack(tensor.unpack_indices(), 4), lut_dtype=_stored_name(tensor)
    )


def _stored_name(tensor: PalettizedTensor) -> Any:
    """LUT dtype by storage: an int4 grid is for up to 3 bits, and its entries are stored as int8."""
    return "float16" if tensor.lut_scale is None else "int8"


class Lowering:
    """Puts palettes into a program where the trace names them.

    Args:
        palettized: by name.
        pad_3bit: hold 3-bit indices as 4-bit ones.

    Attributes:
        used: names that were met.
    """

    def __init__(self, palettized: Mapping[str, PalettizedTensor], *, pad_3bit: bool = False) -> None:
        self._palettized, self._pad = palettized, pad_3bit
        self._core = load_authoring()
        self.used: set[str] = set()

    def register(self, converter: Any) -> None:
        """Tell a `TorchConverter` of it."""

        @converter.register_torch_lowering("edkm::weight.default")  # type: ignore[untyped-decorator]
        def lower(values: dict[Any, Any], node: Any, loc: Any) -> Any:
            name = node.args[1]
            key = ("edkm::weight", name)  # a tied weight is decoded once in a function
            if key not in values:
                values[key] = self._decoded(self._palettized[name])
                self.used.add(name)
            return values[key]

    def _decoded(self, given: PalettizedTensor) -> Any:
        core, tensor = self._core, stored_form(given, pad_3bit=self._pad)
        n_bits = tensor.n_bits
        kind = core.ir.RankedTensorType.get(
            list(tensor.index_shape), core.ir.IntegerType.get_unsigned(n_bits)
        )
        packed = tensor.indices.numpy()
        # of whole bytes the package wants the shape, of packed ones the bytes
        data = packed.reshape(tensor.index_shape) if n_bits == 8 else packed
        stored = core.ops.ConstantOp(value=core.elements(kind, data)).result
        values = core.ops.constant(tensor.lut.contiguous().numpy())
        if tensor.lut_scale is not None:
            values = self._scaled(values, tensor.lut_scale)
        return core.ops.lut_to_dense(stored, values, core.ops.constant(np.array(0, np.int16)))

    def _scaled(self, values: Any, scale: Tensor) -> Any:
        """int8 entries [G_out, G_in, entries, dim] times scale float16 [G_out, G_in]."""
        ops = self._core.ops
        per_lut = scale[:, :, None, None].contiguous()
        none = torch.zeros_like(per_lut, dtype=torch.int8)
        # minus zero, since adding plus zero would take the sign of a negative zero
        return ops.blockwise_shift_scale(
            values,
            ops.constant(per_lut.numpy()),
            ops.constant(none.numpy()),
            ops.constant((-torch.zeros_like(per_lut)).numpy()),
        )
