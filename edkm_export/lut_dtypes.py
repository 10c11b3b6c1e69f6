"""What LUT entries can be: the one table that recipes, checkpoints, converters and reports read.

Importing it does not import torch, which the help of the commands must not wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LUT_DTYPES", "LUT_DTYPE_NAMES", "LutDtype", "LutFormat", "stored_as"]

LutDtype = Literal["float16", "int8", "int4"]
LUT_DTYPE_NAMES: Final[tuple[LutDtype, ...]] = get_args(LutDtype)

_SCALE_BITS = 16  # of a float16


@dataclass(frozen=True)
class LutFormat:
    """One kind of LUT entries.

    Attributes:
        name: as recipes and command lines give it.
        storage_name: torch dtype of the stored entries, "float16" or "int8".
        storage_bits: bits that an entry takes in a checkpoint and in what is exported.
        levels: lowest and highest entry that palettization and training choose; None: any finite float16.
        valid: lowest and highest entry that a file may hold, or None.
        max_bits: most bits of an index.
        scaled: each LUT has a float16 scale; the value of an entry is entry * scale.
    """

    name: LutDtype
    storage_name: Literal["float16", "int8"]
    storage_bits: int
    levels: tuple[int, int] | None
    valid: tuple[int, int] | None
    max_bits: int
    scaled: bool

    @property
    def storage(self) -> torch.dtype:
        """Torch dtype of the stored entries."""
        import torch

        return {"float16": torch.float16, "int8": torch.int8}[self.storage_name]

    def holds(self, lut: Tensor) -> bool:
        """True when entries of any shape are stored in this dtype and within its range."""
        if lut.dtype != self.storage:
            return False
        if self.valid is None or not lut.numel():
            return True
        low, high = (int(end) for end in lut.aminmax())
        return self.valid[0] <= low and high <= self.valid[1]

    def lut_bits(self, n_bits: int) -> int:
        """Bits of storage of one LUT for indices of `n_bits`, its scale included."""
        return (self.storage_bits << n_bits) + (_SCALE_BITS if self.scaled else 0)


LUT_DTYPES: Final = MappingProxyType[LutDtype, LutFormat](
    {
        "float16": LutFormat("float16", "float16", 16, None, None, max_bits=8, scaled=False),
        # symmetric, so that a LUT and its negative have the same grid; -128 comes from other tools
        "int8": LutFormat("int8", "int8", 8, (-127, 127), (-128, 127), max_bits=8, scaled=True),
        # no deployment format packs entries: an int4 LUT is stored as int8. With 4 bits of an index every
        # level would be an entry, and there would be nothing left to choose.
        "int4": LutFormat("int4", "int8", 8, (-8, 7), (-8, 7), max_bits=3, scaled=True),
    }
)
"""All LUT dtypes, by name."""


def stored_as(dtype: torch.dtype) -> LutFormat | None:
    """The LUT dtype whose entries are all that a torch dtype holds; None: there is none."""
    return next((each for each in LUT_DTYPES.values() if each.storage == dtype), None)
