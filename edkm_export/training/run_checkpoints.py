"""Checkpoints of a run: each is whole or does not count.

complete.json of a checkpoint is written last. It lists every file with size and sha256, so that one which was damaged
or changed since is told from one that can be gone on from.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import pydantic

from edkm_export.atomic import atomic_file
from edkm_export.claims import clear
from edkm_export.digest import file_sha256, file_sha256s
from edkm_export.errors import InputError
from edkm_export.filesystem import flush_tree, remove
from edkm_export.regular_file import open_regular

__all__ = [
    "OPTIMIZER",
    "SCHEDULER",
    "SHARDS",
    "TRAINER",
    "WEIGHTS",
    "Mark",
    "complete",
    "drop_others",
    "in_shares",
    "last_complete",
    "last_whole",
    "read_mark",
    "retire",
    "step",
]

WEIGHTS = "weights.pt"
SHARDS = "shards"
"""Folder of weights and moments that several processes wrote, in place of `WEIGHTS` and of the state in `OPTIMIZER`."""

# as transformers' Trainer calls them
OPTIMIZER, SCHEDULER, TRAINER = "optimizer.pt", "scheduler.pt", "trainer_state.json"
_MARK = "complete.json"
_RANDOM_STATES = (
    "rng_state*.pth"  # one, or one of each process; those of other numbers of processes are not used
)
_SHARDS_INDEX = f"{SHARDS}/index.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)
_MARK_BYTES = 1 << 20  # far more than a list of a few dozen files takes


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class _File(_Strict):
    size_bytes: int = pydantic.Field(ge=0)
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")


class Mark(_Strict):
    """What complete.json holds.

    Attributes:
        step: how many were made.
        elapsed: seconds that they took.
        files: all others of the checkpoint, by their path in it; None: written by a release that did not list them.
    """

    step: int = pydantic.Field(ge=0)
    elapsed: float = pydantic.Field(ge=0, allow_inf_nan=False)
    files: dict[str, _File] | None = None


def step(path: Path) -> int:
    """The step that a checkpoint's name tells; -1: it is not the name of one."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def in_shares(path: Path) -> bool:
    """Whether several processes wrote a checkpoint, each its own part."""
    return (path / SHARDS).is_dir()


def _all(folder: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest, partial ones included."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step(path) >= 0), key=step)


def complete(path: Path, *, elapsed: float) -> None:
    """Flush a checkpoint to the disk, list its files, and mark it as whole."""
    flush_tree(path)
    written = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = {
        str(PurePosixPath(file.relative_to(path))): _File(size_bytes=file.stat().st_size, sha256=digest)
        for file, digest in file_sha256s(written).items()
    }
    mark = Mark(step=step(path), elapsed=elapsed, files=files)
    with atomic_file(path / _MARK, overwrite=True) as temporary:
        temporary.write_text(mark.model_dump_json(indent=2) + "\n", encoding="utf-8")


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was marked as whole; its files may have been damaged since."""
    return next((path for path in reversed(_all(folder)) if (path / _MARK).is_file()), None)


def last_whole(folder: Path, needed: Sequence[str], tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole now; of each that is passed over, a line tells why.

    Args:
        folder: of the checkpoints.
        needed: names of files that it must have.
        tell: called with the lines.
    """
    for path in reversed(_all(folder)):
        if not (path / _MARK).is_file():
            continue  # the run ended while it was written
        if fault := _fault(path, needed):
            tell(f"{path}: is passed over: {fault}")
        else:
            return path
    return None


def read_mark(path: Path) -> Mark:
    """What `complete` wrote about a checkpoint.

    Raises:
        InputError: it is damaged, or that of another checkpoint.
    """
    file = path / _MARK
    try:
        with open_regular(file) as opened:
            content = opened.read(_MARK_BYTES)
        mark = Mark.model_validate_json(content)
    except (OSError, pydantic.ValidationError) as error:
        raise InputError(f"{file}: is not what edkm-export wrote.") from error
    if mark.step != step(path):
        raise InputError(f"{file}: is of step {mark.step}.")
    return mark


def _fault(path: Path, needed: Sequence[str]) -> str:
    """Why a checkpoint is not whole; empty: it is."""
    try:
        files = read_mark(path).files
    except InputError as error:
        return str(error)
    if in_shares(path):
        needed = [_SHARDS_INDEX if name == WEIGHTS else name for name in needed]
    if not any(path.glob(_RANDOM_STATES)):
        return "rng_state.pth is missing"
    listed = needed if files is None else files
    missing = [name for name in needed if name not in listed or not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        if files is None:
            return next((f"{name} is damaged" for name in needed if not _is_sound(path / name)), "")
        return next(
            (f"{name} {fault}" for name, file in files.items() if (fault := _changed(path, name, file))), ""
        )
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"


def _changed(path: Path, name: str, listed: _File) -> str:
    """How a file is not the one that was listed; empty: it is."""
    file = path / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not file.is_file():
        return "is missing"
    if file.stat().st_size != listed.size_bytes:
        return f"has {file.stat().st_size:,} bytes, and was written with {listed.size_bytes:,}"
    if file_sha256(file) != listed.sha256:
        return "was damaged or changed since it was written (sha256)"
    return ""


def _is_sound(file: Path) -> bool:
    """Whether a file without a digest can be read: those of torch are archives with a checksum of each part."""
    if file.suffix not in (".pt", ".pth"):
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def retire(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints that are whole."""
    marked = [path for path in _all(folder) if (path / _MARK).is_file()]
    for path in marked[: max(0, len(marked) - keep)]:
        _drop(path)


def drop_others(folder: Path, kept: Path) -> None:
    """Remove what a run that goes on from a checkpoint will write again, and what one that was stopped left."""
    clear(kept / _MARK)
    for path in _all(folder):
        if step(path) > step(kept) or not (path / _MARK).is_file():
            _drop(path)


def _drop(path: Path) -> None:
    remove(path / _MARK)  # from here on it does not count
    remove(path)
