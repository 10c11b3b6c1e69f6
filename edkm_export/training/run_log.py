"""log.jsonl of a run: a line for each logged step and each evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from edkm_export.atomic import atomic_file
from edkm_export.errors import InputError
from edkm_export.regular_file import read_regular

__all__ = ["append", "cut", "records"]

_MOST_BYTES = 1 << 30


class _Line(pydantic.BaseModel):
    """The fields that are used again; others are kept as they are."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    step: int = pydantic.Field(ge=0)
    tokens: int | None = pydantic.Field(default=None, ge=0)
    loss: float | None = None
    kl: float | None = None
    text: str | None = None
    stage: str | None = None
    perplexity: float | None = None

    @pydantic.model_validator(mode="after")
    def _complete(self) -> _Line:
        step, evaluation = (self.tokens, self.loss), (self.text, self.stage, self.perplexity)
        if None in step and None in evaluation:
            raise ValueError("neither a step nor an evaluation")
        return self


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def records(path: Path) -> list[dict[str, Any]]:
    """Its lines; those that are torn or none of ours are left out."""
    return [record for _, record in _lines(path)]


def cut(path: Path, step: int) -> None:
    """Drop what was logged after a step, and what is no line of ours: the run goes on from there."""
    kept = [line for line, record in _lines(path) if record["step"] <= step]
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        content = read_regular(path, _MOST_BYTES) if path.exists() else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); move it away.") from error
    for line in content.split(b"\n"):
        try:
            found = _Line.model_validate_json(line)
        except pydantic.ValidationError:
            continue
        yield line, found.model_dump(exclude_unset=True)
