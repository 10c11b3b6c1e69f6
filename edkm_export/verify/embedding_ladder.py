"""The ladder of an embedding model: the same rungs, with vectors where a language model has logits.

source files -> original float model -> hard PyTorch -> decoded artifact (bytes on disk) -> executed artifact
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from edkm_export.artifact.encodings import EmbeddingArtifact, Encoding, TextTokens
from edkm_export.artifact.execution import AT_FAULT
from edkm_export.checkpoint import Checkpoint
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.errors import EdkmExportError, InputError, PackageError
from edkm_export.reference.hard_model import load_hard_embedding_model, load_hard_tokenizer
from edkm_export.reference.sentence_model import SentenceModel, SentenceTokenizer
from edkm_export.reference.source import load_embedding_model
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.embedding_metrics import Closeness, compare_embeddings
from edkm_export.verify.embedding_rungs import encoding_rung, nearness_rung
from edkm_export.verify.inputs import VerificationInputs, provenance_of
from edkm_export.verify.report import LayerError, Report, Verdict
from edkm_export.verify.rungs import size_rung
from edkm_export.verify.sentences import LEAST_TEXTS, Sentence, read_sentences
from edkm_export.verify.source_rung import source_rung
from edkm_export.verify.time_budget import Budget, cuts
from edkm_export.verify.torch_runs import comparing_outputs, hidden_states, layer_errors
from edkm_export.verify.verdicts import faithful_export, quality
from edkm_export.verify.weight_report import describe_tensors, measure_sizes, plot_weights

__all__ = ["count_embedding_stages", "verify_embedding_artifact"]

Advance = Callable[[str], None]

_ORDER_TIE = 1e-2  # of similarities in the original, below which palettization may turn an order


def count_embedding_stages(artifact: EmbeddingArtifact) -> int:
    """How often `verify_embedding_artifact` calls `advance`, unless its time is used up before."""
    return 4 + sum(encoding.encode is not None for encoding in artifact.encodings)


@dataclass(frozen=True)
class _Texts:
    """What is embedded, and which of it is compared with which."""

    tokens: list[TextTokens]
    queries: list[int]
    documents: list[int]

    def compare(self, reference: Tensor, candidate: Tensor, tie: float) -> Closeness:
        return compare_embeddings(reference, candidate, self.queries, self.documents, tie=tie)


def verify_embedding_artifact(
    checkpoint: Checkpoint,
    artifact: EmbeddingArtifact,
    evaluation: VerificationInputs,
    *,
    predicted_size_bytes: int | None = None,
    advance: Advance | None = None,
) -> Report:
    """Climb the ladder.

    Args:
        checkpoint: what the artifact should hold; an embedding model.
        artifact: what was read from disk.
        evaluation: texts, one a line, the original and the time.
        predicted_size_bytes: what the weights should take on disk; None: not known, and not compared.
        advance: called with the name of each stage before it starts.

    Returns:
        The report. An artifact that is damaged fails its rung; it does not raise.

    Raises:
        InputError, CheckpointError: the checkpoint, texts or original cannot be used.
    """
    assert checkpoint.embedding is not None
    begin = advance or (lambda _name: None)
    budget = Budget(evaluation.minutes)
    texts = _texts(checkpoint, checkpoint.embedding, evaluation, artifact.context)
    begin("running the original")
    original, missing = _original(checkpoint, evaluation)
    begin("running hard PyTorch")
    model = load_hard_embedding_model(checkpoint)
    with hidden_states(model) as hidden:
        _embed(model, texts.tokens[:1])
    hard = _embed(model, texts.tokens)
    rungs = [source_rung(checkpoint, evaluation.original, missing)]
    before, errors, weights, snr = (
        None,
        dict[str, list[LayerError]](),
        dict[str, Tensor](),
        dict[str, float](),
    )
    if original is not None:
        with comparing_outputs(original, checkpoint) as snr, hidden_states(original) as expected:
            _embed(original, texts.tokens[:1])
        before = texts.compare(_embed(original, texts.tokens), hard, _ORDER_TIE)
        errors["hard PyTorch against the original"] = layer_errors(expected, hidden)
        state = original.state_dict()
        weights = {name: state[name] for name in checkpoint.palettized}
    rungs.append(nearness_rung(checkpoint, evaluation, missing, before))
    begin("decoding the weights")
    tensors = describe_tensors(checkpoint, weights, snr)
    plots = plot_weights(checkpoint, weights, tensors)
    weights.clear()
    original = None

    begin("comparing the bytes on disk")
    bytes_rung, exact = compare_bytes(checkpoint, artifact)
    tensors = [tensor.model_copy(update={"bit_exact": exact.get(tensor.name)}) for tensor in tensors]
    sizes = measure_sizes(checkpoint, artifact, predicted_size_bytes)
    rungs += [bytes_rung, size_rung(_weights_size(artifact), predicted_size_bytes)]
    for encoding in artifact.encodings:
        if encoding.encode is not None and not budget.is_over:
            begin(f"running: {encoding.words}")
        rungs.append(_run(encoding, texts, hard, budget))
    return Report(
        artifact=artifact.path.name,
        kind=artifact.kind,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        faithful_export=faithful_export(rungs),
        quality=quality(rungs),
        not_run=[f"{rung.candidate}: {rung.detail}" for rung in rungs if rung.verdict is Verdict.NOT_RUN],
        rungs=rungs,
        perplexities={},
        parameters=checkpoint.numel,
        palettized_parameters=sum(tensor.numel for tensor in checkpoint.palettized.values()),
        bits_per_weight=checkpoint.bits_per_weight,
        size_bytes=artifact.size_bytes(),
        predicted_size_bytes=predicted_size_bytes or 0,
        sizes=sizes,
        tensors=tensors,
        layer_errors=errors,
        weight_plots=plots,
        time_budget=cuts(budget, rungs, sum(len(text.ids) for text in texts.tokens), 0, False, {}),
        provenance=provenance_of(
            checkpoint,
            evaluation,
            {
                "text": evaluation.text_name,
                "texts": len(texts.tokens),
                "queries": len(texts.queries),
                "tokens": sum(len(text.ids) for text in texts.tokens),
            },
            artifact.path,
        ),
    )


def _texts(
    checkpoint: Checkpoint, settings: EmbeddingSettings, evaluation: VerificationInputs, context: int
) -> _Texts:
    """As many of the texts as have the tokens that were asked for, with their prompts, cut to the context.

    Raises:
        InputError: there are too few, or the tokenizer is another model's.
    """
    assert isinstance(evaluation.text, str)
    tokenizer = SentenceTokenizer(load_hard_tokenizer(checkpoint), settings, context)
    sentences: list[Sentence] = []
    tokens: list[TextTokens] = []
    used = 0
    for sentence in read_sentences(evaluation.text, evaluation.text_name):
        ids, prompt = tokenizer.encode(sentence.text, sentence.role)
        used += len(ids)
        if used > evaluation.tokens and len(tokens) >= LEAST_TEXTS:
            break
        if not len(ids):
            raise InputError(f"{evaluation.text_name}: {sentence.text!r:.60} has no tokens.")
        vocabulary = int(checkpoint.config.get("vocab_size", 0))
        if int(ids.max()) >= vocabulary:
            raise InputError(
                f"{checkpoint.path}: its tokenizer gives token {int(ids.max())}, beyond {vocabulary}."
            )
        sentences.append(sentence)
        tokens.append(TextTokens(ids, 0 if settings.include_prompt else prompt))
    queries = [place for place, sentence in enumerate(sentences) if sentence.role != "document"]
    documents = [place for place, sentence in enumerate(sentences) if sentence.role != "query"]
    if not queries or len(documents) < 3:
        queries = documents = list(range(len(sentences)))
    return _Texts(tokens, queries, documents)


@torch.no_grad()
def _embed(model: SentenceModel, texts: Sequence[TextTokens]) -> Tensor:
    """One by one: float32 [texts, dimension]."""
    rows = [
        model(text.ids[None], torch.ones_like(text.ids[None]), prompt_length=text.prompt) for text in texts
    ]
    return torch.cat(rows).float()


def _original(checkpoint: Checkpoint, evaluation: VerificationInputs) -> tuple[SentenceModel | None, str]:
    """The float model; None and the reason when there is none.

    Raises:
        EdkmExportError: the user named it, and it cannot be used.
    """
    if evaluation.original is None:
        return None, evaluation.original_missing
    where = evaluation.original.reference
    try:
        model: SentenceModel = load_embedding_model(evaluation.original, torch.float32)
        if model.settings != checkpoint.embedding:
            raise InputError(
                f"{where}: its pooling, dense layers or prompts are not those of {checkpoint.path}; it is another "
                "model."
            )
        state = model.state_dict()
        for name, tensor in checkpoint.palettized.items():
            if name not in state or tuple(state[name].shape) != tensor.shape:
                raise InputError(
                    f"{where}: {name} is missing or has another shape than in {checkpoint.path}; it is another model."
                )
    except EdkmExportError as error:
        if evaluation.original_required:
            raise
        return None, str(error)
    return model, ""


def _weights_size(artifact: Any) -> int | None:
    try:
        return int(artifact.weights_size_bytes())
    except PackageError:
        return None


def _run(encoding: Encoding, texts: _Texts, hard: Tensor, budget: Budget) -> Any:
    """The rung of one way to run the artifact."""
    if encoding.encode is None or budget.is_over:
        return encoding_rung(encoding, None, budget.spent)
    try:
        found = encoding.encode(texts.tokens)
    except AT_FAULT as error:
        return encoding_rung(encoding, str(error))
    if found.shape != hard.shape:
        shapes = f"embeddings have shape {list(found.shape)}, those of hard PyTorch {list(hard.shape)}"
        return encoding_rung(encoding, f"{shapes}: it is another model.")
    return encoding_rung(encoding, texts.compare(hard, found, encoding.threshold.tie))
