"""How much memory a package may ask for, before any of it is taken.

A few bytes of a program declare a state of gigabytes, or repeat a value a billion times. What a package declares is
held against what it has on disk: a bit of a palette decodes to one float32, which is 32 times its size, and a vector
palette to some more; beyond that there is room for the states and activations of a model of any usual size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

from converters.coreml.read.values import TensorType
from edkm_export.errors import PackageError

__all__ = ["MOST_COMPUTED", "Budget", "require_computable"]

_FLOAT32_BYTES = 4
_LEAST_BYTES = 1 << 29
_BYTES_PER_STORED = 64
MOST_COMPUTED = 1 << 27
"""Elements of a result whose shape an op computes from numbers: 512 MB of float32."""


@dataclass(frozen=True)
class Budget:
    """Of one package.

    Attributes:
        most_bytes: of all states of a function together, and of any one value.
    """

    most_bytes: int

    @classmethod
    def of(cls, size_bytes: int) -> Budget:
        """Of a package that has so many bytes on disk."""
        whole = psutil.virtual_memory().total  # a sparse file has any size
        return cls(min(_LEAST_BYTES + _BYTES_PER_STORED * size_bytes, whole))

    def require(self, declared: TensorType, owner: str) -> None:
        """Refuse a value that is larger than the package bears out.

        Raises:
            PackageError: it is.
        """
        numel = declared.numel
        if numel is not None and numel * _FLOAT32_BYTES > self.most_bytes:
            raise PackageError(
                f"{owner}: declared as {declared}, which is {numel} elements; no package of this size needs them."
            )

    def require_states(self, declared: Iterable[TensorType], owner: str) -> None:
        """Refuse states that are together larger than the package bears out.

        Raises:
            PackageError: they are.
        """
        numel = sum(each.numel or 0 for each in declared)
        if numel * _FLOAT32_BYTES > self.most_bytes:
            raise PackageError(
                f"{owner}: its states have {numel:,} elements together; no package of this size needs them."
            )


def require_computable(shape: Sequence[int]) -> None:
    """Refuse the shape of a result that no device can hold.

    Raises:
        ValueError: it is one.
    """
    if min(shape, default=0) < 0 or max(shape, default=0) >= 1 << 31 or math.prod(shape) > MOST_COMPUTED:
        raise ValueError(f"shape {list(shape)} is absurd")
