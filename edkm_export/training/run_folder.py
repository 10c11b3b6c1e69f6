"""The folder of a run: what is in it, and when a run may go on in it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, MARKER, atomic_file, check_output
from edkm_export.errors import InputError
from edkm_export.recipe import Recipe
from edkm_export.reference.source import Source
from edkm_export.training import run_checkpoints
from edkm_export.training.tokens import Tokens
from edkm_export.training.train_config import TrainConfig

__all__ = ["RunFolder", "identify"]


def identify(source: Source, data: Sequence[Path], tokens: Tokens) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    return {
        "model": source.provenance(),
        "data": [path.name for path in data],
        "tokens_sha256": tokens.sha256(),
    }


_REPLACED = ".replaced"  # what lay in the folder, until the new run has made a step


@dataclass
class RunFolder:
    """Paths and metadata of a run.

    A run that ends before its first step leaves nothing: between `start` and `keep`, what it replaces is set aside,
    and `discard` puts it back.

    Attributes:
        path: holds metadata.json, log.jsonl, curve.png, generated.tokens, checkpoints and model.pt.
    """

    path: Path
    _started: bool = field(default=False, init=False, repr=False)
    _made: bool = field(default=False, init=False, repr=False)

    @property
    def log(self) -> Path:
        """Losses and evaluations, a line each."""
        return self.path / "log.jsonl"

    @property
    def curve(self) -> Path:
        """The picture of the log."""
        return self.path / "curve.png"

    @property
    def model(self) -> Path:
        """The result."""
        return self.path / "model.pt"

    @property
    def generated(self) -> Path:
        """Tokens that the original wrote."""
        return self.path / "generated.tokens"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of transformers' Trainer."""
        return self.path / "checkpoints"

    def open(self, *, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from; None to start anew, also when a run left none behind.

        Raises:
            OutputExistsError: it exists, and neither is set, or it is not ours.
            InputError: it cannot be made.
        """
        check_output(self.path, overwrite=overwrite or resume, folder=True)
        if not resume:
            return None
        run_checkpoints.drop_partial(self.checkpoints)
        return run_checkpoints.last_complete(self.checkpoints)

    def start(self) -> None:
        """Make the folder, or set aside what an older run left in it."""
        self._started, self._made = True, not self.path.exists()
        self.path.mkdir(exist_ok=True)
        replaced = self.path / _REPLACED
        if replaced.is_dir():  # a run that was killed before its first step had set it aside
            self._empty()
        elif found := list(self.path.iterdir()):
            replaced.mkdir()
            for path in found:
                path.rename(replaced / path.name)
        self._write({})  # from here on it is known as ours

    def keep(self) -> None:
        """Keep what the run writes, since it has made a step; what it replaces goes."""
        if self._started:
            self._started = False
            shutil.rmtree(self.path / _REPLACED, ignore_errors=True)

    def discard(self) -> None:
        """Undo `start`, unless the run was to be kept."""
        if not self._started:
            return
        self._started = False
        replaced = self.path / _REPLACED
        self._empty()
        if replaced.is_dir():
            for path in list(replaced.iterdir()):
                path.rename(self.path / path.name)
            replaced.rmdir()
        if self._made:
            self.path.rmdir()

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.name != _REPLACED:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def write(
        self,
        identity: dict[str, Any],
        config: TrainConfig,
        recipe: Recipe,
        evaluations: Mapping[str, Any],
        command: Sequence[str] = (),
    ) -> None:
        """Record what the run is, before its first step; `evaluations` as JSON holds them, `command` started it."""
        self._write(
            {
                "command": list(command),
                "identity": identity,
                "config": config.model_dump(mode="json"),
                "recipe": recipe.model_dump(mode="json"),
                "evaluations": evaluations,
            }
        )

    def _write(self, contents: dict[str, Any]) -> None:
        contents = {"generator": f"{GENERATOR} {__version__}", "kind": "run", **contents}
        with atomic_file(self.path / MARKER, overwrite=True) as temporary:
            temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")

    def read(self, identity: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
        """What `write` recorded.

        Raises:
            InputError: the run was started with something else; the message says with what.
        """
        path, anew = self.path / MARKER, "start anew with --overwrite"
        try:
            contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stored, settings, generator = contents["identity"], contents["config"], contents["generator"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is not the metadata of a run; {anew}.") from error
        for key, what in (("model", "model"), ("data", "data files"), ("tokens_sha256", "training data")):
            if stored.get(key) != identity[key]:
                raise InputError(f"{self.path}: was started with another {what}; give the same, or {anew}.")
        try:
            started = TrainConfig.parse(settings)
        except InputError as error:
            raise InputError(
                f"{path}: was written by {generator} with settings that {GENERATOR} {__version__} does not take "
                f"({error}); go on with that version, or {anew}."
            ) from error
        for name in config.conflicts(started):
            found, given = getattr(started, name), getattr(config, name)
            raise InputError(
                f"{self.path}: was started with {name} {found!r}, not {given!r}; give the same, or {anew}."
            )
        return contents

    def cut_log(self, step: int) -> None:
        """Drop what was logged after a step: the run goes on from there."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be torn
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        self.log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
