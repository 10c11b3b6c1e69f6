"""Which model.pt a folder was exported from: written into its metadata.json, and found again by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edkm_export.atomic import MARKER
from edkm_export.command_line import command_line
from edkm_export.digest import file_sha256
from edkm_export.errors import InputError
from edkm_export.regular_file import read_regular

__all__ = ["KEY", "CheckpointRecord"]

KEY = "checkpoint"
"""Of the record in metadata.json."""

_SHORT = 12  # digits of a digest that people compare


@dataclass(frozen=True)
class CheckpointRecord:
    """A model.pt by its contents.

    Attributes:
        file: its name, without folders.
        size_bytes: its size.
        sha256: of the whole file.
    """

    file: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> CheckpointRecord:
        """Of a file that is here."""
        return cls(path.name, path.stat().st_size, file_sha256(path))

    @classmethod
    def read(cls, exported: Path) -> CheckpointRecord | None:
        """From the metadata.json of an exported folder; None where it holds none, as those of older releases.

        Args:
            exported: the folder, or the model in it.
        """
        inside = exported.suffix in (".aimodel", ".mlpackage", ".onnx")
        folders = (exported.absolute().parent, exported.absolute().parent.parent) if inside else (exported,)
        path = next((folder / MARKER for folder in folders if (folder / MARKER).is_file()), None)
        if path is None:
            return None
        try:
            record = cls(**json.loads(read_regular(path))[KEY])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return record if record._is_sound() else None

    def _is_sound(self) -> bool:
        plain = (
            isinstance(self.file, str) and self.file not in ("", "..") and Path(self.file).name == self.file
        )
        return plain and isinstance(self.sha256, str) and type(self.size_bytes) is int

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for metadata.json."""
        return asdict(self)

    def is_of(self, path: Path) -> bool:
        """Whether a file has this size and sha256."""
        return path.is_file() and path.stat().st_size == self.size_bytes and file_sha256(path) == self.sha256

    def require(self, path: Path, exported: Path) -> None:
        """Refuse a model.pt that is not the one that was exported.

        Args:
            path: what the user gave.
            exported: the folder, for the message.

        Raises:
            InputError: with both digests. A file that is missing is left to its reader.
        """
        if not path.is_file():
            return
        actual = file_sha256(path)
        if actual != self.sha256:
            raise InputError(
                f"{path}: its sha256 is {actual[:_SHORT]}..., but {exported} was exported from the {self.file} of "
                f"sha256 {self.sha256[:_SHORT]}...; give that one, or export this one anew."
            )

    def find(self, exported: Path) -> Path:
        """The model.pt, by its contents, whatever it is called now.

        It is looked for beside the exported folder, in the working folder, in the folder above each and in those
        inside each, under the recorded name first.

        Raises:
            InputError: it is in none of them; the message says what was looked for, and where.
        """
        places = list(dict.fromkeys(_places(exported)))
        for path in _candidates(places, self.file):
            if self.is_of(path):
                here = Path.cwd()
                return path.relative_to(here) if path.is_relative_to(here) else path
        looked = ", ".join(str(place) for place in places)
        raise InputError(
            f"{exported}: was exported from {self.file} of sha256 {self.sha256[:_SHORT]}... "
            f"({self.size_bytes:,} bytes), and no such file is in {looked}; name it: "
            f"{command_line('verify', f'PATH/{self.file}', exported)}"
        )


def _places(exported: Path) -> Iterator[Path]:
    """Folders, the likeliest first."""
    beside = exported.absolute().parent
    yield from (beside, Path.cwd(), beside.parent, Path.cwd().parent)


def _candidates(places: list[Path], name: str) -> Iterator[Path]:
    """Files that may be it; only those of the right size will be read."""
    for folder in places:
        yield folder / name
    for folder in places:
        yield from sorted(folder.glob("*.pt"))
    for folder in places:
        yield from sorted(folder.glob(f"*/{_literal(name)}"))


def _literal(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
