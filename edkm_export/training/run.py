"""A training run from the float model to model.pt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edkm_export import checkpoint
from edkm_export.recipe import Recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source, load_model, load_tokenizer, tokenizer_files
from edkm_export.text import read_text, token_windows
from edkm_export.training import run_checkpoints
from edkm_export.training.callbacks import Clock, Evaluate, Log, Refit
from edkm_export.training.curve import draw
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.evaluation import Evaluation
from edkm_export.training.learner import Learner, Student
from edkm_export.training.optimizer import freeze
from edkm_export.training.palettized.surgery import clusters_of, to_checkpoint, trainable_shapes
from edkm_export.training.preparation import base_recipe, decoder_bits, insert
from edkm_export.training.progress import Progress
from edkm_export.training.run_folder import RunFolder, identify
from edkm_export.training.stages import (
    Run,
    check_tokens,
    prepare_student,
    read_tokens,
    self_generated,
    share_student,
)
from edkm_export.training.train_config import TrainConfig
from edkm_export.training.trainer import PaletteTrainer
from edkm_export.training.trainer_arguments import training_arguments
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

    Under torchrun or accelerate launch the processes train it together, each with its share of the weights.

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
        InputError, RecipeError, PaletteError: what was given cannot be used, or not by so many processes.
        OutputExistsError: `folder` exists, and neither `resume` nor `overwrite` is set.
        TrainingError: it stopped; the message names the last good checkpoint.
    """
    with Processes.join(device) as processes:
        processes.share(config.batch_size)
        place = RunFolder(folder)
        where = processes.first(lambda: place.open(resume=resume, overwrite=overwrite))
        return _train(
            source, data, place, where, config, recipe, eval_texts, processes, provenance, announce, advance
        )


def _train(
    source: Source,
    data: Sequence[Path],
    place: RunFolder,
    where: Path | None,
    config: TrainConfig,
    recipe: Recipe | None,
    eval_texts: Sequence[Path],
    processes: Processes,
    provenance: Mapping[str, Any] | None,
    announce: Callable[[str], None],
    advance: Callable[[float], None] | None,
) -> Outcome:
    announce("reading the data")
    tokenizer = load_tokenizer(source)
    tokens = read_tokens(data, tokenizer, config)
    texts = {
        path.name: token_windows(
            read_text(path), tokenizer, tokens=config.eval_tokens, context=config.context, source=str(path)
        )
        for path in eval_texts
    }
    announce("loading the model")
    student = load_model(source, torch.float32).to(processes.device)
    check_tokens(tokens, student, source)
    run = Run(place, config, processes, announce, texts)
    if config.objective == "distillation" or texts:
        run.original = copy.deepcopy(student)
    identity = processes.first(lambda: identify(source, data, tokens))
    metadata = place.read(identity, config) if where is not None else None
    if metadata is None:
        processes.first(place.start)
    if config.self_generated:
        made = processes.first(lambda: self_generated(run, student, tokens, tokenizer))
        tokens = Tokens.join([tokens, made])
    progress = _limits(config, tokens)
    shapes = trainable_shapes(student)
    if metadata is None:
        chosen = recipe or base_recipe(config)
        used = processes.first(lambda: prepare_student(run, student, chosen, tokens, identity, source))
    else:
        used = Recipe.model_validate(metadata["recipe"])
        run.results = {
            text: {stage: Evaluation(**found) for stage, found in stages.items()}
            for text, stages in metadata["evaluations"].items()
        }
        assert where is not None
        step = int(run_checkpoints.read_state(where)["step"])
        processes.first(lambda: place.cut_log(step))
    if metadata is not None or not processes.is_first:
        insert(student, used, config, seeded=False, source=source.reference)
    average = decoder_bits(student, used, shapes, source.reference)
    if processes.are_many:
        share_student(run, student, where)
    trainer = _trainer(run, student, tokens, progress, advance)
    announce("training")
    trainer.run(where)
    return _finish(run, trainer, student, used, average, tokenizer, source, provenance)


def _trainer(
    run: Run, student: Any, tokens: Tokens, progress: Progress, advance: Callable[[float], None] | None
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
    processes = run.processes
    log = Log(
        run.folder.log,
        clusters,
        progress,
        distilling=distilling,
        step_tokens=step_samples * config.context,
        processes=processes,
    )
    evaluated = Student(learner) if processes.are_many else student
    callbacks = [
        Clock(progress, advance, processes),
        Refit(clusters, config.refit_every),
        log,
        Evaluate(
            config.eval_every if run.texts else 0,
            lambda step: run.evaluate(evaluated, "training", step),
            progress,
        ),
    ]
    arguments = training_arguments(
        config,
        run.folder.checkpoints,
        steps=progress.steps,
        device=processes.device,
        board=_has_board(),
        processes=processes,
    )
    return PaletteTrainer(
        learner, samples, config, arguments, progress, callbacks, processes=processes, original=run.original
    )


def _finish(
    run: Run,
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
        **({} if trainer.sharding is None else {"whole": trainer.sharding.whole_parameter}),
    )
    path = run.folder.model
    try:
        run.processes.first(lambda: checkpoint.save(finished, path, overwrite=True))
    except OSError as error:
        raise trainer.failure(f"{path} could not be written ({error})") from error
    if run.texts:
        # What is on disk is evaluated, by the code that every export is checked against.
        run.evaluate(
            load_hard_model(checkpoint.load(path)).to(run.processes.device), "trained", progress.step
        )
    try:
        if run.processes.is_first and run.folder.log.is_file():
            draw(run.folder.log, run.folder.curve)
    except ImportError:
        run.announce("no curve.png, since matplotlib is missing: pip install 'edkm-export[train]'")
    return Outcome(path, progress.step, tokens, progress.elapsed, average, run.results)


def _limits(config: TrainConfig, tokens: Tokens) -> Progress:
    step_tokens = config.batch_size * config.accumulate * config.context
    limits = [] if config.steps is None else [config.steps]
    if config.tokens is not None:
        limits.append(max(1, config.tokens // step_tokens))
    if not limits and config.minutes is None:
        limits.append(max(1, len(tokens) // step_tokens))
    seconds = None if config.minutes is None else config.minutes * 60
    return Progress(steps=min(limits, default=_UNLIMITED), seconds=seconds)


def _has_board() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
