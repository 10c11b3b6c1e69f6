"""An .aimodel on disk: its hash is checked first, then its structure, before anything else is done with it."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.coreai.format import BYTECODE_FILE, DESCRIPTION_KEY, HASH_FILE, METADATA_FILE
from converters.coreai.read.description import Description, read_description
from converters.coreai.read.folder import find_asset
from converters.coreai.read.program import Program, read_program
from converters.coreai.read.weights import StoredPalette, read_dense, read_palettes, stored_palettes
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor
from edkm_export.regular_file import open_regular, read_regular

__all__ = ["Asset", "load_asset"]

_MOST_METADATA = 256 << 20
_CUSTOM = "creatorDefinedMetadata"
_VERSION = "2.0"


class Asset:
    """A model on disk.

    Args:
        path: of the .aimodel folder.

    Attributes:
        path: as given.
        metadata: metadata.json of the asset.
        program: what it computes.

    Raises:
        PackageError: a file is missing, hash and program differ, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _map(path / BYTECODE_FILE)
        told = _read(path / HASH_FILE, 32)
        if hashlib.sha256(data).digest() != told:
            raise PackageError(
                f"{path}: {BYTECODE_FILE} does not have the SHA-256 that {HASH_FILE} gives; the copy is damaged, "
                "export or copy it again."
            )
        self.metadata = _json(path / METADATA_FILE)
        if self.metadata.get("assetVersion") != _VERSION:
            raise PackageError(
                f"{path}: its version is {self.metadata.get('assetVersion')!r:.40}, this release reads {_VERSION!r}."
            )
        self.program: Program = self._named(lambda: read_program(data))

    def _named(self, work: Any) -> Any:
        """Do it, and let errors name the file."""
        try:
            return work()
        except PackageError as error:
            raise PackageError(f"{self.path}: {error}") from error

    @property
    def custom(self) -> Mapping[str, Any]:
        """Custom metadata."""
        found = self.metadata.get(_CUSTOM)
        return found if isinstance(found, dict) else {}

    @property
    def is_ours(self) -> bool:
        """True when it says that we exported it."""
        return DESCRIPTION_KEY in self.custom

    @cached_property
    def description(self) -> Description:
        """What the asset says of itself.

        Raises:
            PackageError: it was not exported by us.
        """
        found: Description = self._named(lambda: read_description(self.custom))
        return found

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by name.

        Raises:
            PackageError: one is damaged, missing, or not named.
        """
        found: dict[str, PalettizedTensor] = self._named(
            lambda: read_palettes(self.program, self.description)
        )
        return found

    def palettes(self) -> list[StoredPalette]:
        """All palettes without names, for an asset of another tool.

        Raises:
            PackageError: one has a form that is not understood.
        """
        found: list[StoredPalette] = self._named(lambda: list(stored_palettes(self.program)))
        return found

    def dense(self) -> dict[str, Tensor]:
        """Other weights by name, float16."""
        found: dict[str, Tensor] = self._named(lambda: read_dense(self.program, self.description))
        return found

    @property
    def constants_size_bytes(self) -> int:
        """Size of all constants; each is stored once, however often it is used."""
        sizes: int = self._named(lambda: self.program.attributes.contents_size_bytes())
        return sizes

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.lstat().st_size for file in self.path.rglob("*") if not file.is_dir())


def load_asset(path: str | Path) -> Asset:
    """Open an .aimodel, or the one in a folder that `edkm-export coreai` made.

    Raises:
        PackageError: see `Asset`.
    """
    return Asset(find_asset(Path(path)))


def _map(path: Path) -> memoryview:
    """A file as memory that is read when it is needed."""
    try:
        with open_regular(path) as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise PackageError(f"{path}: no such file; export the model again.") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise PackageError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from error


def _read(path: Path, most: int) -> bytes:
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        raise PackageError(f"{path}: no such file; export the model again.") from None
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path, _MOST_METADATA))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path}: is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise PackageError(f"{path}: is no JSON object.")
    return found
