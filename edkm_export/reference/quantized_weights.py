"""Folders whose weights are quantized already: dequantized where that is exact, refused by the method's name elsewhere.

transformers dequantizes FP8 (blocks, MXFP8, one scale a weight) and the affine integers of its Metal kernels on a CPU
without further packages. It takes the size of an FP8 block from the grid of scales, which is wrong where the last block
is cut off at the edge of a weight, and leaves a weight without a scale as it is: both are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edkm_export.reference.stored_tensors import StoredTensor, StoredTensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEQUANTIZED", "REFUSED", "Dequantization", "check_quantized", "finer_scales", "loading_arguments"]

DEQUANTIZED = {"fp8": "FP8", "mxfp8": "MXFP8", "metal": "Metal"}
"""{`quant_method`: its name} of what is dequantized."""

_ACTIVATIONS = "rounds activations too, so that there is no float model with the same logits"
REFUSED = {
    "aqlm": ("AQLM", "needs aqlm"),
    "auto-round": ("AutoRound", "needs auto-round"),
    "awq": ("AWQ", "needs gptqmodel"),
    "bitnet": ("BitNet", _ACTIVATIONS),
    "bitsandbytes": ("bitsandbytes", "needs bitsandbytes"),
    "compressed-tensors": ("compressed-tensors", "needs compressed-tensors"),
    "eetq": ("EETQ", "needs kernels and a GPU"),
    "fbgemm_fp8": ("FBGEMM FP8", "needs fbgemm-gpu and a GPU"),
    "fouroversix": ("Four Over Six", "needs fouroversix"),
    "fp_quant": ("FP-Quant", "needs fp_quant and a GPU"),
    "gemma": ("Gemma's static ranges", _ACTIVATIONS),
    "gguf": ("GGUF", "is read from the .gguf file"),
    "gptq": ("GPTQ", "needs gptqmodel and optimum"),
    "higgs": ("HIGGS", "needs flute-kernel and a GPU"),
    "hqq": ("HQQ", "needs hqq"),
    "mlx": ("MLX", "is not read by transformers"),
    "mxfp4": ("MXFP4", "is undone by transformers in the experts of GPT-OSS alone"),
    "nvfp4": ("NVFP4", "is not read by transformers"),
    "quanto": ("Quanto", "needs optimum-quanto"),
    "quark": ("Quark", "needs amd-quark"),
    "sinq": ("SINQ", "needs sinq"),
    "spqr": ("SpQR", "needs spqr_quant and a GPU"),
    "torchao": ("torchao", "needs torchao"),
    "vptq": ("VPTQ", "needs vptq and a GPU"),
}
"""{`quant_method`: (its name, why it cannot be undone here)}."""

_SCALE = "_scale_inv"
_FLOATS = ("F16", "BF16", "F32", "F64")
_EXPONENTS = ("U8", "F8_E8M0")  # bytes that stand for powers of two
_FP8 = "F8_E4M3"
_FP8_FIELDS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "modules_to_not_convert", "dequantize",
    "ignored_layers", "scale_fmt",
}  # fmt: skip
_METAL_FIELDS = {"quant_method", "bits", "group_size", "modules_to_not_convert", "dequantize"}
_METAL_BITS = (2, 4, 8)
_GIVE = "give the float model"


@dataclass
class Dequantization:
    """What is done to quantized weights.

    Attributes:
        scales: tensors that are used to dequantize others.
        shapes: {packed weight: shape of what it holds}.
        without_effect: {tensor: why it changes no logit}.
        not_understood: {tensor or setting: what is missing}.
        remarks: what was done, in words.
    """

    scales: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
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
    if settings is None and "quantization" not in config:
        for name, tensor in tensors.items():
            if tensor.dtype not in _FLOATS:
                found.not_understood[name] = (
                    f"holds {tensor.dtype} values, and nothing says by which scale they count: config.json has no "
                    f"quantization_config; {_GIVE}"
                )
        return found
    method = _method(config)
    if method in ("fp8", "mxfp8"):
        _check_fp8(found, config["quantization_config"], tensors)
    elif method == "metal":
        _check_metal(found, config["quantization_config"], tensors)
    else:
        name, why = REFUSED.get(str(method), (repr(method), "is not known here"))
        place = "quantization_config" if settings is not None else "quantization"
        found.not_understood[place] = f"its weights are quantized by {name}, which {why}; {_GIVE}"
    return found


def _method(config: Mapping[str, Any]) -> Any:
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return "mlx" if settings is None else None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_method" not in settings and (
        "quantization" in config or {"bits", "group_size"} <= settings.keys()
    ):
        return "mlx"  # writes the same under both names
    return settings.get("quant_method")


def _refuse_fields(found: Dequantization, settings: Mapping[str, Any], known: set[str], name: str) -> None:
    for key in settings.keys() - known:
        found.not_understood[f"quantization_config.{key}"] = f"is {settings[key]!r}, unknown for {name}"


def _check_fp8(
    found: Dequantization, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    _refuse_fields(found, settings, _FP8_FIELDS, "FP8")
    block = settings.get("weight_block_size")
    sides = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if not sides and block is not None:
        found.not_understood["quantization_config.weight_block_size"] = (
            f"is {block!r}, expected the two sides of a block; {_GIVE}"
        )
        return
    if settings.get("scale_fmt") not in (None, "float", "ue8m0"):
        found.not_understood["quantization_config.scale_fmt"] = f"is {settings['scale_fmt']!r}; {_GIVE}"
    bytes_are_exponents = settings.get("scale_fmt") == "ue8m0" or settings.get("quant_method") == "mxfp8"
    quantized = 0
    for name, tensor in tensors.items():
        weight = f"{name.removesuffix('.activation_scale')}.weight"
        if name.endswith(".activation_scale") and f"{weight}{_SCALE}" in tensors:
            found.without_effect[name] = "rounds activations while the model runs; they are not rounded here"
        if name.endswith((_SCALE, ".activation_scale")):
            continue
        scale = tensors.get(f"{name}{_SCALE}")
        if tensor.dtype == _FP8 and scale is not None:
            if reason := _misfit(tensor, scale, block):
                found.not_understood[name] = f"{reason}; {_GIVE}"
            if scale.dtype not in _FLOATS and not (scale.dtype in _EXPONENTS and bytes_are_exponents):
                found.not_understood[scale.name] = f"holds scales as {scale.dtype}; {_GIVE}"
            quantized += 1
            found.scales.add(scale.name)
        elif tensor.dtype not in _FLOATS:
            found.not_understood[name] = f"holds {tensor.dtype} values without {name}{_SCALE}; {_GIVE}"
        elif scale is not None:
            found.not_understood[scale.name] = f"is a scale, but {name} holds {tensor.dtype} values"
    grid = f"blocks of {block[0]}x{block[1]}" if block else "one a weight"
    found.remarks.append(
        f"{quantized} FP8 weights were dequantized in float32 by their scales, {grid}; activations are not rounded"
    )


def _misfit(tensor: StoredTensor, scale: StoredTensor, block: list[int] | None) -> str:
    """Why scales are not those of a weight; empty when they are."""
    if block is None:
        if math.prod(scale.shape) == 1 and len(scale.shape) <= 2:
            return ""
        return f"has scales {list(scale.shape)}, and quantization_config has no weight_block_size"
    grid = tuple(-(-side // size) for side, size in zip(tensor.shape, block, strict=False))
    if len(tensor.shape) == 2 and scale.shape == grid:
        return ""
    return (
        f"has shape {list(tensor.shape)} and scales {list(scale.shape)}, which do not fit blocks of "
        f"{block[0]}x{block[1]}"
    )


def _check_metal(
    found: Dequantization, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    _refuse_fields(found, settings, _METAL_FIELDS, "Metal")
    bits, size = settings.get("bits"), settings.get("group_size")
    if bits not in _METAL_BITS or type(size) is not int or size < 1:
        found.not_understood["quantization_config"] = (
            f"has bits {bits!r} and group_size {size!r}, expected {', '.join(map(str, _METAL_BITS))} bits and a number "
            f"of weights; {_GIVE}"
        )
        return
    quantized = 0
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in ("scales", "qbiases"):
            continue
        if tensor.dtype in _FLOATS:
            continue
        parts = [tensors.get(f"{stem}.{each}") for each in ("scales", "qbiases")]
        columns = tensor.shape[-1] * (32 // bits) if tensor.shape else 0
        fits = len(tensor.shape) == 2 and all(
            part is not None and part.shape == (tensor.shape[0], columns // size) and part.dtype in _FLOATS
            for part in parts
        )
        if tensor.dtype != "U32" or last != "weight" or not fits or columns % size:
            found.not_understood[name] = (
                f"holds {tensor.dtype} values {list(tensor.shape)} that {stem}.scales and {stem}.qbiases do not fit, "
                f"at {bits} bits in groups of {size}; {_GIVE}"
            )
            continue
        quantized += 1
        found.shapes[name] = (tensor.shape[0], columns)
        found.scales |= {part.name for part in parts if part is not None}
    found.remarks.append(
        f"{quantized} weights of {bits} bits were dequantized in float32 by their scales and offsets, groups of {size}"
    )


def finer_scales(config: Mapping[str, Any], stored: StoredTensors) -> dict[str, Tensor]:
    """Scales of FP8 weights whose last blocks are cut off, repeated for blocks that divide the weight.

    Args:
        config: contents of config.json, which `check_quantized` took.
        stored: what the files hold.

    Returns:
        {name of the scales: the same for smaller blocks}; empty where all blocks are whole.
    """
    if _method(config) not in ("fp8", "mxfp8"):
        return {}
    block = config["quantization_config"].get("weight_block_size")
    found = {}
    for name, tensor in stored.tensors.items():
        if block is None or tensor.dtype != _FP8:
            continue
        if any(side % size for side, size in zip(tensor.shape, block, strict=True)):
            found[f"{name}{_SCALE}"] = _repeated(stored.read(f"{name}{_SCALE}"), tensor.shape, block)
    return found


def _repeated(scale: Tensor, shape: tuple[int, ...], block: list[int]) -> Tensor:
    """Scales [blocks of rows, blocks of columns] of smaller blocks."""
    import torch

    dtype = scale.dtype
    if scale.element_size() == 1:  # of exponents nothing can be selected
        scale = scale.view(torch.uint8)
    for axis, (side, size) in enumerate(zip(shape, block, strict=True)):
        part = math.gcd(side, size)
        scale = scale.repeat_interleave(size // part, axis).narrow(axis, 0, side // part)
    return scale.contiguous().view(dtype)


def loading_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that let transformers dequantize what `check_quantized` took."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return {}
    import transformers

    if _method(config) == "metal":
        kept = {name: settings[name] for name in ("bits", "group_size")}
        return {
            "quantization_config": transformers.MetalConfig(dequantize=True, **kept),
            "device_map": {"": "cpu"},  # it would choose Apple's GPU
        }
    block = settings.get("weight_block_size")
    kept = {name: settings[name] for name in ("scale_fmt",) if settings.get(name)}
    wanted = transformers.FineGrainedFP8Config(
        dequantize=True, weight_block_size=None if block is None else tuple(block), **kept
    )
    return {"quantization_config": wanted}
