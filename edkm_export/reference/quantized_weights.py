"""Folders whose weights are quantized already: dequantized where that is exact, refused by the method's name elsewhere.

transformers dequantizes FP8 in blocks without further packages. It takes the size of a block from the grid of
scales and leaves a weight without a scale as it is, so both are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edkm_export.reference.stored_tensors import StoredTensor

__all__ = ["Dequantization", "check_quantized", "loading_arguments"]

_SCALE = "_scale_inv"
_FLOATS = ("F16", "BF16", "F32", "F64")
_FP8 = "F8_E4M3"
_FP8_FIELDS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "modules_to_not_convert", "dequantize",
    "ignored_layers",
}  # fmt: skip
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
    "fbgemm_fp8": "FBGEMM FP8",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "bitnet": "BitNet",
}


@dataclass
class Dequantization:
    """What is done to quantized weights.

    Attributes:
        scales: tensors that are used to dequantize others.
        not_understood: {tensor or setting: what is missing}.
        remarks: what was done, in words.
    """

    scales: set[str] = field(default_factory=set)
    not_understood: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def check_quantized(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Dequantization:
    """Look at `quantization_config` and at the types of the stored tensors.

    Args:
        config: contents of config.json.
        tensors: what the files hold.
    """
    found = Dequantization()
    settings = config.get("quantization_config")
    if settings is None:
        for name, tensor in tensors.items():
            if tensor.dtype not in _FLOATS:
                found.not_understood[name] = (
                    f"holds {tensor.dtype} values, and nothing says by which scale they count: config.json has no "
                    "quantization_config; give the float model"
                )
        return found
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if isinstance(settings, Mapping) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(settings, Mapping) or method != "fp8":
        name = _NAMES.get(str(method), repr(method))
        found.not_understood["quantization_config"] = (
            f"its weights are quantized by {name}, which cannot be undone here; give the float model"
        )
        return found
    _check_fp8(found, settings, tensors)
    return found


def _check_fp8(
    found: Dequantization, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    for name in settings.keys() - _FP8_FIELDS:
        found.not_understood[f"quantization_config.{name}"] = f"is {settings[name]!r}, unknown for FP8"
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        found.not_understood["quantization_config.weight_block_size"] = (
            f"is {block!r}, expected the two sides of a block; give the float model"
        )
        return
    quantized = 0
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            continue
        scale = tensors.get(f"{name}{_SCALE}")
        if tensor.dtype == _FP8 and scale is not None:
            grid = tuple(-(-side // size) for side, size in zip(tensor.shape, block, strict=False))
            whole = all(side % size == 0 for side, size in zip(tensor.shape, block, strict=False))
            if len(tensor.shape) != 2 or scale.shape != grid or not whole:
                found.not_understood[name] = (
                    f"has shape {list(tensor.shape)} and scales {list(scale.shape)}, which do not fit whole blocks of "
                    f"{block[0]}x{block[1]}; give the float model"
                )
            if scale.dtype not in _FLOATS:
                found.not_understood[scale.name] = f"holds scales as {scale.dtype}; give the float model"
            quantized += 1
            found.scales.add(scale.name)
        elif tensor.dtype not in _FLOATS:
            found.not_understood[name] = (
                f"holds {tensor.dtype} values without {name}{_SCALE}; give the float model"
            )
        elif scale is not None:
            found.not_understood[scale.name] = f"is a scale, but {name} holds {tensor.dtype} values"
    found.remarks.append(
        f"{quantized} FP8 weights were dequantized in float32 by their scales, blocks of {block[0]}x{block[1]}; "
        "activations are not rounded"
    )


def loading_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that let transformers dequantize what `check_quantized` took."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return {}
    from transformers import FineGrainedFP8Config

    block = tuple(settings["weight_block_size"])
    return {"quantization_config": FineGrainedFP8Config(dequantize=True, weight_block_size=block)}
