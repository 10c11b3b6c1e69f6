"""The three precisions in which a program can run."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from converters.coreml.read.values import DType
from edkm_export.errors import InputError

__all__ = ["Precision"]


class Precision(Enum):
    """How floating point is held and rounded.

    FLOAT32: all arithmetic in float32, nothing rounded between the ops.
    ROUNDED: float32 arithmetic, and each value that is declared float16 is rounded to float16 after its op.
    FLOAT16: the native arithmetic of the declared types.
    """

    FLOAT32 = "float32"
    ROUNDED = "rounded"
    FLOAT16 = "float16"

    @classmethod
    def of(cls, name: str) -> Precision:
        """Find the precision of that name.

        Raises:
            InputError: there is none.
        """
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(precision.value for precision in cls)
            raise InputError(f"precision is {name!r}, expected one of {names}.") from None

    def carrier(self, dtype: DType) -> torch.dtype:
        """Tell in which torch dtype the interpreter holds values that are declared `dtype`."""
        if dtype.is_float and dtype.bits < 32 and self is not Precision.FLOAT16:
            return torch.float32
        return dtype.compute

    def settle(self, value: Tensor, dtype: DType, *, rounded: bool, owned: bool) -> Tensor:
        """Bring the result of an op to its declared type.

        Args:
            value: the result, any dtype.
            dtype: declared element type.
            rounded: the values are known to be representable in `dtype`.
            owned: nobody else holds the memory of `value`, so that it may be rounded in place.

        Returns:
            A tensor of `carrier(dtype)`.
        """
        carrier = self.carrier(dtype)
        if value.dtype != carrier:
            value = value.to(carrier)
            owned = True
        if rounded or self is not Precision.ROUNDED or carrier == dtype.stored or not dtype.is_float:
            return value
        narrow = value.to(dtype.stored)
        return value.copy_(narrow) if owned else narrow.to(carrier)
