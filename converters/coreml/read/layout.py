"""Where the parts of an .mlpackage lie, and the guard that they lie inside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from converters.coreml.read.blob import BlobFile
from edkm_export.errors import PackageError
from edkm_export.regular_file import read_regular

__all__ = ["PackageLayout"]

_MODEL_PATH = "@model_path"


@dataclass(frozen=True)
class PackageLayout:
    """Files of one package.

    Attributes:
        root: the package folder, resolved.
        model_file: the .mlmodel that the manifest names as root model.
    """

    root: Path
    model_file: Path
    _blobs: dict[str, BlobFile] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> PackageLayout:
        """Find the root model through Manifest.json, as Core ML does.

        Raises:
            PackageError: no such folder, no manifest, or one that does not name a file in the package.
        """
        given = Path(path)
        if not given.is_dir():
            state = "is a file" if given.exists() else "does not exist"
            raise PackageError(f"{given}: {state}; expected an .mlpackage folder.")
        root = given.resolve()
        manifest = root / "Manifest.json"
        try:
            content = json.loads(read_regular(manifest))
            identifier = content["rootModelIdentifier"]
            item = content["itemInfoEntries"][identifier]["path"]
        except OSError as error:
            raise PackageError(
                f"{manifest}: cannot be read ({error.strerror}); not an .mlpackage."
            ) from error
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{manifest}: not JSON ({error}).") from error
        except (KeyError, TypeError) as error:
            raise PackageError(f"{manifest}: does not name its root model ({error}).") from error
        if not isinstance(item, str):
            raise PackageError(f"{manifest}: the path of the root model is {item!r}, expected a string.")
        return cls(root, _inside(root, root / "Data", item, manifest))

    def blob(self, file_name: str, owner: str) -> BlobFile:
        """Open the blob file that a constant names, once.

        Args:
            file_name: as in the program, `@model_path/weights/weight.bin`.
            owner: the tensor or op that refers to it, for messages.

        Raises:
            PackageError: the name leads outside the package, or the file is not a blob file.
        """
        if file_name not in self._blobs:
            self._blobs[file_name] = BlobFile(self.blob_path(file_name, owner))
        return self._blobs[file_name]

    def blob_path(self, file_name: str, owner: str) -> Path:
        """Path of the blob file that a constant names.

        Raises:
            PackageError: the name leads outside the package.
        """
        prefix, _, relative = file_name.partition("/")
        if prefix != _MODEL_PATH:
            raise PackageError(
                f"{self.model_file}: {owner}: blob file {file_name!r} does not start with {_MODEL_PATH}/."
            )
        return _inside(self.root, self.model_file.parent, relative, self.model_file)

    @cached_property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files in the package."""
        return sum(path.lstat().st_size for path in self.root.rglob("*") if not path.is_dir())


def _inside(root: Path, folder: Path, relative: str, source: Path) -> Path:
    """`folder / relative`, which must be a file inside `root`, symbolic links resolved."""
    parts = PurePosixPath(relative)
    if not relative or parts.is_absolute() or ".." in parts.parts or "\\" in relative or "\0" in relative:
        raise PackageError(f"{source}: file name {relative!r} would leave the package.")
    path = folder / parts
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(root):
            raise PackageError(f"{source}: file name {relative!r} leads outside the package, to {resolved}.")
        found = resolved.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise PackageError(f"{source}: file name {relative!r} cannot be resolved ({error}).") from error
    if not found:
        raise PackageError(f"{path}: does not exist, but {source.name} names it; the package is incomplete.")
    return path
