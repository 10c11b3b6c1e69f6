"""The ladder: each rung is compared with the one before, so that training loss and converter bugs never mix.

original float model -> hard PyTorch -> decoded artifact (bytes on disk) -> executed artifact
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import CheckpointError, EdkmExportError, InputError, PackageError
from edkm_export.models.hard import load_hard_model, load_hard_tokenizer
from edkm_export.models.source import Source, load_model
from edkm_export.text import token_windows
from edkm_export.verify.bytes import compare_bytes, describe_tensors
from edkm_export.verify.executors import (
    Execute,
    coreml_runtime,
    interpreted,
    sequence_length,
    transformers_model,
)
from edkm_export.verify.metrics import divergence, perplexity, token_losses
from edkm_export.verify.report import Divergence, Perplexity, Report, Rung, Verdict, overall
from edkm_export.verify.rungs import (
    DAMAGED,
    apple_rung,
    execution_rung,
    not_run,
    palettization_rung,
    size_rung,
    soft_rung,
)
from edkm_export.verify.thresholds import EXECUTION, MAX_PERPLEXITY_RATIO

__all__ = ["STEPS", "Evaluation", "verify_coreml"]

STEPS = 8 if platform.system() == "Darwin" else 7
"""How often `advance` is called."""

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What a package is verified with.

    Attributes:
        text: evaluation text.
        text_name: what to call it in the report.
        tokens: tokens of it to use.
        original: the float model; None: its rung is not run.
        original_missing: why there is none.
        original_required: the user named it: that it cannot be used is an error, not a rung that is not run.
        max_perplexity_ratio: threshold of hard PyTorch against the original.
    """

    text: str
    text_name: str
    tokens: int = 1024
    original: Source | None = None
    original_missing: str = "it was not given"
    original_required: bool = False
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO


def verify_coreml(
    checkpoint: Checkpoint,
    package_path: Path,
    evaluation: Evaluation,
    *,
    predicted_size_bytes: int | None = None,
    advance: Advance | None = None,
) -> Report:
    """Climb the ladder for a Core ML package with whole-sequence logits.

    Args:
        checkpoint: what the package should hold.
        package_path: the .mlpackage on disk.
        evaluation: text, original and threshold.
        predicted_size_bytes: what the recipe promised for the weights; None: not known.
        advance: called with the name of each step before it starts.

    Returns:
        The report. A package that is damaged fails its rung; it does not raise.

    Raises:
        InputError, CheckpointError: the checkpoint, text or original cannot be used.
    """
    step = advance or (lambda _name: None)
    step("reading the package")
    package, damage = _open(package_path)
    windows = _windows(checkpoint, evaluation, 512 if damage else sequence_length(package))

    step("running the original")
    reference, weights, missing = _run_original(checkpoint, evaluation, windows)
    step("decoding the weights")
    tensors = describe_tensors(checkpoint, weights)
    weights.clear()
    step("running hard PyTorch")
    hard = _logits(transformers_model(load_hard_model(checkpoint)), windows)
    perplexities = {"hard PyTorch": _perplexity(hard, windows)}
    distance = None
    if reference is not None:
        perplexities = {"original": _perplexity(reference, windows), **perplexities}
        distance = divergence(zip(reference, hard, strict=True))
    reference = None
    rungs = [
        soft_rung("training" in checkpoint.provenance),
        palettization_rung(evaluation.max_perplexity_ratio, missing, distance, perplexities),
    ]

    step("comparing the bytes on disk")
    bytes_rung, exact = compare_bytes(checkpoint, package, damage)
    tensors = [tensor.model_copy(update={"bit_exact": exact.get(tensor.name)}) for tensor in tensors]
    rungs += [
        bytes_rung,
        size_rung(None if package is None else package.weights_size_bytes, predicted_size_bytes),
    ]

    for precision, threshold in EXECUTION.items():
        step(f"executing the package in {threshold.words}")
        executed = _execute(package, precision, windows)
        found = executed if isinstance(executed, str) else divergence(zip(hard, executed, strict=True))
        rung = execution_rung(precision, found)
        rungs.append(not_run(rung, DAMAGED) if package is None else rung)
        if not isinstance(executed, str):
            perplexities[f"executed artifact ({precision})"] = _perplexity(executed, windows)
    if platform.system() == "Darwin":
        step("executing the package in the Core ML runtime")
    rungs.append(_apple(package, package_path, hard, windows))
    return Report(
        artifact=package_path.name,
        kind="coreml",
        verdict=overall(rungs),
        not_run=[f"{rung.candidate}: {rung.detail}" for rung in rungs if rung.verdict is Verdict.NOT_RUN],
        rungs=rungs,
        perplexities=perplexities,
        parameters=checkpoint.numel,
        palettized_parameters=sum(tensor.numel for tensor in checkpoint.palettized.values()),
        bits_per_weight=checkpoint.bits_per_weight,
        size_bytes=0 if package is None else package.size_bytes,
        predicted_size_bytes=predicted_size_bytes or 0,
        tensors=tensors,
        provenance=_provenance(checkpoint, evaluation, windows),
    )


def _open(path: Path) -> tuple[Any, str]:
    """The package, or None and what is wrong with it."""
    from converters.coreml import load_package

    try:
        package = load_package(path)
        sequence_length(package)
        _ = package.weights_size_bytes  # opens every blob file
        return package, ""
    except PackageError as error:
        return None, str(error)


def _windows(checkpoint: Checkpoint, evaluation: Evaluation, length: int) -> Tensor:
    """Tokens of the evaluation text, int64 [windows, at most length]."""
    context = min(length, _positive(checkpoint, "max_position_embeddings"))
    tokenizer = load_hard_tokenizer(checkpoint)
    windows = token_windows(
        evaluation.text, tokenizer, tokens=evaluation.tokens, context=context, source=evaluation.text_name
    )
    vocabulary = _positive(checkpoint, "vocab_size")
    if int(windows.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: its tokenizer gives token {int(windows.max())}, beyond {vocabulary}."
        )
    return windows


def _positive(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{checkpoint.path}: {key} of its configuration is {value!r}; palettize the model again."
        )
    return value


def _run_original(
    checkpoint: Checkpoint, evaluation: Evaluation, windows: Tensor
) -> tuple[list[Tensor] | None, dict[str, Tensor], str]:
    """Logits of the float model and its palettized weights; without it None, nothing, and the reason."""
    if evaluation.original is None:
        return None, {}, evaluation.original_missing
    try:
        model = load_model(evaluation.original, torch.float32)
        state = model.state_dict()
        for name, tensor in checkpoint.palettized.items():
            if name not in state or tuple(state[name].shape) != tensor.shape:
                raise InputError(
                    f"{evaluation.original.reference}: {name} is missing or has another shape than in "
                    f"{checkpoint.path}; it is another model."
                )
    except EdkmExportError as error:
        if evaluation.original_required:
            raise
        return None, {}, str(error)
    weights = {name: state[name] for name in checkpoint.palettized}
    return _logits(transformers_model(model), windows), weights, ""


def _logits(execute: Execute, windows: Tensor) -> list[Tensor]:
    return [execute(window) for window in windows]


def _perplexity(logits: list[Tensor], windows: Tensor) -> Perplexity:
    return perplexity(token_losses(one, window) for one, window in zip(logits, windows, strict=True))


def _execute(package: Any, precision: str, windows: Tensor) -> list[Tensor] | str:
    """Logits of the package, or what keeps it from being executed."""
    if package is None:
        return DAMAGED
    try:
        return _logits(interpreted(package, precision), windows)
    except PackageError as error:
        return str(error)


def _apple(package: Any, path: Path, hard: list[Tensor], windows: Tensor) -> Rung:
    if platform.system() != "Darwin":
        return not_run(apple_rung(""), f"needs macOS, this is {platform.system()}")
    if package is None:
        return not_run(apple_rung(""), DAMAGED)
    found: Divergence | str
    try:
        executed = _logits(coreml_runtime(str(path), sequence_length(package)), windows)
        found = divergence(zip(hard, executed, strict=True))
    except Exception as error:  # the runtime's own exceptions have no common base
        found = f"the Core ML runtime refused the package: {error}"
    return apple_rung(found)


def _provenance(checkpoint: Checkpoint, evaluation: Evaluation, windows: Tensor) -> dict[str, Any]:
    """The checkpoint's own, without the folder of the original: the report travels with the package."""
    known = dict(checkpoint.provenance)
    base = known.get("base_model")
    if isinstance(base, dict) and isinstance(base.get("reference"), str):
        path = Path(base["reference"])
        known["base_model"] = {**base, "reference": path.name if path.is_absolute() else base["reference"]}
    used = {"text": evaluation.text_name, "tokens": int(windows.numel()), "context": int(windows.shape[1])}
    return {**known, "evaluation": used}
