"""Options and steps that `coreml` and `verify` share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edkm_export.verify.thresholds import MAX_PERPLEXITY_RATIO

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.models.source import Source
    from edkm_export.verify.ladder import Evaluation
    from edkm_export.verify.report import Report

__all__ = ["climb", "prepare", "verification_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


def verification_options(function: _F) -> _F:
    """Add --text, --tokens, --original and --max-perplexity-ratio to a command."""
    for option in (
        click.option(
            "--max-perplexity-ratio",
            type=float,
            default=MAX_PERPLEXITY_RATIO,
            show_default=True,
            help="Worst allowed perplexity of the palettized model, as a multiple of the original's.",
        ),
        click.option("--original", help="The float model, when it is not where it was palettized from."),
        click.option(
            "--tokens",
            type=click.IntRange(min=2),
            default=1024,
            show_default=True,
            help="Tokens of the text to use.",
        ),
        click.option(
            "--text",
            type=click.Path(path_type=Path),
            help="Evaluation text; by default a built-in sample.",
        ),
    ):
        function = option(function)
    return function


def prepare(
    checkpoint: Checkpoint,
    *,
    text: Path | None,
    tokens: int,
    original: str | None,
    max_perplexity_ratio: float,
) -> Evaluation:
    """Read what the options name, before the long work.

    Raises:
        InputError: the text or the original that was asked for cannot be used.
    """
    from edkm_export.text import read_text
    from edkm_export.verify.ladder import Evaluation

    if text is None:
        content = (files("edkm_export.verify") / "sample.txt").read_text(encoding="utf-8")
        name = "built-in sample"
    else:
        content, name = read_text(text), str(text)
    source, missing = _find_original(checkpoint, original)
    return Evaluation(
        text=content,
        text_name=name,
        tokens=tokens,
        original=source,
        original_missing=missing,
        original_required=original is not None,
        max_perplexity_ratio=max_perplexity_ratio,
    )


def climb(
    checkpoint: Checkpoint, package: Path, evaluation: Evaluation, predicted_size_bytes: int | None
) -> Report:
    """Climb the ladder with a progress bar."""
    from edkm_export.cli.console import steps
    from edkm_export.verify.ladder import STEPS, verify_coreml

    with steps(STEPS) as advance:
        return verify_coreml(
            checkpoint, package, evaluation, predicted_size_bytes=predicted_size_bytes, advance=advance
        )


def _find_original(checkpoint: Checkpoint, asked: str | None) -> tuple[Source | None, str]:
    """The float model, or the reason why there is none. One that was asked for must be there."""
    from edkm_export.errors import InputError
    from edkm_export.models.source import Source

    if asked is not None:
        return Source.parse(asked), ""
    base = checkpoint.provenance.get("base_model")
    reference = base.get("reference") if isinstance(base, dict) else None
    if not isinstance(reference, str):
        return None, "the checkpoint does not say what it was made from; name it with --original"
    if not Path(reference).exists():
        return None, f"{reference} is not here; name it with --original"
    try:
        source = Source.parse(reference)
        recorded = base.get("sha256") if isinstance(base, dict) else None
        if source.provenance()["sha256"] != recorded:
            return (
                None,
                f"{reference} has changed since it was palettized; name the right one with --original",
            )
    except InputError as error:
        return None, str(error)
    return source, ""
