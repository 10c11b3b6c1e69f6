"""One-shot palettization of a language model, for the command and for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edkm_export.activity import activity
from edkm_export.api.bit_choice import choose_bits
from edkm_export.api.calibration_data import CONTEXT, CalibrationInput
from edkm_export.api.effort import Effort
from edkm_export.api.originals import read_evaluation_text
from edkm_export.api.subjects import Subject
from edkm_export.calibration import CalibrationText, check_vocabulary, input_energy
from edkm_export.checkpoint import Checkpoint
from edkm_export.compensated_weight import ROUNDS
from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.embedding.embedding_model import embedding_config
from edkm_export.errors import InputError
from edkm_export.loss_estimate import ESTIMATE_CONTEXT, LossEstimate, Predictions, estimate_tokens
from edkm_export.memory_budget import MemoryBudget
from edkm_export.palettization import palettizable_shapes, palettize_model
from edkm_export.propagation import windows_at_once
from edkm_export.recipe import Recipe
from edkm_export.reference.sentence_model import SentenceTokenizer
from edkm_export.reference.streamed_model import device_of
from edkm_export.reference.tokenizer_files import embedding_tokenizer_files, tokenizer_files
from edkm_export.text import in_windows, token_windows
from edkm_export.training.bit_budget import BitBudget, BitTarget
from edkm_export.versions import library_versions

__all__ = ["CALIBRATION_TOKENS", "OneShot", "palettize_language_model"]

_WHOLE_BYTES = 2.6
"""Memory that palettization of a whole model takes, in bytes a weight; see `forecast`."""

CALIBRATION_TOKENS = 4096
"""Of the calibration text, by default."""

_SENTENCES = (
    64  # tokens of a window that an embedding model is calibrated with: its texts are no longer, mostly
)


@dataclass(frozen=True)
class OneShot:
    """What came out.

    Attributes:
        checkpoint: the palettized model.
        remarks: what was done to the weights on the way, in words.
        estimate: of the loss; None: it was not asked for, or there is no text to estimate it on.
        tokenizer: of the model; None: it has none.
    """

    checkpoint: Checkpoint
    remarks: tuple[str, ...]
    estimate: LossEstimate | None
    tokenizer: Any


def palettize_language_model(
    subject: Subject,
    plan: Recipe,
    *,
    calibration: CalibrationInput | None,
    calibration_tokens: int | None,
    estimate: bool,
    command: Sequence[str],
    target: BitTarget | None = None,
    memory: MemoryBudget | None = None,
    effort: Effort | None = None,
    tell: Callable[[str], None] = lambda _line: None,
) -> OneShot:
    """Palettize a language model, or an embedding model. What can be refused is refused before its weights are read.

    Args:
        subject: the model.
        plan: bits, groups and LUT dtype by module name.
        calibration: text or ids that weigh the clustering; None: all weights count the same.
        calibration_tokens: of it to use; None: as many as the effort is good for.
        estimate: compare with the original, on text that calibration did not see.
        command: for the provenance.
        target: average that bits are chosen for weight by weight, from those of the plan on; None: as planned.
        memory: a model that does not fit in it is read layer by layer; None: models are read whole.
        effort: fits layers to what the float ones make; None: they make up for their errors alone.
        tell: called with what was chosen, for people, before it is done.

    Raises:
        ConversionError: a family that could not be exported.
        InputError, SourceError: the model, its tokenizer or the text cannot be used.
        RecipeError, PaletteError: the recipe does not fit the model.
    """
    where = subject.where
    with activity(f"reading {where}"):
        settings, config = subject.embedding(), subject.config()
        if settings is None:
            decoder_config(config.to_dict(), where)
        else:
            embedding_config(config.to_dict(), where)
        account = subject.account()
        outline = subject.outline()
        shapes = palettizable_shapes(outline)
        rules = plan.plan(shapes, where)
        room = _room(outline, memory, 0 if effort is None else effort.memory_bytes)
        if target is not None:
            _check_target(target, settings is not None, calibration is not None, room is not None, where)
            BitBudget.of(outline, shapes, plan, target, source=where)
        tokenizer = subject.tokenizer()
        estimate = estimate and bool(rules) and tokenizer is not None and settings is None
        wanted = estimate_tokens(config.vocab_size) if estimate else 0
        if effort is not None:
            effort.check(outline, calibration, is_embedding=settings is not None, source=where)
        if calibration_tokens is None:
            calibration_tokens = CALIBRATION_TOKENS if effort is None else effort.tokens
        longest = config.max_position_embeddings if settings is None else min(settings.max_tokens, _SENTENCES)
        windows, held_out = _texts(calibration, tokenizer, calibration_tokens, wanted, longest)
        if settings is not None and windows is not None and tokenizer is not None:
            windows = SentenceTokenizer(tokenizer, settings).framed(windows)
        if effort is not None and windows is not None and calibration is not None:
            windows = effort.windows(outline, windows, calibration.name)
        for tokens in (windows, held_out):
            if tokens is not None:
                check_vocabulary(outline, tokens)
    model = subject.load(room)
    if held_out is not None and (device := device_of(model)).type != "cpu":
        raise InputError(f"estimate: {where} is on {device}; it is made on the CPU only: model.cpu().")
    provenance: dict[str, Any] = {
        "versions": library_versions(),
        "command": list(command),
        "seed": None,
        "base_model": subject.base_model(),
        "source": account.provenance(),
    }
    energy = predictions = found = None
    if windows is not None and calibration is not None:
        if settings is None and effort is None:
            windows = windows_at_once(model, windows)
        provenance["calibration"] = calibration.provenance(windows)
    if settings is not None:
        files = {} if tokenizer is None else embedding_tokenizer_files(tokenizer, settings.max_tokens)
        finished = model.config.to_dict()
    else:
        changed = subject.settings(model)
        files = {} if tokenizer is None else tokenizer_files(tokenizer, changed)
        finished = changed.config.to_dict()
    with _evaluating(model):
        if settings is not None and windows is not None:  # the inputs of its layers weigh their columns
            with activity("calibrating", len(windows)) as counted:
                energy = input_energy(model, windows, advance=counted.advance)
            windows = None
        if held_out is not None:
            with activity("predicting with the original"):
                predictions = Predictions(model, held_out)
        vocabulary = None
        if target is not None and windows is not None:
            some = windows if effort is None else windows[: max(1, CALIBRATION_TOKENS // windows.shape[1])]
            chosen, vocabulary = choose_bits(model, shapes, plan, target, some, source=where)
            tell(f"plan: {chosen.words()}")
            plan, rules = chosen.recipe, dict(chosen.rules)
            provenance["target_bits"] = {
                "bits": target.bits,
                "of": "all weights" if target.whole else "the decoder",
                "predicted_bytes": chosen.size_bytes,
            }
        with activity("palettizing", sum(shapes[name][0] * shapes[name][1] for name in rules)) as counted:

            def advance(_name: str, count: int) -> None:
                counted.advance(count)

            begun = None
            if effort is not None and windows is not None:
                begun = effort.reconstruct(
                    model,
                    rules,
                    windows,
                    vocabulary=vocabulary,
                    consume=subject.consume,
                    source=where,
                    advance=advance,
                )
                provenance |= {"seed": effort.settings.seed, "reconstruction": effort.record(begun)}
                windows = None
            parts = palettize_model(
                model,
                plan,
                energy=energy,
                windows=windows,
                vocabulary=vocabulary,
                begun=begun,
                source=where,
                advance=advance,
                consume=subject.consume,
            )
    if parts.compensated:
        provenance["compensation"] = {
            "weights": len(parts.compensated),
            "damping": "min(1, 4^(bits - 4))",
            "rounds": ROUNDS,
        }
    if predictions is not None:
        with activity("estimating the loss"), _keeping_weights(model, not subject.consume):
            found = predictions.compare(model, parts.palettized, None if begun is None else begun.dense)
        name = "built-in sample" if calibration is None else Path(calibration.name).name
        provenance["estimate"] = {"text": name, **found.record()}
    checkpoint = Checkpoint(
        config=finished,
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        tokenizer=files,
        recipe=plan.model_dump(mode="json"),
        provenance=provenance,
        embedding=settings,
    )
    regrouped = plan.regrouped(shapes)
    return OneShot(checkpoint, (*account.remarks, *([regrouped] if regrouped else [])), found, tokenizer)


def _check_target(
    target: BitTarget, is_embedding: bool, is_calibrated: bool, is_streamed: bool, where: str
) -> None:
    """Refuse a target for what no sensitivity can be measured of."""
    if is_embedding:
        raise InputError(f"{target.option}: is for language models; give {where} --bits or a --recipe.")
    if not is_calibrated:
        raise InputError(
            f"{target.option}: needs a --calibration text, on which it is measured which weights matter."
        )
    if is_streamed:
        raise InputError(
            f"{target.option}: {where} does not fit in memory whole, which gradients need; give more --memory, or a "
            "--recipe."
        )


def _room(outline: nn.Module, memory: MemoryBudget | None, more_bytes: int) -> int | None:
    """What the weights of a model that is read layer by layer may take; None: it fits whole, or has no limit.

    `more_bytes` is what is needed beside weights.
    """
    values = sum(parameter.numel() for parameter in outline.parameters())
    if memory is None or memory.room_bytes(reserved_bytes=more_bytes) >= _WHOLE_BYTES * values:
        return None
    return memory.room_bytes(reserved_bytes=values + more_bytes)  # the palettes, a byte a weight at most


def _texts(
    calibration: CalibrationInput | None, tokenizer: Any, tokens: int, wanted: int, longest: int
) -> tuple[Tensor | None, Tensor | None]:
    """Windows to calibrate on, and windows to estimate the loss on; None: there are none."""
    windows = held_out = None
    if calibration is not None:
        read = CalibrationText.read(
            calibration.content(tokenizer),
            tokenizer,
            tokens=tokens,
            context=min(CONTEXT, longest),
            held_out=wanted,
            source=calibration.name,
        )
        windows, held_out = read.windows, read.held_out
    elif wanted:
        sample, name = read_evaluation_text(None)
        held_out = token_windows(sample, tokenizer, tokens=wanted, context=wanted, source=name).flatten()
    return windows, None if held_out is None else in_windows(held_out, min(ESTIMATE_CONTEXT, longest))


@contextlib.contextmanager
def _keeping_weights(model: nn.Module, wanted: bool) -> Iterator[None]:
    """What was put in place of a parameter's values is taken out again."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()] if wanted else []
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.data = values


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; each part is as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
