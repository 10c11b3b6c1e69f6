"""The folder of a run: what is in it, and when a run may go on in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RunFolder:
    """Paths and metadata of a run.

    Attributes:
        path: holds metadata.json, log.jsonl, curve.png, generated.tokens, checkpoints and model.pt.
    """

    path: Path

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
        """Make the folder, without what an older run left in it."""
        self.path.mkdir(exist_ok=True)
        self._write({})  # from here on it is known as ours
        for path in (self.log, self.model, self.curve, self.generated):
            path.unlink(missing_ok=True)
        run_checkpoints.clear(self.checkpoints)

    def write(
        self,
        identity: dict[str, Any],
        config: TrainConfig,
        recipe: Recipe,
        evaluations: Mapping[str, Any],
    ) -> None:
        """Record what the run is, before its first step; `evaluations` as JSON holds them."""
        self._write(
            {
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
