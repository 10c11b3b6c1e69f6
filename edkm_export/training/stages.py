"""The stages of a run before its first step: tokens, text of the original, preparation, the same for all processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import InputError
from edkm_export.recipe import Recipe
from edkm_export.reference.source import Source
from edkm_export.training.data import read_documents, tokenize
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.evaluation import Evaluation, evaluate
from edkm_export.training.optimizer import freeze
from edkm_export.training.palettized.surgery import clusters_of
from edkm_export.training.preparation import prepare
from edkm_export.training.run_folder import RunFolder
from edkm_export.training.run_weights import load_weights
from edkm_export.training.self_generated import generate, load_tokens, save_tokens
from edkm_export.training.train_config import TrainConfig
from edkm_export.training.windows import Tokens

__all__ = ["Run", "check_tokens", "prepare_student", "read_tokens", "self_generated", "share_student"]


@dataclass
class Run:
    """Everything that the stages of a run share."""

    folder: RunFolder
    config: TrainConfig
    processes: Processes
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
            if not self.processes.is_first:
                continue
            with self.folder.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "stage": stage, "text": name, **asdict(found)}) + "\n")


def read_tokens(data: Sequence[Path], tokenizer: Any, config: TrainConfig) -> Tokens:
    """All data: `.tokens` files as they are, others tokenized."""
    texts = [path for path in data if path.suffix != ".tokens"]
    parts = [load_tokens(path) for path in data if path.suffix == ".tokens"]
    if texts or not parts:
        documents = read_documents(texts)
        parts.insert(0, tokenize(documents, tokenizer, answers_only=config.answers_only, chat=config.chat))
    return Tokens.join(parts)


def check_tokens(tokens: Tokens, model: Any, source: Source) -> None:
    """Refuse tokens that the model has no embedding for."""
    largest, rows = int(tokens.ids.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{source.reference}: its tokenizer gives token {largest}, beyond the model's vocabulary of {rows}."
        )


def self_generated(run: Run, model: Any, data: Tokens, tokenizer: Any) -> Tokens:
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


def prepare_student(
    run: Run, student: Any, recipe: Recipe, tokens: Tokens, identity: dict[str, Any], source: Source
) -> Recipe:
    """Palettize the student, with an evaluation before and after; the recipe that came of it."""
    config = run.config
    run.evaluate(run.original, "original", 0)
    windows = _calibration(tokens, config)
    made = prepare(student, recipe, config, windows, source=source.reference, announce=run.announce)
    run.evaluate(student, "one-shot", 0)
    run.folder.write(identity, config, made.recipe, run.results)
    return made.recipe


def _calibration(tokens: Tokens, config: TrainConfig) -> Tensor:
    """Windows from evenly spread places of the data, int64 [windows, context]."""
    context = min(config.context, len(tokens))
    wanted = max(1, min(config.calibration_tokens, len(tokens)) // context)
    starts = torch.linspace(0, len(tokens) - context, wanted).long()
    return torch.stack([tokens.ids[start : start + context] for start in starts.tolist()]).long()


def share_student(run: Run, student: Any, where: Path | None) -> None:
    """Give all processes the student that the first one prepared, or that of a checkpoint."""
    if where is not None:
        freeze(student, run.config)  # checkpoints leave out what is not trained
        load_weights(student, where)
        return
    run.processes.copy_from_first(list({id(each): each for each in student.state_dict().values()}.values()))
    for clusters in clusters_of(student).values():
        clusters.restored()
