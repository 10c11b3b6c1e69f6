"""The ladder: each rung is compared with the one before, so that training loss and converter bugs never mix.

source files -> original float model -> trained soft model -> hard PyTorch -> decoded artifact (bytes on disk)
-> executed artifact -> its cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from edkm_export.artifact.execution import AT_FAULT, Execution
from edkm_export.artifact.metrics import Divergence, Perplexity, divergence, perplexity, token_losses
from edkm_export.artifact.protocol import Artifact, Decoding
from edkm_export.artifact.thresholds import EXECUTION, NEAR_TIE_NATS, ROUNDED_TIE_NATS, decode_limit
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.continuation import compare_continuations, prefill_against_decode
from edkm_export.verify.foreign_decoding import compare_decoding
from edkm_export.verify.inputs import VerificationInputs, evaluation_windows, prompt_tokens, provenance
from edkm_export.verify.localize import find_faults
from edkm_export.verify.report import LayerError, Report, Rung, Verdict, overall
from edkm_export.verify.rungs import (
    continuation_rung,
    decode_rung,
    execution_rung,
    palettization_rung,
    size_rung,
    soft_rungs,
)
from edkm_export.verify.source_rung import compare_with_runtime, source_rung, source_runtime_rung
from edkm_export.verify.torch_runs import (
    hidden_states,
    layer_errors,
    measure_original,
    measure_soft,
    transformers_model,
)
from edkm_export.verify.weight_report import describe_tensors, measure_sizes, plot_weights

__all__ = ["count_stages", "verify_artifact"]

Advance = Callable[[str], None]


def count_stages(artifact: Artifact, evaluation: VerificationInputs) -> int:
    """How often `verify_artifact` calls `advance`."""
    executed = sum(execution.execute is not None for execution in artifact.executions)
    executed += isinstance(artifact, Decoding)
    return 6 + executed + (evaluation.soft is not None) + evaluation.localize


def verify_artifact(
    checkpoint: Checkpoint,
    artifact: Artifact,
    evaluation: VerificationInputs,
    *,
    predicted_size_bytes: int | None = None,
    advance: Advance | None = None,
) -> Report:
    """Climb the ladder.

    Args:
        checkpoint: what the artifact should hold.
        artifact: what was read from disk.
        evaluation: text, original, prompts and threshold.
        predicted_size_bytes: what the weights should take on disk; None: not known, and not compared.
        advance: called with the name of each stage before it starts.

    Returns:
        The report. An artifact that is damaged fails its rung; it does not raise.

    Raises:
        InputError, CheckpointError: the checkpoint, text or original cannot be used.
    """
    begin = advance or (lambda _name: None)
    tokenizer = load_hard_tokenizer(checkpoint)
    windows = evaluation_windows(checkpoint, evaluation, tokenizer, artifact.context)
    prompts = prompt_tokens(checkpoint, evaluation, tokenizer, artifact.context)

    begin("running the original")
    original, missing = measure_original(checkpoint, evaluation, windows)
    begin("decoding the weights")
    weights = {} if original is None else original.weights
    tensors = describe_tensors(checkpoint, weights, {} if original is None else original.output_snr_db)
    plots = plot_weights(checkpoint, weights, tensors)
    weights.clear()
    if evaluation.soft is not None:
        begin("running the trained soft model")
    soft, no_soft = measure_soft(checkpoint, evaluation, windows)
    begin("running hard PyTorch")
    model = load_hard_model(checkpoint)
    with hidden_states(model) as hidden:
        hard = [transformers_model(model)(windows[0])]
    hard += [transformers_model(model)(window) for window in windows[1:]]
    before = None if original is None else original.logits
    run = {"original": before, "trained soft model": soft, "hard PyTorch": hard}
    perplexities = {name: _perplexity(logits, windows) for name, logits in run.items() if logits is not None}
    rungs = [source_rung(checkpoint, evaluation.original, missing)]
    source = evaluation.original
    if source is not None and source.gguf_file is not None and source.adapter is None:
        rungs.append(
            source_runtime_rung(
                compare_with_runtime(evaluation.runtime, source, before, windows),
                quantized=before is not None and source.is_quantized,
            )
        )
    rungs += soft_rungs(
        no_soft or f"no original to compare with: {missing}",
        "" if evaluation.soft is None else evaluation.soft.how,
        _distance(before, soft),
        _distance(soft, hard),
        perplexities,
    )
    distance = _distance(before, hard)
    rungs.append(palettization_rung(evaluation.max_perplexity_ratio, missing, distance, perplexities))
    errors: dict[str, list[LayerError]] = {}
    if original is not None:
        errors["hard PyTorch against the original"] = layer_errors(original.hidden, hidden)
    original = before = soft = None
    run.clear()

    begin("comparing the bytes on disk")
    bytes_rung, exact = compare_bytes(checkpoint, artifact)
    tensors = [tensor.model_copy(update={"bit_exact": exact.get(tensor.name)}) for tensor in tensors]
    sizes = measure_sizes(checkpoint, artifact, predicted_size_bytes)
    rungs += [bytes_rung, size_rung(_weights_size(artifact), predicted_size_bytes)]

    if isinstance(artifact, Decoding):
        begin(f"decoding the weights: {artifact.decoder_name}")
    if (decoding := compare_decoding(checkpoint, artifact)) is not None:
        rungs.append(decoding)

    for execution in artifact.executions:
        if execution.execute is not None:
            begin(f"running: {execution.words}")
        rung, found = _execute(execution, hard, windows)
        rungs.append(rung)
        if found is not None:
            perplexities[f"executed artifact ({execution.id.removeprefix('execution-')})"] = found
    del hard

    begin("decoding token by token")
    rungs.append(_decode(artifact, windows))
    begin("continuing prompts")
    rungs += _continue(artifact, model, tokenizer, prompts, evaluation.continuation)
    faults = []
    if evaluation.localize:
        begin("looking for the first value that is off")
        faults = find_faults(model, artifact, rungs, windows[0])
    return Report(
        artifact=artifact.path.name,
        kind=artifact.kind,
        verdict=overall(rungs),
        not_run=[f"{rung.candidate}: {rung.detail}" for rung in rungs if rung.verdict is Verdict.NOT_RUN],
        rungs=rungs,
        perplexities=perplexities,
        parameters=checkpoint.numel,
        palettized_parameters=sum(tensor.numel for tensor in checkpoint.palettized.values()),
        bits_per_weight=checkpoint.bits_per_weight,
        size_bytes=artifact.size_bytes(),
        predicted_size_bytes=predicted_size_bytes or 0,
        sizes=sizes,
        tensors=tensors,
        layer_errors=errors,
        weight_plots=plots,
        faults=faults,
        provenance=provenance(checkpoint, evaluation, windows, artifact.path),
    )


def _perplexity(logits: list[Tensor], windows: Tensor) -> Perplexity:
    return perplexity(token_losses(one, window) for one, window in zip(logits, windows, strict=True))


def _distance(reference: list[Tensor] | None, candidate: list[Tensor] | None) -> Divergence | None:
    """None when one of the two was not run."""
    if reference is None or candidate is None:
        return None
    return divergence(zip(reference, candidate, strict=True))


def _weights_size(artifact: Artifact) -> int | None:
    try:
        return artifact.weights_size_bytes()
    except PackageError:
        return None


def _execute(execution: Execution, hard: list[Tensor], windows: Tensor) -> tuple[Rung, Perplexity | None]:
    """The rung, and the perplexity of what was run."""
    if execution.execute is None:
        return execution_rung(execution, execution.missing), None
    if execution.positions is not None:
        windows = windows[:1, : execution.positions]
        hard = [hard[0][: execution.positions]]
    try:
        logits = [execution.execute(window) for window in windows]
    except AT_FAULT as error:
        return execution_rung(execution, str(error)), None
    if any(one.shape != reference.shape for one, reference in zip(logits, hard, strict=True)):
        found = f"logits have shape {list(logits[0].shape)}, those of hard PyTorch {list(hard[0].shape)}"
        return execution_rung(execution, f"{found}: it is another model."), None
    distance = divergence(zip(hard, logits, strict=True))
    few = execution.positions is not None  # of which a perplexity says nothing
    return execution_rung(execution, distance), None if few else _perplexity(logits, windows)


def _decode(artifact: Artifact, windows: Tensor) -> Rung:
    try:
        session = artifact.session()
        if session is None:
            return decode_rung(None, _no_session(artifact) or "this interface of the artifact has no cache")
        limit = decode_limit(artifact.executions[0].threshold)
        return decode_rung(prefill_against_decode(session, windows[0]), "", limit)
    except AT_FAULT as error:
        return decode_rung(str(error), "")


def _continue(
    artifact: Artifact, model: Any, tokenizer: Any, prompts: dict[str, Tensor], count: int
) -> list[Rung]:
    """In the arithmetic of the first execution, and rounded where the artifact can be run so."""
    found = [_continue_in(artifact, model, tokenizer, prompts, count, rounded=False)]
    try:
        if artifact.rounded_session() is not None:
            found.append(_continue_in(artifact, model, tokenizer, prompts, count, rounded=True))
    except AT_FAULT as error:
        found.append(continuation_rung(str(error), "", rounded=True))
    return found


def _continue_in(
    artifact: Artifact, model: Any, tokenizer: Any, prompts: dict[str, Tensor], count: int, *, rounded: bool
) -> Rung:
    coarse = artifact.executions[0].threshold.median_kl > EXECUTION["float32"].median_kl
    ties = ROUNDED_TIE_NATS if rounded or coarse else NEAR_TIE_NATS
    try:
        session = artifact.rounded_session() if rounded else artifact.session()
        if session is None and (missing := _no_session(artifact)):
            return continuation_rung(None, missing, rounded=rounded)
        continued = compare_continuations(artifact, session, model, tokenizer, prompts, count, ties)
        return continuation_rung(continued, "", rounded=rounded)
    except AT_FAULT as error:
        return continuation_rung(str(error), "", rounded=rounded)


def _no_session(artifact: Artifact) -> str:
    """Why an artifact without a cache cannot be run either; empty when it can."""
    first = artifact.executions[0]
    return first.missing if first.execute is None else ""
