"""What an artifact is verified with: a text, the original, prompts."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edkm_export.artifact.thresholds import QualityLimit, quality_limit
from edkm_export.checkpoint import Checkpoint
from edkm_export.digest import file_sha256
from edkm_export.errors import CheckpointError, InputError
from edkm_export.local_paths import without_folders
from edkm_export.memory_budget import MemoryBudget, room_if_needed
from edkm_export.reference.soft_model import SoftWeights
from edkm_export.reference.source import Source
from edkm_export.text import token_windows
from edkm_export.token_ids import Ids
from edkm_export.verify.source_rung import SourceRuntime
from edkm_export.verify.tasks import Task
from edkm_export.verify.time_budget import WINDOW
from edkm_export.versions import library_versions

__all__ = [
    "FIXED_PROMPTS",
    "REPORT_FILES",
    "VerificationInputs",
    "evaluation_windows",
    "limit_of",
    "model_positions",
    "prompt_tokens",
    "provenance",
    "provenance_of",
    "weights_room",
]

FIXED_PROMPTS = ("The meaning of the word is", "def add(a, b):")
"""Prose and code: the greedy continuation of both is always compared."""

REPORT_FILES = ("report.json", "report.md", "report.html")
"""What the verifier itself writes beside an artifact."""


@dataclass(frozen=True)
class VerificationInputs:
    """What an artifact is verified with.

    Attributes:
        text: evaluation text, or its token ids.
        text_name: what to call it in the report.
        tokens: tokens of it to use.
        original: the float model; None: its rung is not run.
        original_missing: why there is none.
        original_required: the user named it: that it cannot be used is an error, not a rung that is not run.
        runtime: llama.cpp, with which a GGUF file is compared; None: that rung is not run.
        max_perplexity_ratio: worst allowed perplexity of hard PyTorch, as a multiple of the original's; "preset": the
            limit of the checkpoint's bits; None: no limit, the quality is only reported.
        prompts: prompts of the user's own, beside the fixed ones.
        continuation: tokens to continue each prompt by.
        tasks: whose answers are counted; none: no such rungs.
        max_task_loss: share of a task's items that palettization may lose; None: no limit.
        localize: find the first op that leaves the tolerance when an execution fails.
        soft: weights of the trained soft model; None: its rung is not run.
        soft_missing: why there are none.
        soft_required: as `original_required`.
        minutes: time for the verification: fewer tokens are compared then; None: no limit.
        memory: for the verification: models that do not fit are run layer by layer; None: all are run whole.
        command: words of the command that asks for it, for the provenance; empty: none, as from Python.
    """

    text: str | Ids
    text_name: str
    tokens: int = 1024
    original: Source | None = None
    original_missing: str = "it was not given"
    original_required: bool = False
    runtime: SourceRuntime | None = None
    max_perplexity_ratio: float | Literal["preset"] | None = "preset"
    prompts: tuple[str, ...] = ()
    continuation: int = 24
    tasks: tuple[Task, ...] = ()
    max_task_loss: float | None = None
    localize: bool = False
    soft: SoftWeights | None = None
    soft_missing: str = "no training run was given"
    soft_required: bool = False
    minutes: float | None = None
    memory: MemoryBudget | None = None
    command: tuple[str, ...] = ()


def limit_of(checkpoint: Checkpoint, evaluation: VerificationInputs) -> QualityLimit:
    """The user's limit of the perplexity ratio, or that of the checkpoint's fewest bits."""
    if evaluation.max_perplexity_ratio is None:
        return QualityLimit(None, "--max-perplexity-ratio none")
    if evaluation.max_perplexity_ratio != "preset":
        return QualityLimit(evaluation.max_perplexity_ratio, "--max-perplexity-ratio")
    bits = min((tensor.n_bits for tensor in checkpoint.palettized.values()), default=None)
    return quality_limit(bits, str(checkpoint.recipe.get("name", "")))


def evaluation_windows(
    checkpoint: Checkpoint, evaluation: VerificationInputs, tokenizer: Any, context: int
) -> Tensor:
    """Tokens of the evaluation text, int64 [windows, at most `context`]; shorter windows where the time is limited.

    Raises:
        InputError: the text is too short, or the tokenizer is another model's.
        CheckpointError: the configuration makes no sense.
    """
    longest = min(context, model_positions(checkpoint))
    windows = token_windows(
        evaluation.text,
        tokenizer,
        tokens=evaluation.tokens,
        context=longest if evaluation.minutes is None else min(longest, WINDOW),
        source=evaluation.text_name,
    )
    _check_vocabulary(checkpoint, windows)
    return windows


def prompt_tokens(
    checkpoint: Checkpoint, evaluation: VerificationInputs, tokenizer: Any, context: int
) -> dict[str, Tensor]:
    """Tokens of the fixed prompts and of the user's own, int64 [length]; at most half the context.

    Raises:
        InputError: a prompt of the user's is empty, or leaves no room for its continuation.
    """
    limit = max(1, min(context, model_positions(checkpoint)) // 2)
    found = {}
    for prompt in (*FIXED_PROMPTS, *evaluation.prompts):
        ids = torch.tensor(tokenizer(prompt, return_attention_mask=False)["input_ids"], dtype=torch.int64)
        if prompt in evaluation.prompts and not 0 < len(ids) <= limit:
            raise InputError(
                f"prompt {prompt!r}: has {len(ids)} tokens, expected 1 to {limit}, half of the context."
            )
        _check_vocabulary(checkpoint, ids)
        found[prompt] = ids[:limit]
    return found


def provenance(
    checkpoint: Checkpoint, evaluation: VerificationInputs, windows: Tensor, artifact: Path
) -> dict[str, Any]:
    """Where the checkpoint is from, as it says itself, and how it was verified."""
    used = {"text": evaluation.text_name, "tokens": int(windows.numel()), "context": int(windows.shape[1])}
    return provenance_of(checkpoint, evaluation, used, artifact)


def provenance_of(
    checkpoint: Checkpoint, evaluation: VerificationInputs, used: Mapping[str, Any], artifact: Path
) -> dict[str, Any]:
    """The same, with what was used of the evaluation text as it is given."""
    verification = {
        "versions": library_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "artifact": _digests(artifact),
    }
    if evaluation.command:
        # named before it is joined: quotes around a path with spaces would hide where it begins
        verification["command"] = shlex.join(without_folders(list(evaluation.command)))
    return {**checkpoint.provenance, "evaluation": dict(used), "verification": verification}


def weights_room(checkpoint: Checkpoint, evaluation: VerificationInputs) -> int | None:
    """Bytes that the weights of one model may take: a model of transformers and the artifact are there at once.

    Logits of all tokens are kept of three models, and compared in float64; the palettes are there once, mapped.

    Returns:
        None: there is no limit, or all of them fit.
    """
    if evaluation.memory is None:
        return None
    logits = 5 * 8 * evaluation.tokens * _positive(checkpoint, "vocab_size")
    room = evaluation.memory.room_bytes(reserved_bytes=logits + checkpoint.size_bytes, models=2)
    return room_if_needed(checkpoint.numel, room)


def _digests(artifact: Path) -> dict[str, str]:
    """The sha256 of each file of an artifact, by its path within it."""
    files = sorted(artifact.rglob("*")) if artifact.is_dir() else [artifact]
    found = {}
    for path in files:
        if path.is_file() and not path.is_symlink() and path.name not in REPORT_FILES:
            name = path.name if path == artifact else path.relative_to(artifact).as_posix()
            found[name] = file_sha256(path)
    return found


def _check_vocabulary(checkpoint: Checkpoint, tokens: Tensor) -> None:
    vocabulary = _positive(checkpoint, "vocab_size")
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: its tokenizer gives token {int(tokens.max())}, beyond {vocabulary}."
        )


def model_positions(checkpoint: Checkpoint) -> int:
    """Positions for which a model was made.

    Raises:
        CheckpointError: its configuration does not say it.
    """
    return _positive(checkpoint, "max_position_embeddings", "n_positions")


def _positive(checkpoint: Checkpoint, *keys: str) -> int:
    """The first of the keys that is given; GPT-2 has names of its own."""
    key = next((key for key in keys if key in checkpoint.config), keys[0])
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{checkpoint.path}: {key} of its configuration is {value!r}; palettize the model again."
        )
    return value
