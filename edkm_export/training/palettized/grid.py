"""The grid that LUT entries live on, while they are trained and when they ship.

A centroid is learned in float32, and what the matrix product sees is that centroid rounded to what the
checkpoint can hold. The rounding is passed straight through in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edkm_export.lut_grid import LutDtype, Rounded, round_to_grid

__all__ = ["Grid", "Rounded"]


@dataclass(frozen=True)
class Grid:
    """How entries are rounded.

    Attributes:
        lut_dtype: "float16", or "int8" or "int4" with one float16 scale a group, which follows the entries as they
            are learned (see `lut_grid`).
        in_bfloat16: keep to float16 values that bfloat16 holds as well, so that a product in bfloat16 sees the
            very weights that ship. Entries of an int4 grid take 8 bits and always are such values. Those of an int8
            grid take 11 and cannot: there, bfloat16 rounds.
    """

    lut_dtype: LutDtype = "float16"
    in_bfloat16: bool = False

    def round(self, centroids: Tensor) -> Rounded:
        """Round centroids, float32 or float64 [groups, k]."""
        if self.lut_dtype == "float16" and self.in_bfloat16:
            # Rounded to 8 digits and then to float16: in its subnormal range the second rounding drops digits only.
            centroids = centroids.bfloat16()
        return round_to_grid(centroids, self.lut_dtype)
