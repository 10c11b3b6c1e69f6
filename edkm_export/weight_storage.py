"""How much a palettized weight takes: indices, LUTs, and the scales of LUTs on a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edkm_export.lut_dtypes import LUT_DTYPES
from edkm_export.recipe import Rule

__all__ = ["average_bits", "storage_bits"]


def storage_bits(shape: Sequence[int], rule: Rule) -> int:
    """Bits that a weight of this shape takes under a rule: indices, LUTs, and the scales of int8 and int4 LUTs.

    An entry of an int4 LUT is stored in 8 bits, too.
    """
    groups = shape[0] // (rule.group_size or shape[0])
    return math.prod(shape) * rule.bits + groups * LUT_DTYPES[rule.lut_dtype].lut_bits(rule.bits)


def average_bits(shapes: Mapping[str, Sequence[int]], plan: Mapping[str, Rule]) -> float:
    """Bits a weight over the layers of a plan, LUTs included.

    Args:
        shapes: {module name: weight shape}, at least of the plan's layers.
        plan: {module name: rule}.
    """
    size = sum(storage_bits(shapes[name], rule) for name, rule in plan.items())
    return size / max(1, sum(math.prod(shapes[name]) for name in plan))
