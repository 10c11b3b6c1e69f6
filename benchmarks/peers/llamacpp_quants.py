"""llama.cpp's K- and I-quants with an importance matrix, by its own library ggml-base, called through ctypes.

The importance of a column is the mean square of the layer's inputs on the calibration text, which is what
llama-imatrix computes. A type whose blocks do not divide a row falls back as llama.cpp's own quantization does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from task import Task, inner_layers
from torch import Tensor

# Numbers of ggml_type in ggml.h.
TYPES = {
    "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16,
    "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_0",
    "Q6_K": "Q8_0",
}  # I-quants: IQ4_NL


class _Traits(ctypes.Structure):
    """The first fields of ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Ggml:
    """The library."""

    def __init__(self, folder: Path) -> None:
        self._library: Any = ctypes.CDLL(str(min(folder.glob("libggml-base.*"))))
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip

    def traits(self, name: str) -> _Traits:
        """Block sizes of a type, and how it is dequantized."""
        found: _Traits = self._library.ggml_get_type_traits(TYPES[name]).contents
        assert found.type_name.decode().upper() == name, f"{name} is {found.type_name!r} in this llama.cpp"
        return found

    def round_trip(self, weight: Tensor, name: str, importance: Tensor) -> tuple[Tensor, float]:
        """Quantized and dequantized, and the bits that it takes."""
        traits, (rows, columns) = self.traits(name), weight.shape
        values, energy = weight.float().cpu().contiguous(), importance.float().cpu().contiguous()
        row_bytes = columns // traits.blck_size * traits.type_size
        packed = ctypes.create_string_buffer(rows * row_bytes)
        written = self._library.ggml_quantize_chunk(
            TYPES[name], values.data_ptr(), ctypes.addressof(packed), 0, rows, columns, energy.data_ptr()
        )
        assert written == rows * row_bytes
        found = torch.empty_like(values)
        traits.to_float(ctypes.addressof(packed), found.data_ptr(), values.numel())
        return found, 8.0 * written

    def fitting(self, name: str, columns: int) -> str:
        """The type, or the one that llama.cpp takes instead for rows that its blocks do not divide."""
        if columns % self.traits(name).blck_size == 0:
            return name
        return FALLBACK.get(name, "IQ4_NL")


def energies(model: Any, windows: Tensor, device: str) -> dict[str, Tensor]:
    """{name: mean square of each input}."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        square = inputs.detach().flatten(0, -2).square().mean(0)
        sums[name] = sums[name] + square if name in sums else square

    hooks = [
        layer.register_forward_pre_hook(lambda _layer, args, name=name: add(name, args[0]))
        for name, layer in inner_layers(model).items()
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None].to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def main() -> None:
    task = Task.read()
    wanted, ggml = task.extra["type"], Ggml(Path(task.extra["libraries"]))
    model = task.load()
    importance = energies(model, task.windows, task.device)
    weights, bits, used = {}, {}, set()
    for name, layer in inner_layers(model).items():
        kind = ggml.fitting(wanted, layer.weight.shape[1])
        used.add(kind)
        key = f"{name}.weight"
        weights[key], bits[key] = ggml.round_trip(layer.weight.detach(), kind, importance[name])
    instead = ", ".join(sorted(used - {wanted}))
    words = f"{wanted}, importance matrix of {len(task.windows)} windows" + (
        f"; {instead} where rows do not divide into its blocks" if instead else ""
    )
    task.finish(weights, bits, f"{words}; {task.extra['version']}")


if __name__ == "__main__":
    main()
