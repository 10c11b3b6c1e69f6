"""The ladder: comparisons, the rungs, each with the one before, so that training loss and converter bugs never mix.

source files -> original float model -> trained soft model -> hard PyTorch -> decoded artifact (bytes on disk)
-> executed artifact -> its cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from torch import Tensor

from edkm_export.artifact.execution import AT_FAULT, Execution
from edkm_export.artifact.metrics import Perplexity, divergence
from edkm_export.artifact.protocol import Artifact, Decoding, kv_cache_of
from edkm_export.artifact.thresholds import EXECUTION, decode_limit
from edkm_export.beside import Beside
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.kv_cache import FLOAT, INT8, KVCache
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.streamed_model import streamed_weights
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.context_claim import check_context
from edkm_export.verify.continuation import (
    Continuation,
    HardTexts,
    compare_continuations,
    hard_against_decode,
    prefill_against_decode,
    side_by_side,
    tie_limit,
)
from edkm_export.verify.foreign_decoding import compare_decoding
from edkm_export.verify.held_keys import Reader
from edkm_export.verify.inputs import (
    VerificationInputs,
    evaluation_windows,
    limit_of,
    model_positions,
    prompt_tokens,
    provenance,
    weights_room,
)
from edkm_export.verify.localize import find_faults
from edkm_export.verify.report import LayerError, MemoryUse, Report, Rung, TaskResult, Verdict
from edkm_export.verify.rungs import (
    HARD,
    READING,
    continuation_rung,
    decode_rung,
    execution_rung,
    kv_cache_rung,
    palettization_rung,
    size_rung,
    soft_rungs,
)
from edkm_export.verify.source_rung import compare_with_runtime, source_rung, source_runtime_rung
from edkm_export.verify.task_rungs import climb_tasks
from edkm_export.verify.task_runs import Answer, answers_of, questions_of
from edkm_export.verify.time_budget import Budget, cuts, run_windows
from edkm_export.verify.torch_runs import (
    distance_of,
    hidden_states,
    how_run,
    layer_errors,
    measure_original,
    measure_soft,
    perplexity_of,
    transformers_model,
)
from edkm_export.verify.verdicts import faithful_export, quality
from edkm_export.verify.weight_report import describe_tensors, measure_sizes, plot_weights

__all__ = ["count_stages", "verify_artifact"]

Advance = Callable[[str], None]


def count_stages(artifact: Artifact, evaluation: VerificationInputs) -> int:
    """How often `verify_artifact` calls `advance`, unless its time is used up before."""
    decodes = isinstance(artifact, Decoding)
    cached = kv_cache_of(artifact) != FLOAT
    more = (evaluation.soft is not None) + evaluation.localize + bool(evaluation.tasks)
    return 6 + _executed(artifact) + decodes + cached + more


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
        evaluation: text, original, prompts, limit and time.
        predicted_size_bytes: what the weights should take on disk; None: not known, and not compared.
        advance: called with the name of each stage before it starts.

    Returns:
        The report. An artifact that is damaged fails its rung; it does not raise.

    Raises:
        InputError, CheckpointError: the checkpoint, text or original cannot be used.
    """
    begin = advance or (lambda _name: None)
    budget = Budget(evaluation.minutes)
    # those that take long: transformers' models, each execution, decoding, continuing once or twice
    kv_cache = kv_cache_of(artifact)
    models = 1 + (evaluation.original is not None) + (evaluation.soft is not None) + (kv_cache != FLOAT)
    tasks = (2 + (evaluation.original is not None)) * bool(evaluation.tasks)
    budget.expect(models + _executed(artifact) + 3 + tasks)
    tokenizer = load_hard_tokenizer(checkpoint)
    windows = evaluation_windows(checkpoint, evaluation, tokenizer, artifact.context)
    prompts = prompt_tokens(checkpoint, evaluation, tokenizer, artifact.context)
    questions, long = questions_of(
        evaluation.tasks, checkpoint, tokenizer, min(artifact.context, model_positions(checkpoint))
    )
    asked = int(windows.numel())

    room = weights_room(checkpoint, evaluation)
    begin("running the original")

    def answer(model: Any) -> list[Answer]:
        return answers_of(model, questions, tokenizer, budget.share()) if questions else []

    original, missing = measure_original(checkpoint, evaluation, windows, prompts, budget, room, answer)
    before = None if original is None else original.logits
    windows = windows if before is None else windows[: len(before)]
    begin("decoding the weights")
    weights: Mapping[str, Tensor] = {} if original is None else original.weights
    tensors = describe_tensors(checkpoint, weights, {} if original is None else original.output_snr_db)
    plots = plot_weights(checkpoint, weights, tensors)
    weights, how = {}, {} if original is None else {"the original": original.how}
    if original is not None:
        original.weights = {}
    if evaluation.soft is not None:
        begin("running the trained soft model")
    soft, no_soft = measure_soft(checkpoint, evaluation, windows, budget, room)
    begin("running hard PyTorch")
    model = load_hard_model(checkpoint, room_bytes=room)
    execute = transformers_model(model)
    with hidden_states(model) as hidden:
        hard = [execute(windows[0])]
    hard += run_windows(execute, windows[1:], budget.share())
    how[HARD] = how_run(model)
    cached, compared = None, HARD
    if kv_cache != FLOAT:
        compared = f"{HARD}, {kv_cache} keys and values"
        begin(f"running {compared}")
        cached = run_windows(transformers_model(model, kv_cache), windows[: len(hard)], budget.share())
        hard, how[compared] = hard[: len(cached)], how[HARD]
    windows = windows[: len(hard)]
    before, soft = (None if logits is None else logits[: len(hard)] for logits in (before, soft))
    if (held := streamed_weights(model)) is not None:
        held.release()  # the artifact needs the memory
    run = {"original": before, "trained soft model": soft, HARD: hard, compared: cached or hard}
    perplexities = {
        name: perplexity_of(logits, windows) for name, logits in run.items() if logits is not None
    }
    rungs = [source_rung(checkpoint, evaluation.original, missing)]
    source = evaluation.original
    if source is not None and source.gguf_file is not None and source.adapter is None:
        runtime = None if budget.is_over else evaluation.runtime
        ran, rounded = compare_with_runtime(runtime, source, before, windows, values=checkpoint.numel)
        not_tried = budget.spent if budget.is_over else ""
        rungs.append(source_runtime_rung(ran, rounded=rounded, missing=not_tried))
    rungs += soft_rungs(
        no_soft or f"no original to compare with: {missing}",
        "" if evaluation.soft is None else evaluation.soft.how,
        distance_of(before, soft),
        distance_of(soft, hard),
        perplexities,
    )
    rungs.append(
        palettization_rung(limit_of(checkpoint, evaluation), missing, distance_of(before, hard), perplexities)
    )
    if cached is not None:
        limited = limit_of(checkpoint, evaluation).ratio is not None
        loss = divergence(zip(hard, cached, strict=True))
        rungs.append(kv_cache_rung(loss, perplexities, compared, limited=limited))
        cached = None
    errors: dict[str, list[LayerError]] = {}
    continued: dict[str, list[int]] = {}
    if original is not None:
        errors["hard PyTorch against the original"] = layer_errors(original.hidden, hidden)
        continued = original.continued
    answered = None if original is None else original.further
    original = before = soft = None
    run.clear()

    begin("comparing the bytes on disk")
    bytes_rung, exact = compare_bytes(checkpoint, artifact)
    tensors = [tensor.model_copy(update={"bit_exact": exact.get(tensor.name)}) for tensor in tensors]
    sizes = measure_sizes(checkpoint, artifact, predicted_size_bytes)
    rungs += [bytes_rung, size_rung(_weights_size(artifact), predicted_size_bytes)]
    rungs.append(check_context(artifact, model_positions(checkpoint)))

    if isinstance(artifact, Decoding):
        begin(f"decoding the weights: {artifact.decoder_name}")
    if (decoding := compare_decoding(checkpoint, artifact)) is not None:
        rungs.append(decoding)

    run_one = partial(_execute, hard=hard, windows=windows, budget=budget, model=model, kv_cache=kv_cache)
    # Of int8 keys and values hard PyTorch reads each execution's own, one after another.
    apart = [one for one in artifact.executions if one.apart and kv_cache == FLOAT]
    beside = {one.id: Beside(partial(run_one, one)) for one in apart}
    for execution in artifact.executions:
        if execution.execute is not None and not budget.is_over:
            begin(f"running: {execution.words}")
        started = beside.get(execution.id)
        rung, found = run_one(execution) if started is None else started.result()
        rungs.append(rung)
        if found is not None:
            perplexities[execution.words] = found
    del hard, run_one, beside

    if not budget.is_over:
        begin("decoding token by token")
    rungs.append(_decode(artifact, windows, budget, model))
    if not budget.is_over:
        begin("continuing prompts")
    texts, more = _continue(artifact, model, tokenizer, prompts, evaluation.continuation, budget)
    rungs += more
    results: list[TaskResult] = []
    if evaluation.tasks:
        begin("answering tasks")
        results, more = climb_tasks(
            artifact, model, tokenizer, questions, long, answered, missing, evaluation.max_task_loss, budget
        )
        rungs += more
    faults = []
    if evaluation.localize:
        begin("looking for the first value that is off")
        faults = [] if budget.is_over else find_faults(model, artifact, rungs, windows[0])
    return Report(
        artifact=artifact.path.name,
        kind=artifact.kind,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        faithful_export=faithful_export(rungs),
        quality=quality(rungs),
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
        continuations=side_by_side(texts, continued, tokenizer),
        tasks=results,
        memory=None if room is None else MemoryUse(budget=str(evaluation.memory), models=how),
        time_budget=cuts(
            budget,
            rungs,
            asked,
            len(prompts),
            evaluation.localize,
            {one.id: one.positions for one in artifact.executions if one.positions is not None},
        ),
        provenance=provenance(checkpoint, evaluation, windows, artifact.path),
    )


def _weights_size(artifact: Artifact) -> int | None:
    try:
        return artifact.weights_size_bytes()
    except PackageError:
        return None


def _executed(artifact: Artifact) -> int:
    return sum(execution.execute is not None for execution in artifact.executions)


def _execute(
    execution: Execution, hard: list[Tensor], windows: Tensor, budget: Budget, model: Any, kv_cache: KVCache
) -> tuple[Rung, Perplexity | None]:
    """The rung, and the perplexity of what was run; `model` is hard PyTorch, and `hard` are its logits."""
    reader = Reader(model)
    rung = partial(execution_rung, execution, reference=HARD if kv_cache == FLOAT else READING)
    if execution.execute is None or budget.is_over:
        return rung(None, budget.spent), None
    if execution.positions is not None:
        windows = windows[:1, : execution.positions]
        hard = [hard[0][: execution.positions]]
    try:
        execute = execution.execute
        if execution.held is not None:
            execute, hard = reader.beside(execution.held), reader.expected
            rung = partial(rung, misfit=reader.misfit)
        logits = run_windows(execute, windows, budget.share())
    except AT_FAULT as error:
        return rung(str(error)), None
    hard, windows = hard[: len(logits)], windows[: len(logits)]
    if any(one.shape != reference.shape for one, reference in zip(logits, hard, strict=True)):
        found = f"logits have shape {list(logits[0].shape)}, those of hard PyTorch {list(hard[0].shape)}"
        return rung(f"{found}: it is another model."), None
    distance = divergence(zip(hard, logits, strict=True))
    few = execution.positions is not None  # of which a perplexity says nothing
    return rung(distance), None if few else perplexity_of(logits, windows)


def _decode(artifact: Artifact, windows: Tensor, budget: Budget, model: Any) -> Rung:
    first, limit = artifact.executions[0], decode_limit(artifact.executions[0].threshold)
    try:
        session = artifact.session()
        if session is None:
            why = _no_session(artifact) or "this interface of the artifact has no cache"
            return decode_rung(None, why, executor=first.words)
        if budget.is_over:
            return decode_rung(None, budget.spent, executor=first.words)
        if kv_cache_of(artifact) == INT8:
            held: Any = session
            found = hard_against_decode(held, Reader(model), windows[0], budget.share())
            return decode_rung(found, "", limit, first.words, READING)
        found = prefill_against_decode(session, windows[0], budget.share())
        return decode_rung(found, "", limit, first.words)
    except AT_FAULT as error:
        return decode_rung(str(error), "", executor=first.words)


def _continue(
    artifact: Artifact,
    model: Any,
    tokenizer: Any,
    prompts: dict[str, Tensor],
    count: int,
    budget: Budget,
) -> tuple[Sequence[Continuation], list[Rung]]:
    """In the arithmetic of the first execution, and rounded where the artifact can be run so.

    Returns:
        What hard PyTorch wrote, and the rungs.
    """
    written = HardTexts(model, prompts, kv_cache_of(artifact))
    reader, reference = (Reader(model), READING) if kv_cache_of(artifact) == INT8 else (None, HARD)

    def run(*, rounded: bool) -> tuple[Sequence[Continuation], Rung]:
        judged = partial(
            continuation_rung,
            rounded=rounded,
            executor=_executor(artifact, rounded=rounded),
            reference=reference,
        )
        try:
            session = artifact.rounded_session() if rounded else artifact.session()
            missing = _no_session(artifact) if session is None else ""
            if missing or budget.is_over:
                return (), judged(None, missing or budget.spent)
            ties = tie_limit(artifact, rounded=rounded)
            found = compare_continuations(
                artifact, session, written, tokenizer, prompts, count, budget.share(), ties, reader
            )
            return found, judged(found, "")
        except AT_FAULT as error:
            return (), judged(str(error), "")

    texts, rung = run(rounded=False)
    rungs = [rung]
    try:
        if artifact.rounded_session() is not None:
            rungs.append(run(rounded=True)[1])
    except AT_FAULT as error:
        words = _executor(artifact, rounded=True)
        rungs.append(continuation_rung(str(error), "", rounded=True, executor=words, reference=reference))
    return texts, rungs


def _executor(artifact: Artifact, *, rounded: bool) -> str:
    """The execution in whose arithmetic a session runs, in words."""
    first, *others = artifact.executions
    if not rounded:
        return first.words
    found = (one.words for one in others if one.id == "execution-rounded")
    return next(found, f"{first.words}, {EXECUTION['rounded'].words}")


def _no_session(artifact: Artifact) -> str:
    """Why an artifact without a cache cannot be run either; empty when it can."""
    first = artifact.executions[0]
    return first.missing if first.execute is None else ""
