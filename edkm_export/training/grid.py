"""The grid that LUT entries live on, while they are trained and when they ship.

A centroid is learned in float32, and what the matrix product sees is that centroid rounded to what the
checkpoint can hold. The rounding is passed straight through in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edkm_export.palette import int8_scale

__all__ = ["Grid", "Rounded"]


@dataclass(frozen=True)
class Rounded:
    """LUTs on their grid.

    Attributes:
        values: what they decode to, float16 [groups, k].
        lut: as stored, float16 or int8 [groups, k].
        scale: float16 [groups] for int8, otherwise None.
    """

    values: Tensor
    lut: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Grid:
    """How entries are rounded.

    Attributes:
        lut_dtype: "float16", or "int8" with one float16 scale a group: about its largest entry over 127, so that
            the scale follows the entries as they are learned.
        in_bfloat16: keep to float16 values that bfloat16 holds as well, so that a product in bfloat16 sees the
            very weights that ship. Entries of an int8 grid take 11 bits and cannot: there, bfloat16 rounds.
    """

    lut_dtype: Literal["float16", "int8"] = "float16"
    in_bfloat16: bool = False

    def round(self, centroids: Tensor) -> Rounded:
        """Round centroids, float32 or float64 [groups, k]."""
        if self.lut_dtype == "int8":
            scale = int8_scale(centroids.abs().amax(1))
            steps = (centroids.double() / scale.double()[:, None]).round_().clamp_(-127, 127)
            lut = steps.to(torch.int8)
            return Rounded((lut.float() * scale.float()[:, None]).half(), lut, scale)
        # Rounded to 8 digits and then to float16: in its subnormal range the second rounding drops digits only.
        values = (centroids.bfloat16() if self.in_bfloat16 else centroids).half()
        return Rounded(values, values, None)
