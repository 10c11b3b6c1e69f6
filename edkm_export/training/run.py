"""A training run from the float model to model.pt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export import checkpoint
from edkm_export.errors import InputError
from edkm_export.models.hard import load_hard_model
from edkm_export.models.source import Source, load_model, load_tokenizer, tokenizer_files
from edkm_export.recipe import Recipe
from edkm_export.text import read_text, token_windows
from edkm_export.training import checkpoints
from edkm_export.training.callbacks import Clock, Evaluate, Log, Refit
from edkm_export.training.config import TrainConfig
from edkm_export.training.curve import draw
from edkm_export.training.data import read_documents, tokenize
from edkm_export.training.evaluation import Evaluation, evaluate
from edkm_export.training.folder import RunFolder, identify
from edkm_export.training.generation import generate, load_tokens, save_tokens
from edkm_export.training.learner import Learner
from edkm_export.training.optimizer import Progress, freeze
from edkm_export.training.preparation import base_recipe, decoder_bits, insert, prepare
from edkm_export.training.surgery import clusters_of, to_checkpoint, trainable_shapes
from edkm_export.training.trainer import PaletteTrainer, training_arguments
from edkm_export.training.windows import PackedWindows, Tokens

__all__ = ["Outcome", "train"]

_UNLIMITED = 10_000_000  # steps of a run that only time ends


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        path: the checkpoint.
        steps, tokens, seconds: how long it trained.
        average_bits: over the decoder's layers, LUTs included.
        evaluations: {text: {"original", "one-shot", "trained": Evaluation}}.
    """

    path: Path
    steps: int
    tokens: int
    seconds: float
    average_bits: float
    evaluations: dict[str, dict[str, Evaluation]]


@dataclass
class _Run:
    """Everything that the stages of a run share."""

    folder: RunFolder
    config: TrainConfig
    device: str
    announce: Callable[[str], None]
    texts: dict[str, Tensor]
    original: Any = None
    results: dict[str, dict[str, Evaluation]] = field(default_factory=dict)

    def evaluate(self, model: Any, stage: str, step: int) -> None:
        """Evaluate on all texts, and log it."""
        if not self.texts:
            return
        self.announce(f"evaluating, {stage}")
        for name, windows in self.texts.items():
            reference = None if model is self.original else self.original
            found = evaluate(model, windows, reference)
            self.results.setdefault(name, {})[stage] = found
            with self.folder.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "stage": stage, "text": name, **asdict(found)}) + "\n")


def train(
    source: Source,
    data: Sequence[Path],
    folder: Path,
    config: TrainConfig,
    *,
    recipe: Recipe | None = None,
    eval_texts: Sequence[Path] = (),
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    announce: Callable[[str], None] = lambda _name: None,
    advance: Callable[[float], None] | None = None,
) -> Outcome:
    """Train a palettized model, and write `folder`/model.pt.

    Args:
        source: the float model.
        data: text and JSONL files.
        folder: of the run: metadata.json, log.jsonl, curve.png, checkpoints, model.pt.
        config: settings; without steps, tokens and minutes it trains for one pass over the data.
        recipe: instead of the uniform one of the settings.
        eval_texts: evaluation texts.
        device: "cuda" or "cpu"; None: cuda if there is one.
        resume: go on from the last checkpoint of `folder`.
        overwrite: replace an existing `folder`.
        provenance: is stored in model.pt.
        announce: called with the name of each stage before it starts.
        advance: called with the share of the training that each step adds.

    Raises:
        InputError, RecipeError, PaletteError: what was given cannot be used.
        OutputExistsError: `folder` exists, and neither `resume` nor `overwrite` is set.
        TrainingError: it stopped; the message names the last good checkpoint.
    """
    place = RunFolder(folder)
    where = place.open(resume=resume, overwrite=overwrite)
    announce("reading the data")
    tokenizer = load_tokenizer(source)
    tokens = _tokens(data, tokenizer, config)
    texts = {
        path.name: token_windows(
            read_text(path), tokenizer, tokens=config.eval_tokens, context=config.context, source=str(path)
        )
        for path in eval_texts
    }
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    announce("loading the model")
    student = load_model(source, torch.float32).to(chosen)
    _check_tokens(tokens, student, source)
    run = _Run(place, config, chosen, announce, texts)
    if config.objective == "distillation" or texts:
        run.original = copy.deepcopy(student)
    identity = identify(source, data, tokens)
    metadata = place.read(identity, config) if where is not None else None
    if metadata is None:
        place.start()
    if config.self_generated:
        tokens = Tokens.join([tokens, _self_generated(run, student, tokens, tokenizer)])
    progress = _limits(config, tokens)
    if metadata is None:
        run.evaluate(run.original, "original", 0)
        windows = _calibration(tokens, config)
        made = prepare(
            student,
            recipe or base_recipe(config),
            config,
            windows,
            source=source.reference,
            announce=announce,
        )
        used, average = made.recipe, made.average_bits
        run.evaluate(student, "one-shot", 0)
        place.write(identity, config, used, run.results)
    else:
        used = Recipe.model_validate(metadata["recipe"])
        average = decoder_bits(student, used, trainable_shapes(student), source.reference)
        insert(student, used, config, seeded=False, source=source.reference)
        run.results = {
            text: {stage: Evaluation(**found) for stage, found in stages.items()}
            for text, stages in metadata["evaluations"].items()
        }
        assert where is not None
        place.cut_log(int(checkpoints.read_state(where)["step"]))
    trainer = _trainer(run, student, tokens, progress, advance)
    announce("training")
    trainer.run(where)
    return _finish(run, trainer, student, used, average, tokenizer, source, provenance)


def _trainer(
    run: _Run, student: Any, tokens: Tokens, progress: Progress, advance: Callable[[float], None] | None
) -> PaletteTrainer:
    config = run.config
    freeze(student, config)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    distilling = config.objective == "distillation"
    learner = Learner(
        student,
        run.original if distilling else None,
        objective=config.objective,
        temperature=config.temperature,
    )
    clusters = list(clusters_of(student).values())
    step_samples = config.batch_size * config.accumulate
    samples = PackedWindows(
        tokens, context=config.context, samples=progress.steps * step_samples, seed=config.seed
    )
    log = Log(
        run.folder.log, clusters, progress, distilling=distilling, step_tokens=step_samples * config.context
    )
    callbacks = [
        Clock(progress, advance),
        Refit(clusters, config.refit_every),
        log,
        Evaluate(config.eval_every if run.texts else 0, lambda step: run.evaluate(student, "training", step)),
    ]
    arguments = training_arguments(
        config, run.folder.checkpoints, steps=progress.steps, device=run.device, board=_has_board()
    )
    return PaletteTrainer(learner, samples, config, arguments, progress, callbacks)


def _finish(
    run: _Run,
    trainer: PaletteTrainer,
    student: Any,
    recipe: Recipe,
    average: float,
    tokenizer: Any,
    source: Source,
    provenance: Mapping[str, Any] | None,
) -> Outcome:
    run.announce("writing model.pt")
    progress, config = trainer.progress, run.config
    tokens = progress.step * config.batch_size * config.accumulate * config.context
    how = {
        "seed": config.seed,
        "base_model": source.provenance(),
        "training": {
            **config.model_dump(mode="json"),
            "trained_steps": progress.step,
            "trained_tokens": tokens,
        },
    }
    finished = to_checkpoint(
        student,
        recipe,
        tokenizer=tokenizer_files(tokenizer, student),
        provenance={**how, **(provenance or {})},
    )
    path = run.folder.model
    try:
        checkpoint.save(finished, path, overwrite=True)
    except OSError as error:
        raise trainer.failure(f"{path} could not be written ({error})") from error
    if run.texts:
        # What is on disk is evaluated, by the code that every export is checked against.
        run.evaluate(load_hard_model(checkpoint.load(path)).to(run.device), "trained", progress.step)
    try:
        draw(run.folder.log, run.folder.curve)
    except ImportError:
        run.announce("no curve.png, since matplotlib is missing: pip install 'edkm-export[train]'")
    return Outcome(path, progress.step, tokens, progress.elapsed, average, run.results)


def _tokens(data: Sequence[Path], tokenizer: Any, config: TrainConfig) -> Tokens:
    """All data: `.tokens` files as they are, others tokenized."""
    texts = [path for path in data if path.suffix != ".tokens"]
    parts = [load_tokens(path) for path in data if path.suffix == ".tokens"]
    if texts or not parts:
        documents = read_documents(texts)
        parts.insert(0, tokenize(documents, tokenizer, answers_only=config.answers_only, chat=config.chat))
    return Tokens.join(parts)


def _self_generated(run: _Run, model: Any, data: Tokens, tokenizer: Any) -> Tokens:
    """Text of the original; written once, and read again when a run goes on."""
    path = run.folder.generated
    if path.is_file():
        return load_tokens(path)
    run.announce("letting the original write")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InputError("--self-generated: the tokenizer has neither a beginning- nor an end-of-text token.")
    made = generate(
        model,
        data,
        tokens=run.config.self_generated,
        context=run.config.context,
        start=int(start),
        seed=run.config.seed,
    )
    save_tokens(made, path)
    return made


def _limits(config: TrainConfig, tokens: Tokens) -> Progress:
    step_tokens = config.batch_size * config.accumulate * config.context
    limits = [] if config.steps is None else [config.steps]
    if config.tokens is not None:
        limits.append(max(1, config.tokens // step_tokens))
    if not limits and config.minutes is None:
        limits.append(max(1, len(tokens) // step_tokens))
    seconds = None if config.minutes is None else config.minutes * 60
    return Progress(steps=min(limits, default=_UNLIMITED), seconds=seconds)


def _calibration(tokens: Tokens, config: TrainConfig) -> Tensor:
    """Windows from evenly spread places of the data, int64 [windows, context]."""
    context = min(config.context, len(tokens))
    wanted = max(1, min(config.calibration_tokens, len(tokens)) // context)
    starts = torch.linspace(0, len(tokens) - context, wanted).long()
    return torch.stack([tokens.ids[start : start + context] for start in starts.tolist()]).long()


def _check_tokens(tokens: Tokens, model: Any, source: Source) -> None:
    largest, rows = int(tokens.ids.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{source.reference}: its tokenizer gives token {largest}, beyond the model's vocabulary of {rows}."
        )


def _has_board() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
