"""Size of weight.bin, predicted from a module before it is converted.

The file starts with a header of 64 bytes; each constant of at least ten elements takes a record of 64 bytes and its
data, aligned to 64 (see `blob`). The constants are the parameters and buffers of what is traced, and the biases of
zeros that coremltools gives to linear layers without one. coremltools leaves out a product with ones and a sum with
zeros, so that norms that were never trained have no constants.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from converters.coreml.format import STATES
from converters.coreml.write.vocabulary import SplitHead
from edkm_export.decoder.delta_rule import TriangleBuffers
from edkm_export.decoder.linear_attention import GatedDeltaNet
from edkm_export.decoder.norms import LayerNorm, RMSNorm
from edkm_export.palette import PalettizedTensor

__all__ = ["predict_size"]

_ALIGNMENT = 64
_SMALLEST_STORED = 10  # elements; smaller constants stay in the program


def predict_size(
    module: nn.Module,
    palettized: Mapping[str, PalettizedTensor],
    prefix: str = "decoder.",
    unused: Collection[str] = (),
    *,
    merged: bool = False,
) -> int:
    """Bytes of weight.bin.

    Args:
        module: what will be traced.
        palettized: {parameter name: palette}.
        prefix: of the names in `palettized` in `module`.
        unused: buffers that the forward pass does not read.
        merged: functions are merged afterwards, which stores equal constants once.
    """
    left_out = {id(parameter) for layer in module.modules() for parameter in _without_effect(layer)}
    precise = {id(tensor) for layer in module.modules() for tensor in _in_float32(layer)}
    stored: set[tuple[int, str]] = set()  # dense constants that are counted, when functions are merged
    blobs: list[tuple[int, int]] = []  # elements, bytes
    tables: set[int] = set()  # LUTs that are counted; parts of a vocabulary share theirs
    for path, parameter in module.named_parameters():
        name = path.removeprefix(prefix)
        if name in palettized:
            tensor = palettized[name]
            blobs.append((math.prod(tensor.index_shape), tensor.indices.numel()))
            if tensor.lut.data_ptr() not in tables:
                tables.add(tensor.lut.data_ptr())
                blobs.append((tensor.lut.numel(), tensor.lut.numel() * tensor.lut.element_size()))
            if tensor.lut_scale is not None:
                blobs.append((tensor.lut_scale.numel(), tensor.lut_scale.numel() * 2))
        elif id(parameter) not in left_out:
            key = _content(parameter)
            if not (merged and key in stored):
                width = 4 if id(parameter) in precise else 2
                blobs.append((parameter.numel(), parameter.numel() * width))
            stored.add(key)
    for path, buffer in module.named_buffers():
        if path not in (*STATES, *unused):
            width = 2 if buffer.is_floating_point() and id(buffer) not in precise else 4
            blobs.append((buffer.numel(), buffer.numel() * width))
    zeros: set[int] = set()  # one bias of each length is kept
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "bias" not in dict(layer.named_parameters()):
            zeros.add(layer.out_features)
        elif isinstance(layer, SplitHead):
            zeros |= {end - start for _, start, end in layer.spans}
    blobs += [(size, size * 2) for size in zeros if not (merged and _content(torch.zeros(size)) in stored)]
    aligned = (
        math.ceil(size / _ALIGNMENT) * _ALIGNMENT for count, size in blobs if count >= _SMALLEST_STORED
    )
    return _ALIGNMENT + sum(size + _ALIGNMENT for size in aligned)


def _without_effect(layer: nn.Module) -> list[Tensor]:
    """Parameters of a norm that multiply by one or add zero; of other modules, none is left out."""
    found: list[Tensor] = []
    if isinstance(layer, LayerNorm) or (isinstance(layer, RMSNorm) and not layer.offset):
        found += [layer.weight] if bool((layer.weight == 1).all()) else []
    if isinstance(layer, LayerNorm) and layer.bias is not None:
        found += [layer.bias] if bool((layer.bias == 0).all()) else []
    return found


def _in_float32(layer: nn.Module) -> list[Tensor]:
    """Parameters and buffers that only operations in float32 read."""
    if isinstance(layer, GatedDeltaNet):
        return [layer.A_log, layer.dt_bias]
    return list(layer.buffers()) if isinstance(layer, TriangleBuffers) else []


def _content(parameter: Tensor) -> tuple[int, str]:
    """Tells constants of different content apart: elements, and a digest of their float16 bits."""
    bits = parameter.detach().half().contiguous().view(-1).view(torch.uint8).numpy()
    return parameter.numel(), hashlib.sha256(bits.data).hexdigest()
