"""The verification of an export, for the commands and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edkm_export.activity import activity, stages
from edkm_export.api.artifacts import open_artifact, open_embedding_artifact
from edkm_export.api.artifacts import predicted_size_bytes as predict
from edkm_export.api.originals import (
    check_length,
    check_sentences,
    find_original,
    find_soft,
    read_evaluation_text,
)

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.reference.source import Source
    from edkm_export.token_ids import Ids
    from edkm_export.verify.inputs import VerificationInputs
    from edkm_export.verify.report import Report

__all__ = ["climb", "verification_inputs"]


def verification_inputs(
    checkpoint: Checkpoint,
    *,
    text: tuple[str | Ids, str] | None,
    tokens: int,
    original: Source | None,
    run: str | Path | None,
    max_perplexity_ratio: float | Literal["preset"] | None,
    prompts: Sequence[str],
    localize: bool,
    minutes: float | None,
    memory_bytes: int | None,
    command: Sequence[str],
    tasks: Sequence[str | Path] = (),
    max_task_loss: float | None = None,
) -> VerificationInputs:
    """What an artifact is verified with; what cannot be used is refused before the long work.

    Args:
        checkpoint: what was exported.
        text: evaluation text or its token ids, and what to call it; None: the built-in sample.
        tokens: of the text to use.
        original: the float model; None: what the checkpoint was made from, if it is there.
        run: folder of the training run; None: where the checkpoint lies.
        max_perplexity_ratio: limit of the quality; "preset": that of the bits; None: no limit.
        prompts: whose continuation is compared too.
        localize: find the first operation that is off.
        minutes: time for it; None: no limit.
        memory_bytes: memory for it; None: what is free.
        command: words of the command that asks for it; empty: none.
        tasks: JSONL files, or "builtin".
        max_task_loss: share of a task's items that palettization may lose; None: no limit.

    Raises:
        InputError: a file of tasks, the text, the original or the run that was asked for cannot be used.
    """
    from edkm_export.errors import InputError
    from edkm_export.memory_budget import MemoryBudget
    from edkm_export.reference import llamacpp
    from edkm_export.reference.hard_model import load_hard_tokenizer
    from edkm_export.verify.inputs import VerificationInputs
    from edkm_export.verify.tasks import read_tasks

    embeds = checkpoint.embedding is not None
    if embeds:
        _refuse_for_embeddings(checkpoint, max_perplexity_ratio, prompts, localize, run, tasks)
    if max_task_loss is not None and not (tasks and 0 <= max_task_loss <= 1):
        raise InputError(
            f"max_task_loss: is {max_task_loss!r}, expected a share from 0 to 1, beside the tasks (--tasks)."
        )
    asked = read_tasks(tasks)
    content, name = read_evaluation_text(None, sentences=embeds) if text is None else text
    if embeds:
        check_sentences(content, name)
    elif text is not None:
        check_length(content, load_hard_tokenizer(checkpoint), tokens, name)
    source, missing = find_original(checkpoint, original)
    soft, no_soft = find_soft(checkpoint, run)
    return VerificationInputs(
        text=content,
        text_name=name,
        tokens=tokens,
        original=source,
        original_missing=missing,
        original_required=original is not None,
        runtime=llamacpp,
        max_perplexity_ratio=max_perplexity_ratio,
        prompts=tuple(prompts),
        tasks=asked,
        max_task_loss=max_task_loss,
        localize=localize,
        soft=soft,
        soft_missing=no_soft,
        soft_required=run is not None,
        minutes=minutes,
        memory=MemoryBudget.of(memory_bytes),
        command=tuple(command),
    )


def _refuse_for_embeddings(
    checkpoint: Checkpoint,
    max_perplexity_ratio: float | Literal["preset"] | None,
    prompts: Sequence[str],
    localize: bool,
    run: str | Path | None,
    tasks: Sequence[str | Path],
) -> None:
    """Refuse what only a language model has.

    Raises:
        InputError: such a thing was asked for.
    """
    from edkm_export.errors import InputError

    given = {
        "a prompt to continue (--prompt)": bool(prompts),
        "a limit of the perplexity (--max-perplexity-ratio)": max_perplexity_ratio not in ("preset", None),
        "--localize": localize,
        "a training run (--run)": run is not None,
        "a task (--tasks)": bool(tasks),
    }
    if asked := next((what for what, wanted in given.items() if wanted), None):
        raise InputError(
            f"{checkpoint.path or 'checkpoint'}: is an embedding model, and {asked} is for language models; leave "
            "it out."
        )


def climb(
    checkpoint: Checkpoint,
    path: Path,
    evaluation: VerificationInputs,
    predicted_size_bytes: int | None = None,
) -> Report:
    """Climb the ladder.

    Args:
        checkpoint: what the artifact should hold.
        path: of the artifact, as `find_artifact` gives it.
        evaluation: from `verification_inputs`.
        predicted_size_bytes: what the exporter promised; None: what a plan of the same export says.
    """
    from edkm_export.verify.inputs import weights_room
    from edkm_export.verify.ladder import count_stages, verify_artifact

    if checkpoint.embedding is not None:
        return _climb_embeddings(checkpoint, path, evaluation, predicted_size_bytes)
    with activity("reading the artifact"):
        artifact = open_artifact(path, weights_room(checkpoint, evaluation))
        if predicted_size_bytes is None:
            predicted_size_bytes = predict(checkpoint, artifact)
    with stages(count_stages(artifact, evaluation)) as advance:
        return verify_artifact(
            checkpoint, artifact, evaluation, predicted_size_bytes=predicted_size_bytes, advance=advance
        )


def _climb_embeddings(
    checkpoint: Checkpoint, path: Path, evaluation: VerificationInputs, predicted_size_bytes: int | None
) -> Report:
    """The ladder of an embedding model."""
    from edkm_export.verify.embedding_ladder import count_embedding_stages, verify_embedding_artifact

    with activity("reading the artifact"):
        artifact = open_embedding_artifact(path)
        if predicted_size_bytes is None:
            predicted_size_bytes = predict(checkpoint, artifact)
    with stages(count_embedding_stages(artifact)) as advance:
        return verify_embedding_artifact(
            checkpoint, artifact, evaluation, predicted_size_bytes=predicted_size_bytes, advance=advance
        )
