"""What `push` sends of an exported folder, and whether it may be sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edkm_export.atomic import GENERATOR, MARKER
from edkm_export.command_line import command_line
from edkm_export.digest import file_sha256
from edkm_export.errors import InputError
from edkm_export.escaping import for_markdown
from edkm_export.model_card import (
    BEYOND,
    FILE,
    NOT_VERIFIED,
    PASS,
    card_license,
    card_verdict,
    verdict_of,
    with_verification,
)
from edkm_export.regular_file import read_regular

__all__ = ["File", "Upload", "size_words"]

_REPORT = "report.json"


@dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        name: path in the repository.
        path: where it lies.
        size_bytes: its size.
    """

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Upload:
    """A folder as it would be sent.

    Attributes:
        folder: the folder.
        files: what goes, by name.
        left_out: {path in the folder: why it stays}.
        card: text of the model card that goes.
        verdict: of the verification, as the card tells it.
    """

    folder: Path
    files: tuple[File, ...]
    left_out: dict[str, str]
    card: str
    verdict: str

    @classmethod
    def of(cls, path: Path, *, unverified: bool = False) -> Upload:
        """Look at a folder.

        Args:
            path: of the folder that `edkm-export coreml` or `edkm-export onnx` made.
            unverified: take one that has not passed verification; its card then says so.

        Raises:
            InputError: it is no such folder, has not passed, has changed since then, or has no model card.
        """
        folder = _exported_folder(path)
        files, left_out = _sort_files(folder)
        reason = _why_unverified(folder, {file.name for file in files})
        if reason and not unverified:
            again = command_line("verify", folder, "--report", folder)
            raise InputError(
                f"{folder}: {reason}; push it as it is with --unverified, which its card will say, or verify it: "
                f"{again}"
            )
        card = _read_card(folder)
        if reason:
            words = f"**{NOT_VERIFIED}**: {for_markdown(reason)}. It was pushed with --unverified."
            card = with_verification(card, NOT_VERIFIED, words)
        elif card_verdict(card) not in (None, PASS):
            card = with_verification(card, PASS, f"Faithful export: **{PASS}**. report.md has the details.")
        size = len(card.encode())
        files = [File(FILE, file.path, size) if file.name == FILE else file for file in files]
        return cls(folder, tuple(files), left_out, card, NOT_VERIFIED if reason else PASS)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def license(self) -> str | None:
        """The licence that the card names."""
        return card_license(self.card)


def size_words(size_bytes: int) -> str:
    """A size for people; 1 kB is 1,000 bytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes} B"


def _exported_folder(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: no such folder.")
    if path.suffix == ".mlpackage" and (path.parent / MARKER).is_file():
        path = path.parent
    model = path if path.is_file() else path / "model.pt"
    if model.is_file() and model.suffix == ".pt":
        raise InputError(
            f"{path}: {'is' if path.is_file() else 'holds'} a checkpoint, which apps cannot load; export it first: "
            f"{command_line('coreml', model)}, or {command_line('onnx', model)}"
        )
    made = _object(path / MARKER) if path.is_dir() else {}
    if not str(made.get("generator", "")).startswith(GENERATOR) or not {"package", "model"} & made.keys():
        raise InputError(f"{path}: is no folder that `edkm-export coreml` or `edkm-export onnx` made.")
    return path


def _sort_files(folder: Path) -> tuple[list[File], dict[str, str]]:
    """What goes, and what stays and why. A folder that stays is named once."""
    files: list[File] = []
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(name.startswith(f"{other}/") for other in left_out):
            continue
        if path.name.startswith("."):
            left_out[name] = "hidden"
        elif path.is_symlink():
            left_out[name] = "a link"
        elif path.name == "__pycache__":
            left_out[name] = "a cache"
        elif path.is_file():
            files.append(File(name, path, path.stat().st_size))
        elif not path.is_dir():
            left_out[name] = "not a plain file"
    return files, left_out


def _why_unverified(folder: Path, names: set[str]) -> str:
    """Empty when the report says that these very files passed."""
    if not (folder / _REPORT).is_file():
        return "it holds no verification report"
    report = _object(folder / _REPORT)
    verdict = verdict_of(report)
    if verdict == BEYOND:
        return "by its report the quality is beyond its limit"
    if verdict != PASS:
        return f"the verdict of its report is {verdict}" if verdict else "its report cannot be read"
    digests = _digests(report)
    if not digests:
        return "its report does not say which files it is about"
    artifact = report.get("artifact")
    inner = f"{artifact}/" if isinstance(artifact, str) and (folder / artifact).is_dir() else ""
    for name, digest in digests.items():
        whole = f"{inner}{name}"
        if whole != FILE and (whole not in names or file_sha256(folder / whole) != digest):
            return f"{whole} is not the file that its report is about"
    return ""


def _digests(report: dict[str, Any]) -> dict[str, str]:
    """{file of the artifact: sha256}, as the report names them."""
    found: Any = report
    for key in ("provenance", "verification", "artifact"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _read_card(folder: Path) -> str:
    try:
        return read_regular(folder / FILE).decode("utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{folder}: holds no model card ({FILE}); export it again, which writes one."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{folder / FILE}: is no UTF-8 text.") from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
