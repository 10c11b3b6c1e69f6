"""metadata.json of a run: with what it was started, so that it goes on with the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, atomic_file
from edkm_export.errors import InputError
from edkm_export.plain_data import printable
from edkm_export.recipe import Recipe
from edkm_export.regular_file import read_regular
from edkm_export.training.evaluation import Evaluation
from edkm_export.training.tokens import Tokens
from edkm_export.training.train_config import TrainConfig

__all__ = ["Identity", "RunRecord"]

_ANEW = "start anew with --overwrite"


class Identity(pydantic.BaseModel):
    """What has to be the same for a run to go on.

    Attributes:
        model: provenance of the source.
        data: names of the data files.
        tokens_sha256: of the tokens that came of them.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: dict[str, Any]
    data: list[str]
    tokens_sha256: str

    @classmethod
    def of(cls, model: dict[str, Any], data: Sequence[Path], tokens: Tokens) -> Identity:
        """Of what was given; `model` is the provenance of the source."""
        return cls(
            model=model,
            data=[printable(path.name) for path in data],
            tokens_sha256=tokens.sha256(),
        )


class RunRecord(pydantic.BaseModel):
    """What the file holds; the settings are checked by `TrainConfig`, in `require`.

    Attributes:
        generator: release that started the run.
        kind: "run".
        command: that started it.
        identity: see there.
        config: settings, by name.
        recipe: that the model was palettized by.
        evaluations: {text: {stage: Evaluation}}, from before the first step.
        generated_sha256: of the tokens that the original wrote; None: it wrote none.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    generator: str = f"{GENERATOR} {__version__}"
    kind: Literal["run"] = "run"
    command: list[str] = []
    identity: Identity
    config: dict[str, Any]
    recipe: Recipe
    evaluations: dict[str, dict[str, Evaluation]] = {}
    generated_sha256: str | None = None

    def write(self, path: Path) -> None:
        """Write metadata.json, whole or not at all."""
        with atomic_file(path, overwrite=True) as temporary:
            contents = self.model_dump(mode="json")
            temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read metadata.json.

        Raises:
            InputError: it is not what `write` wrote; the message names the field.
        """
        try:
            return cls.model_validate_json(read_regular(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {_ANEW}.") from error
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}: is not the metadata of a run ({where + ': ' if where else ''}{first['msg']}); {_ANEW}."
            ) from error

    def require(self, path: Path, identity: Identity, config: TrainConfig) -> None:
        """Refuse to go on with something else.

        Args:
            path: of this file.
            identity: of what is given now.
            config: settings that are given now.

        Raises:
            InputError: the message says with what the run was started.
        """
        for key, what in (("model", "model"), ("data", "data files"), ("tokens_sha256", "training data")):
            if getattr(self.identity, key) != getattr(identity, key):
                raise InputError(
                    f"{path.parent}: was started with another {what}; give the same, or {_ANEW}."
                )
        try:
            started = TrainConfig.parse(_renamed(self.config))
        except InputError as error:
            raise InputError(
                f"{path}: was written by {self.generator} with settings that {GENERATOR} {__version__} does not take "
                f"({error}); go on with that version, or {_ANEW}."
            ) from error
        for name in config.conflicts(started):
            found, given = getattr(started, name), getattr(config, name)
            raise InputError(
                f"{path.parent}: was started with {name} {found!r}, not {given!r}; give the same, or {_ANEW}."
            )


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run from before `target_bits` was over all weights; the embedding was trained when it was said."""
    if "target_decoder_bits" in config:
        return config
    renamed = {**config, "target_decoder_bits": config.get("target_bits"), "target_bits": None}
    return {**renamed, "train_embedding": config.get("train_embedding") or None}
