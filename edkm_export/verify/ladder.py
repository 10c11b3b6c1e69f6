"""The ladder: each rung is compared with the one before, so that training loss and converter bugs never mix.

original float model -> hard PyTorch -> decoded artifact (bytes on disk) -> executed artifact
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import EdkmExportError, InputError, PackageError
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

__all__ = ["MAX_PERPLEXITY_RATIO", "STEPS", "verify_coreml"]

MAX_PERPLEXITY_RATIO = 2.0
_SIZE_TOLERANCE = 0.01
STEPS = 7 if platform.system() == "Darwin" else 6
"""How often `advance` is called when everything is there."""

# Precision -> (least top-1 agreement, largest median KL in nats, why).
_EXECUTION = {
    "float32": (
        0.999,
        1e-5,
        "both sides compute in float32, so only the order of sums differs; a wrong weight, table or op shows at once",
    ),
    "rounded": (
        0.99,
        1e-3,
        "rounding every result to float16 is the least that a phone does; an overflow or lost precision shows here",
    ),
}

Advance = Callable[[str], None]


def verify_coreml(
    checkpoint: Checkpoint,
    package_path: Path,
    *,
    text: str,
    text_name: str,
    tokens: int = 1024,
    original: Source | None = None,
    original_missing: str = "it was not given",
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO,
    predicted_size_bytes: int | None = None,
    advance: Advance | None = None,
) -> Report:
    """Climb the ladder for a Core ML package with whole-sequence logits.

    Args:
        checkpoint: what the package should hold.
        package_path: the .mlpackage on disk.
        text: evaluation text.
        text_name: what to call it in the report.
        tokens: tokens of it to evaluate.
        original: the float model; None: its rung is not run.
        original_missing: why there is none.
        max_perplexity_ratio: threshold of hard PyTorch against the original.
        predicted_size_bytes: what the recipe promised for the weights; None: not known.
        advance: called with the name of each step before it starts.

    Returns:
        The report. A package that is damaged fails its rung; it does not raise.

    Raises:
        InputError, CheckpointError: the checkpoint, text or original cannot be used.
    """
    step = advance or (lambda _name: None)
    tokenizer = load_hard_tokenizer(checkpoint)
    rungs: list[Rung] = []

    step("reading the package")
    package, damage = _open(package_path)
    limit = int(checkpoint.config.get("max_position_embeddings", 512))
    context = min(512, limit) if damage else min(sequence_length(package), limit)
    windows = token_windows(text, tokenizer, tokens=tokens, context=context, source=text_name)
    vocabulary = int(checkpoint.config["vocab_size"])
    if int(windows.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: its tokenizer gives token {int(windows.max())}, beyond {vocabulary}."
        )

    perplexities: dict[str, Perplexity] = {}
    reference: list[Tensor] | None = None
    original_weights: dict[str, Tensor] = {}
    if original is not None:
        step("running the original")
        try:
            model = load_model(original, torch.float32)
        except EdkmExportError as error:
            original, original_missing = None, str(error)
        else:
            reference = _logits(transformers_model(model), windows)
            perplexities["original"] = _perplexity(reference, windows)
            names = checkpoint.palettized.keys()
            original_weights = {name: tensor for name, tensor in model.state_dict().items() if name in names}
            del model

    step("decoding the weights")
    tensors = describe_tensors(checkpoint, original_weights)
    original_weights.clear()
    step("running hard PyTorch")
    model = load_hard_model(checkpoint)
    hard = _logits(transformers_model(model), windows)
    del model
    perplexities["hard PyTorch"] = _perplexity(hard, windows)
    rungs.append(_no_soft_model(checkpoint))
    if reference is None:
        rungs.append(_original_not_run(original_missing, max_perplexity_ratio))
    else:
        rungs.append(
            _original_rung(divergence(zip(reference, hard, strict=True)), perplexities, max_perplexity_ratio)
        )
    del reference

    step("comparing the bytes on disk")
    bytes_rung, exact = compare_bytes(checkpoint, package, damage)
    rungs.append(bytes_rung)
    tensors = [tensor.model_copy(update={"bit_exact": exact.get(tensor.name)}) for tensor in tensors]
    weights_size = 0 if package is None else package.weights_size_bytes
    rungs.append(_size_rung(weights_size, predicted_size_bytes, damage))

    for precision in _EXECUTION:
        step(f"executing the package in {_WORDS[precision]}")
        name = f"executed artifact ({precision})"
        rung, quality = _execution_rung(package, damage, precision, hard, windows)
        rungs.append(rung)
        if quality is not None:
            perplexities[name] = quality
    if platform.system() == "Darwin" and not damage:
        step("executing the package in the Core ML runtime")
    rungs.append(_runtime_rung(package_path, context, damage, hard, windows))

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
        provenance={
            **_without_folders(checkpoint.provenance),
            "evaluation": {
                "text": text_name,
                "tokens": int(windows.numel()),
                "context": int(windows.shape[1]),
            },
        },
    )


def _without_folders(provenance: dict[str, Any]) -> dict[str, Any]:
    """The report travels with the package; where its maker keeps the original does not."""
    base = provenance.get("base_model")
    if not isinstance(base, dict) or not isinstance(base.get("reference"), str):
        return provenance
    reference = base["reference"]
    return {
        **provenance,
        "base_model": {
            **base,
            "reference": Path(reference).name if Path(reference).is_absolute() else reference,
        },
    }


_WORDS = {"float32": "float32", "rounded": "float32 rounded to float16 after each op"}


def _open(path: Path) -> tuple[Any, str]:
    """The package, or None and what is wrong with it."""
    from converters.coreml import load_package

    try:
        package = load_package(path)
        sequence_length(package)
        return package, ""
    except PackageError as error:
        return None, str(error)


def _logits(execute: Execute, windows: Tensor) -> list[Tensor]:
    return [execute(window) for window in windows]


def _perplexity(logits: list[Tensor], windows: Tensor) -> Perplexity:
    return perplexity(token_losses(one, window) for one, window in zip(logits, windows, strict=True))


def _no_soft_model(checkpoint: Checkpoint) -> Rung:
    return Rung(
        id="soft",
        reference="original float model",
        candidate="trained soft model",
        verdict=Verdict.NOT_RUN,
        threshold="none",
        why="training error is measured by the training run",
        detail="the checkpoint was palettized in one shot: there is no soft model",
    )


def _original_not_run(reason: str, ratio: float) -> Rung:
    return Rung(
        id="palettization",
        reference="original float model",
        candidate="hard PyTorch",
        verdict=Verdict.NOT_RUN,
        threshold=_ratio_threshold(ratio),
        why=_RATIO_WHY,
        detail=f"no original to compare with: {reason}",
    )


_RATIO_WHY = "a doubled perplexity is one more bit of surprise a token: it is no longer the same model"


def _ratio_threshold(ratio: float) -> str:
    return f"perplexity at most {ratio:g} times the original's"


def _original_rung(distance: Divergence, perplexities: dict[str, Perplexity], ratio: float) -> Rung:
    before, after = perplexities["original"], perplexities["hard PyTorch"]
    found = after.value / before.value
    return Rung(
        id="palettization",
        reference="original float model",
        candidate="hard PyTorch",
        verdict=Verdict.PASS if found <= ratio else Verdict.FAIL,
        threshold=_ratio_threshold(ratio),
        why=_RATIO_WHY,
        detail=f"perplexity {before.value:.2f} -> {after.value:.2f} (x{found:.2f}), "
        f"top-1 agreement {distance.top1_agreement:.1%}, median KL {distance.kl_median:.2g}",
        measures={"perplexity_ratio": found, **distance.model_dump()},
    )


def _size_rung(actual: int, predicted: int | None, damage: str) -> Rung:
    threshold = f"weights within {_SIZE_TOLERANCE:.0%} of what the recipe predicts"
    why = "a weight that was left dense, or stored twice, shows in the size"
    names: dict[str, Any] = {"id": "size", "reference": "recipe", "candidate": "package size"}
    if damage or predicted is None:
        detail = "the package cannot be read" if damage else "no prediction: the interface is not known"
        return Rung(**names, verdict=Verdict.NOT_RUN, threshold=threshold, why=why, detail=detail)
    off = actual / predicted - 1
    return Rung(
        **names,
        verdict=Verdict.PASS if abs(off) <= _SIZE_TOLERANCE else Verdict.FAIL,
        threshold=threshold,
        why=why,
        detail=f"{actual:,} bytes, predicted {predicted:,} ({off:+.2%})",
        measures={"actual_bytes": actual, "predicted_bytes": predicted},
    )


def _execution_rung(
    package: Any, damage: str, precision: str, hard: list[Tensor], windows: Tensor
) -> tuple[Rung, Perplexity | None]:
    least, largest, why = _EXECUTION[precision]
    names: dict[str, Any] = {
        "id": f"execution-{precision}",
        "reference": "hard PyTorch",
        "candidate": f"executed artifact, {_WORDS[precision]}",
        "threshold": f"top-1 agreement at least {least:.1%}, median KL at most {largest:g}",
        "why": why,
    }
    if damage:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail="the package cannot be read"), None
    try:
        executed = _logits(interpreted(package, precision), windows)
    except PackageError as error:
        return Rung(**names, verdict=Verdict.FAIL, detail=str(error)), None
    distance = divergence(zip(hard, executed, strict=True))
    return _compared(names, distance, least, largest), _perplexity(executed, windows)


def _compared(names: dict[str, Any], distance: Divergence, least: float, largest: float) -> Rung:
    ok = distance.top1_agreement >= least and distance.kl_median <= largest
    return Rung(
        **names,
        verdict=Verdict.PASS if ok else Verdict.FAIL,
        detail=f"top-1 agreement {distance.top1_agreement:.2%}, KL median {distance.kl_median:.2g}, "
        f"mean {distance.kl_mean:.2g}, 99.9% {distance.kl_p999:.2g} over {distance.tokens:,} tokens",
        measures=distance.model_dump(),
    )


def _runtime_rung(path: Path, context: int, damage: str, hard: list[Tensor], windows: Tensor) -> Rung:
    least, largest, _ = _EXECUTION["rounded"]
    names: dict[str, Any] = {
        "id": "execution-apple",
        "reference": "hard PyTorch",
        "candidate": "Apple runtime",
        "threshold": f"top-1 agreement at least {least:.1%}, median KL at most {largest:g}",
        "why": "only Apple's own runtime shows what its compiler and compute units do",
    }
    system = platform.system()
    if system != "Darwin":
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"needs macOS, this is {system}")
    if damage:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail="the package cannot be read")
    try:
        executed = _logits(coreml_runtime(str(path), context), windows)
    except Exception as error:  # the runtime's own exceptions have no common base
        return Rung(**names, verdict=Verdict.FAIL, detail=f"the Core ML runtime refused: {error}")
    return _compared(names, divergence(zip(hard, executed, strict=True)), least, largest)
