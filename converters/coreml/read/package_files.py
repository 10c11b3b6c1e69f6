"""What the verifier asks of the files of exported packages, whatever they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from converters.coreml.read.description import Description
from converters.coreml.read.joined_vocabulary import joined_dense, joined_palettes, read_splits
from converters.coreml.read.package import Package
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor

__all__ = ["KIND", "PackageFiles"]

KIND = "Core ML package"


class PackageFiles:
    """The weights of a model in one package or in several, and their sizes.

    Args:
        packages: in the order in which they run.
        description: how they are called.

    Raises:
        PackageError: a file of weights is missing.
    """

    kind = KIND

    def __init__(self, packages: Sequence[Package], description: Description) -> None:
        self._packages, self.description = packages, description
        self.path: Path = packages[0].path
        self.context = description.context
        _ = self.weights_size_bytes()  # opens every file of weights

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by parameter name, read from disk."""
        found: dict[str, PalettizedTensor] = {}
        for package, where in self.functions():
            splits = read_splits(package.metadata, str(package.path))
            joined = joined_palettes(package.palettized(where), splits, str(package.path))
            for name, tensor in joined.items():
                # A tied embedding is in the first and in the last package, every weight in both functions.
                if name in found and not found[name].same_bits(tensor):
                    raise PackageError(
                        f"{package.path}: function {where}: {name} differs from another copy of it."
                    )
                found[name] = tensor
        return found

    def dense(self) -> dict[str, Tensor]:
        """Other constants by parameter name, read from disk."""
        found: dict[str, Tensor] = {}
        for package, where in self.functions():
            splits = read_splits(package.metadata, str(package.path))
            found |= joined_dense(package.dense(where), splits, str(package.path))
        return found

    def weights_size_bytes(self) -> int:
        """Size of the blob files."""
        return sum(package.weights_size_bytes for package in self._packages)

    def size_bytes(self) -> int:
        """Size of the packages."""
        return sum(package.size_bytes for package in self._packages)

    def functions(self) -> list[tuple[Package, str]]:
        """Every function with its package."""
        return [(package, function) for package in self._packages for function in package.functions]

    def drawn_words(self) -> str:
        """What to add to the words of an execution whose program draws random numbers; empty: none does."""
        drawn = any(package.draws_random_numbers(where) for package, where in self.functions())
        return ", random numbers drawn with seed 0" if drawn else ""
