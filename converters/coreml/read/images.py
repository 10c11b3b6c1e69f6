"""Images as inputs and outputs of a program: between Pillow and tensors [1, channels, height, width]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from converters.coreml.read.program import FunctionInput
from edkm_export.errors import BackendMissingError, InputError
from edkm_export.regular_file import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["from_image", "read_image", "to_image"]

# Mode of Pillow for a colour layout of the description.
_MODES = {"RGB": "RGB", "BGR": "RGB", "GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F"}


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendMissingError("Images need Pillow: pip install 'edkm-export[coreml]'") from error
    return Image


def read_image(path: Path, declared: FunctionInput, layout: str) -> Tensor:
    """Read a file for an input that the description says is an image.

    Args:
        path: of the image, in any format of Pillow.
        declared: the input.
        layout: its colour layout, such as `BGR`.

    Returns:
        of the declared dtype [1, channels, height, width], values as in the file (0 to 255 for 8 bits).

    Raises:
        InputError: not an image, or of another size.
        BackendMissingError: Pillow is not installed.
    """
    pillow = _pillow()
    try:
        with open_regular(path) as file, pillow.open(file) as opened:
            image = opened.convert(_mode(layout, declared.name))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an image that can be read ({error}).") from error
    tensor = from_image(image, declared, layout)
    shape = declared.type.shape
    if shape is not None and len(shape) == 4:
        wanted = [found if size is None else size for size, found in zip(shape, tensor.shape, strict=True)]
        if wanted != list(tensor.shape):
            raise InputError(
                f"{path}: {image.width} x {image.height} pixels, but input {declared.name!r} takes "
                f"{wanted[3]} x {wanted[2]}; resize it first."
            )
    return tensor


def from_image(image: Image, declared: FunctionInput, layout: str) -> Tensor:
    """An image of Pillow as an input [1, channels, height, width] of the declared dtype.

    Raises:
        InputError: it has another mode than the layout asks for.
    """
    mode = _mode(layout, declared.name)
    if image.mode != mode:
        raise InputError(f"input {declared.name!r} takes an image of mode {mode}, found {image.mode}.")
    pixels = torch.from_numpy(np.array(image, np.float32))
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
    ordered = pixels.flip(0) if layout == "BGR" else pixels
    return ordered[None].to(declared.type.dtype.compute)


def to_image(value: Tensor, layout: str, name: str) -> Image:
    """An output [1, channels, height, width] as an image of Pillow; values are rounded and clamped to 8 bits.

    Raises:
        InputError: it has no such shape.
    """
    mode = _mode(layout, name)
    channels = 3 if mode == "RGB" else 1
    if value.dim() != 4 or value.shape[:2] != (1, channels):
        raise InputError(f"output {name!r} is {list(value.shape)}, expected an image [1, {channels}, h, w].")
    pixels = value[0].float()
    if mode == "F":
        image: Image = _pillow().fromarray(pixels[0].numpy(), "F")
        return image
    pixels = (pixels.flip(0) if layout == "BGR" else pixels).round().clamp(0, 255).to(torch.uint8)
    array = pixels[0] if channels == 1 else pixels.movedim(0, -1)
    made: Image = _pillow().fromarray(array.contiguous().numpy(), mode)
    return made


def _mode(layout: str, name: str) -> str:
    if layout not in _MODES:
        raise InputError(f"{name!r} is an image of colour layout {layout}, which is not supported.")
    return _MODES[layout]
