"""Arrays in whatever form a caller has them, as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import InputError

__all__ = ["as_tensor"]


def as_tensor(value: Any, where: str) -> Tensor:
    """A tensor, a numpy array or nested lists of numbers as a tensor.

    Args:
        value: of any shape; an array or tensor keeps its dtype, lists of integers become int64, of others float32.
        where: what it is, for messages.

    Returns:
        A tensor on the CPU, detached.

    Raises:
        InputError: it is none of these, or lists of different lengths.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (str, bytes)) or value is None:
        raise InputError(f"{where} is {value!r:.40}, expected a tensor, an array or a list of numbers.")
    try:
        if hasattr(value, "__array__"):
            import numpy as np

            array = np.asarray(value)
            return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{where} is {type(value).__name__}, expected a tensor, an array or a list of numbers ({error})."
        ) from error
