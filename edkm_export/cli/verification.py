"""Options and the run that `coreml`, `onnx` and `verify` share."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from edkm_export.cli.parameter_types import RUN, find_named_original, memory_option, original_options

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.reference.source import Source
    from edkm_export.verify.inputs import VerificationInputs

__all__ = ["minutes_option", "prepare", "verification_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


class _Ratio(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number above 0, "preset" or "none"."""

    name = "RATIO|preset|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | Literal["preset", "none"]:
        """Read it."""
        text = str(value).lower()
        if text == "preset":
            return "preset"
        if text == "none":
            return "none"
        try:
            ratio = float(text)
        except ValueError:
            ratio = math.nan
        if not 0 < ratio < math.inf:
            self.fail(f"{value!r} is neither a number above 0, nor 'preset' or 'none'.", param, ctx)
        return ratio


minutes_option = click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Time for comparing models: fewer tokens are compared then, and it is said how many.  [default: no limit]",
)


def verification_options(function: _F) -> _F:
    """Add --text, --tokens, --prompt, --original, --adapter, --run, --localize, --memory and others to a command.

    Its parameter `original` is a Source, or None.
    """
    return _with_options(_with_named_original(function))


def _with_named_original(function: _F) -> _F:
    @functools.wraps(function)
    def run(*arguments: Any, original: str | None, adapter: str | None, **others: Any) -> Any:
        return function(*arguments, original=find_named_original(original, adapter), **others)

    return run  # type: ignore[return-value]


def _with_options(function: _F) -> _F:
    for option in (
        minutes_option,
        memory_option,
        click.option(
            "--localize", is_flag=True, help="When an execution fails, find the first operation that is off."
        ),
        click.option(
            "--max-perplexity-ratio",
            type=_Ratio(),
            default="preset",
            show_default=True,
            help="Worst allowed perplexity of the palettized model, as a multiple of the original's; beyond it the "
            "exit status is 1. preset: what is usual for its bits; none: no limit.",
        ),
        click.option(
            "--max-task-loss",
            type=click.FloatRange(0, 1),
            help="Largest share of a task's items that the palettized model may answer right fewer than the original; "
            "beyond it the exit status is 1.  [default: no limit]",
        ),
        click.option(
            "--tasks",
            multiple=True,
            help="JSONL file of items with right answers, or builtin: how many the original, the palettized model and "
            "the artifact get right; may be given several times.",
        ),
        click.option(
            "--run",
            type=RUN,
            help="Folder of the training run, when MODEL.PT is not in it: the model as training held it, before each "
            "weight was rounded to its lookup table (soft model), is compared too.",
        ),
        original_options,
        click.option(
            "--tokens",
            type=click.IntRange(min=2),
            default=1024,
            show_default=True,
            help="Tokens of the text to use.",
        ),
        click.option(
            "--prompt",
            "prompts",
            multiple=True,
            help="Also compare the greedy continuation of this text; may be given several times.",
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
    original: Source | None,
    run: Path | None,
    max_perplexity_ratio: float | Literal["preset", "none"],
    prompts: tuple[str, ...],
    localize: bool,
    minutes: float | None,
    memory_bytes: int | None,
    tasks: tuple[str, ...],
    max_task_loss: float | None,
) -> VerificationInputs:
    """Read what the options name, before the long work.

    Raises:
        InputError: the text, the original or the run that was asked for cannot be used.
    """
    from edkm_export.api.climbing import verification_inputs
    from edkm_export.api.originals import read_evaluation_text

    return verification_inputs(
        checkpoint,
        text=None if text is None else read_evaluation_text(text),
        tokens=tokens,
        original=original,
        run=run,
        max_perplexity_ratio=None if max_perplexity_ratio == "none" else max_perplexity_ratio,
        prompts=prompts,
        localize=localize,
        minutes=minutes,
        memory_bytes=memory_bytes,
        command=("edkm-export", *sys.argv[1:]),
        tasks=tasks,
        max_task_loss=max_task_loss,
    )
