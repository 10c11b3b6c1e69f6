"""Arguments of the commands that name something on disk, or a model: refused before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edkm_export.command_line import command_line
from edkm_export.errors import CheckpointError, EdkmExportError, InputError, PackageError, RecipeError
from edkm_export.unfinished import unfinished_run

if TYPE_CHECKING:
    from edkm_export.reference.source import Source

__all__ = [
    "ARTIFACT",
    "CHECKPOINT",
    "FILE",
    "PACKAGE",
    "RECIPE",
    "RUN",
    "find_named_original",
    "find_source",
    "memory_option",
    "original_options",
]

_F = TypeVar("_F", bound=Callable[..., Any])


class _Existing(click.Path):
    """A path that must be there, named by a message of this project where it is not.

    Args:
        error: what is raised.
        missing: what is said of a path to nothing.
        folder: what is said of a folder. Without it folders are taken.
        file: what is said of a file. Without it files are taken.
        command: a command that helps, for a path; {command} stands for it in what is said.
        model: a model.pt is meant, or may be: of a run that has not finished more is said.
    """

    def __init__(
        self,
        error: type[EdkmExportError],
        missing: str,
        *,
        folder: str | None = None,
        file: str | None = None,
        command: Callable[[Path], str] = lambda _path: "",
        model: bool = False,
    ) -> None:
        super().__init__(path_type=Path)
        self._model = model
        self._error, self._missing, self._folder, self._file = error, missing, folder, file
        self._command = command

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if self._model and (unfinished := unfinished_run(path)):
            raise CheckpointError(f"{path}: {unfinished}")
        if self._model and self._folder and (path / "model.pt").is_file():  # of a training run
            raise self._error(f"{path}: is a folder; give the file in it, {path / 'model.pt'}.")
        reason = self._missing
        if path.exists():
            reason = (self._folder if path.is_dir() else self._file) or ""
        if reason:
            raise self._error(f"{path}: {reason.format(command=self._command(path))}.")
        return path


class _Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes with its unit."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?\s*", str(value), re.IGNORECASE)
        size = 0
        if found is not None:
            base = 1024 if found[3] else 1000
            size = int(float(found[1]) * base ** ("kmgt".index(found[2].lower()) + 1))
        if not size:
            self.fail(f"{value!r} is no size above 0 with its unit, such as 16GB.", param, ctx)
        return size


class _Recipe(click.types.StringParamType):
    """The name of a preset, which is looked up later, or a file that must be there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if (path.suffix.lower() in (".yaml", ".yml") or "/" in value) and not path.is_file():
            raise RecipeError(f"{value}: no such recipe file.")
        return value


def _palettize(path: Path) -> str:
    if path.is_dir():
        return command_line("palettize", path, "-o", "model.pt")
    return command_line("palettize", "MODEL", "-o", path.name)


RECIPE = _Recipe()
"""A recipe."""
FILE = _Existing(InputError, "no such file", folder="is a folder, expected a file")
"""Any other file that is read."""
CHECKPOINT = _Existing(
    CheckpointError,
    "no such file; make one with `{command}`",
    folder="is a folder; to palettize it run `{command}`",
    command=_palettize,
    model=True,
)
"""A model.pt."""
ARTIFACT = _Existing(InputError, "no such file or folder", model=True)
"""A model.pt, or what an export made."""
PACKAGE = _Existing(PackageError, "no such package")
"""What an export made."""
RUN = _Existing(InputError, "no such folder", file="is a file, expected the folder of a training run")
"""The folder of a training run."""


memory_option = click.option(
    "--memory",
    "memory_bytes",
    type=_Size(),
    help="Memory that may be used, such as 16GB: a model that does not fit is run layer by layer, which is slower and "
    "gives the same numbers.  [default: what is free]",
)


def find_source(reference: str, adapter: str | None = None) -> Source:
    """The float model that is meant: on disk, or on the hub, which is asked once.

    Args:
        reference: folder, GGUF file or hub id.
        adapter: folder of a LoRA adapter.

    Raises:
        InputError: there is no such model; it is none; or it holds an adapter that was not asked for.
    """
    from edkm_export.reference.source import Source

    return Source.parse(reference, adapter).locate()


def original_options(function: _F) -> _F:
    """Add --original and --adapter to a command, for `find_named_original`."""
    function = click.option(
        "--adapter", help="Folder of a LoRA adapter that is merged into --original first; needs peft."
    )(function)
    return click.option("--original", help="The float model, when it is not where it was palettized from.")(
        function
    )


def find_named_original(original: str | None, adapter: str | None) -> Source | None:
    """What --original and --adapter name.

    Raises:
        UsageError: an adapter of nothing.
        InputError: see `find_source`.
    """
    if original is not None:
        return find_source(original, adapter)
    if adapter is not None:
        raise click.UsageError("--adapter is merged into the model of --original; give both.")
    return None
