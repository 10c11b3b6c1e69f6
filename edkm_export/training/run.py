"""A training run from the float model to model.pt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edkm_export import checkpoint
from edkm_export.activity import activity
from edkm_export.plain_data import printable
from edkm_export.recipe import Recipe
from edkm_export.reference.hard_model import hard_weights
from edkm_export.reference.outline import outline
from edkm_export.reference.source import (
    Source,
    load_tokenizer,
    open_weights,
    require_language_model,
)
from edkm_export.reference.tokenizer_files import tokenizer_files
from edkm_export.text import LEAST_TOKENS, read_text, token_windows
from edkm_export.training import run_checkpoints, run_log
from edkm_export.training.callbacks import Clock, Evaluate, FirstStep, Log, Refit, Show, tensorboard
from edkm_export.training.curve import draw
from edkm_export.training.data import read_tokens
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.distributed.sharding import Sharding
from edkm_export.training.evaluation import Evaluations
from edkm_export.training.learner import Learner, Student
from edkm_export.training.models import Models, check_vocabulary
from edkm_export.training.optimizer import freeze
from edkm_export.training.outcome import Outcome
from edkm_export.training.palettized.surgery import to_checkpoint
from edkm_export.training.preparation import (
    Chosen,
    Preparation,
    base_recipe,
    bits_told,
    check_target,
    decoder_bits,
    measures,
)
from edkm_export.training.progress import Progress
from edkm_export.training.run_folder import RunFolder
from edkm_export.training.run_record import Identity, RunRecord
from edkm_export.training.self_generated import first_token, generate
from edkm_export.training.tokens import Tokens
from edkm_export.training.train_config import TrainConfig
from edkm_export.training.trainer import PaletteTrainer
from edkm_export.training.trainer_arguments import training_arguments
from edkm_export.training.windows import PackedWindows, check_length

__all__ = ["Run"]


class Run:
    """One training run; `complete` takes it through its stages `prepare`, `train` and `finish`.

    Args:
        source: the float model.
        data: text and JSONL files, and `.tokens` files that `Tokens.save` wrote.
        folder: of the run: metadata.json, log.jsonl, curve.png, checkpoints, model.pt.
        config: settings; without steps, tokens and minutes it trains for one pass over the data.
        recipe: instead of the uniform one of the settings.
        eval_texts: evaluation texts.
        provenance: is stored in model.pt.
        announce: called with the name of each stage before it starts.
        tell: called with a line that the user should be able to read afterwards.
        advance: called with the share of the training that each step adds.
    """

    processes: Processes = ALONE
    tokenizer: Any
    evaluations: Evaluations
    models: Models
    student: Any
    learner: Learner
    sharding: Sharding | None

    def __init__(
        self,
        source: Source,
        data: Sequence[str | Path],
        folder: str | Path,
        config: TrainConfig,
        *,
        recipe: Recipe | None = None,
        eval_texts: Sequence[str | Path] = (),
        provenance: Mapping[str, Any] | None = None,
        announce: Callable[[str], None] = lambda _name: None,
        tell: Callable[[str], None] = lambda _line: None,
        advance: Callable[[float], None] | None = None,
    ) -> None:
        self.source = source
        self.data = [Path(path) for path in data]
        self.folder = RunFolder(Path(folder))
        self.config = config
        self.recipe = recipe or base_recipe(config)
        self.eval_texts = [Path(path) for path in eval_texts]
        self.provenance = dict(provenance or {})
        self.announce, self.tell, self.advance = announce, tell, advance

    def complete(
        self, *, device: str | None = None, resume: bool = False, overwrite: bool = False
    ) -> Outcome:
        """Train, and write model.pt.

        Under torchrun or accelerate launch the processes do it together, each with its share of the weights. Of a run
        that ends before its first step nothing is left, and what it was to replace is there again.

        Args:
            device: "cuda" or "cpu"; None: cuda if there is one.
            resume: go on from the last checkpoint of the folder.
            overwrite: replace an existing folder.

        Raises:
            InputError, RecipeError, PaletteError: what was given cannot be used, or not by so many processes.
            OutputExistsError: the folder exists, and neither `resume` nor `overwrite` is set.
            TrainingError: it stopped; the message names the last good checkpoint.
        """
        with Processes.join(device) as self.processes, self.folder:
            self.processes.share(self.config.batch_size)
            last = self.processes.first(
                lambda: self.folder.open(resume=resume, overwrite=overwrite, tell=self.tell)
            )
            if resume:
                self._tell_start(last)
            return self.finish(self.train(self.prepare(last), last))

    def _tell_start(self, last: Path | None) -> None:
        """Say what --resume goes on from."""
        folder = self.folder.path
        if last is not None:
            self.tell(f"{folder}: goes on from step {run_checkpoints.step(last)} ({last})")
        elif folder.exists():
            self.tell(f"{folder}: there is no checkpoint to go on from, so the run starts anew")
        else:
            self.tell(f"{folder}: there is no run to go on with, so a new one starts")

    def prepare(self, last: Path | None) -> Tokens:
        """Read data and model, and palettize the model.

        Args:
            last: checkpoint of the run to go on from; None: start anew.

        Returns:
            What to train on.
        """
        require_language_model(self.source, "train")
        self.announce("reading the data")
        if last is None:
            check_target(outline(self.source), self.recipe, self.config, source=self.source.reference)
        self.tokenizer = load_tokenizer(self.source)
        tokens = read_tokens(
            self.data, self.tokenizer, answers_only=self.config.answers_only, chat=self.config.chat
        )
        check_length(
            len(tokens) + self.config.self_generated,
            self.config.context,
            ", ".join(str(path) for path in self.data),
        )
        self.evaluations = Evaluations(self._eval_windows(), self._log, self.announce)
        self.announce("loading the model")
        weights = open_weights(self.source, torch.float32)
        check_vocabulary(weights, tokens)
        self.models = Models(weights, self.config, self.processes)
        written = self._begin(tokens, last)
        return tokens if written is None else Tokens.join([tokens, written])

    def _log(self, record: dict[str, Any]) -> None:
        """Add a line to the log, from the first process."""
        if self.processes.is_first:
            run_log.append(self.folder.log, record)

    def _eval_windows(self) -> dict[str, torch.Tensor]:
        tokens, context = self.config.eval_tokens, self.config.context
        return {
            path.name: token_windows(
                read_text(path),
                self.tokenizer,
                tokens=tokens,
                context=context,
                source=str(path),
                least=LEAST_TOKENS,
            )
            for path in self.eval_texts
        }

    def _begin(self, data: Tokens, last: Path | None) -> Tokens | None:
        """Build original and student, with what has to be known before; text that is added to the data, if any."""
        config, first = self.config, self.processes.first
        identity = first(lambda: Identity.of(self._origin, self.data, data))
        if last is not None:
            started = first(lambda: self.folder.go_on(last, identity, config))
            written = first(lambda: Tokens.load(self.folder.generated)) if config.self_generated else None
            self.recipe, self.evaluations.found = started.recipe, started.evaluations
            self._build(None)
            return written
        needed = measures(config) or bool(config.self_generated or self.eval_texts)
        model = self.models.measured(needed=needed)
        written = self._write_text(data) if config.self_generated else None
        self.evaluations.measure(model, "original", 0)
        tokens = data if written is None else Tokens.join([data, written])
        chosen = Preparation(
            model,
            config,
            self.source.reference,
            self.announce,
            self.processes.device,
            self.models.reads,
            self.processes,
            self.tell,
        ).choose(self.recipe, tokens.sample(config.calibration_tokens, config.context))
        del model
        self.recipe = chosen.recipe
        self._build(chosen)
        if self.processes.is_first:
            for line in bits_told(self.student, self.recipe, config.target_decoder_bits):
                self.tell(line)
        self.evaluations.measure(self._evaluated, "one-shot", 0)
        record = RunRecord(
            command=[printable(word) for word in self.provenance.get("command", ())],
            identity=identity,
            config=config.model_dump(mode="json"),
            recipe=self.recipe,
            evaluations=self.evaluations.found,
            generated_sha256=None if written is None else written.sha256(),
        )
        first(lambda: self.folder.record(record))
        return written

    @functools.cached_property
    def _origin(self) -> dict[str, Any]:
        """Provenance of the source, whose files are hashed once."""
        return self.source.provenance()

    def _write_text(self, data: Tokens) -> Tokens:
        """Text of the original."""
        self.announce("letting the original write")
        made = generate(
            self.models.writer(),
            data,
            tokens=self.config.self_generated,
            context=self.config.context,
            start=first_token(self.tokenizer),
            seed=self.config.seed,
        )

        def kept() -> Tokens:
            made.save(self.folder.generated)
            return made

        return self.processes.first(kept)

    def _build(self, chosen: Chosen | None) -> None:
        """Build the frozen original and the learner; without `chosen`, a checkpoint is to be loaded into it."""
        config = self.config
        distilling = config.objective == "distillation"
        original = None
        if distilling or self.eval_texts:
            self.announce("loading the original")
            narrow = distilling and config.bf16 and not self.eval_texts  # evaluations are in float32
            folded = chosen is not None and bool(chosen.scales)
            original = self.models.original(in_bfloat16=narrow, changed=folded)
        self.evaluations.original = original
        self.announce("palettizing")
        self.student = self.models.student(
            self.recipe, None if chosen is None else chosen.seeds, None if chosen is None else chosen.scales
        )
        freeze(self.student, config)
        self.learner = Learner(
            self.student,
            original if distilling else None,
            objective=config.objective,
            temperature=config.temperature,
        )
        self.sharding = None if self.models.shares is None else Sharding(self.learner, self.models.shares)

    @property
    def _evaluated(self) -> Any:
        """The student as evaluations call it."""
        return self.student if self.sharding is None else Student(self.learner)

    def train(self, tokens: Tokens, last: Path | None) -> PaletteTrainer:
        """Train the student, from the start or from a checkpoint of the run; the trainer, when it is done."""
        config = self.config
        progress = Progress.limited(config, len(tokens))
        samples = PackedWindows(
            tokens,
            context=config.context,
            samples=progress.steps * config.step_windows,
            seed=config.seed,
        )
        if last is not None and (done := run_checkpoints.step(last)) >= progress.steps:
            self.tell(f"all {done:,} steps are done; model.pt is written again")
        arguments = training_arguments(
            config,
            self.folder.checkpoints,
            steps=progress.steps,
            device=self.processes.device,
            processes=self.processes,
        )
        trainer = PaletteTrainer(
            self.learner,
            samples,
            config,
            arguments,
            progress,
            processes=self.processes,
            sharding=self.sharding,
            sizes=self.models.sizes,
        )
        clusters, evaluated = trainer.clusters.clusters, self._evaluated
        for callback in (
            Clock(progress, self.advance, self.processes),
            FirstStep(lambda: self._keep(trainer)),
            Refit(clusters, config.refit_every),
            Log(
                self._log,
                clusters,
                progress,
                distilling=config.objective == "distillation",
                step_tokens=config.step_tokens,
                processes=self.processes,
            ),
            Evaluate(
                config.eval_every if self.eval_texts else 0,
                lambda step: self.evaluations.measure(evaluated, "training", step),
                progress,
            ),
            *tensorboard(),
        ):
            trainer.add_callback(callback)
        self.announce("training")
        with activity("steps", 1.0) as shown:
            trainer.add_callback(Show(shown, progress, config.step_tokens))
            trainer.run(last)
        return trainer

    def _keep(self, trainer: PaletteTrainer) -> None:
        """The first step is made: from now on the run is in its folder."""
        self.folder.keep()
        trainer.save_to(self.folder.checkpoints)

    def finish(self, trainer: PaletteTrainer) -> Outcome:
        """Write model.pt, evaluate what is on disk, and draw the curve."""
        self.announce("writing model.pt")
        progress, config = trainer.progress, self.config
        tokens = progress.step * config.step_tokens
        how = {
            "seed": config.seed,
            "base_model": self._origin,
            "training": {
                **config.model_dump(mode="json"),
                "trained_steps": progress.step,
                "trained_tokens": tokens,
            },
        }
        finished = to_checkpoint(
            self.student,
            self.recipe,
            tokenizer=tokenizer_files(self.tokenizer, self.student),
            provenance={**how, **self.provenance},
            **({} if trainer.sharding is None else {"whole": trainer.sharding.whole_parameter}),
        )
        path = self.folder.model
        try:
            self.processes.first(lambda: checkpoint.save(finished, path, overwrite=True))
        except OSError as error:
            raise trainer.failure(f"{path} could not be written ({error})") from error
        if self.eval_texts:
            # What is on disk is evaluated, by the code that every export is checked against.
            hard = self.models.evaluated(hard_weights(checkpoint.load(path)))
            self.evaluations.measure(hard, "trained", progress.step)
        try:
            if self.processes.is_first and self.folder.log.is_file():
                draw(self.folder.log, self.folder.curve)
        except ImportError:
            self.announce("no curve.png, since matplotlib is missing: pip install 'edkm-export[train]'")
        bits = decoder_bits(self.student), finished.bits_per_weight
        return Outcome(path, progress.step, tokens, progress.elapsed, *bits, self.evaluations.found)
