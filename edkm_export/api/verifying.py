"""`edkm_export.verify`: does an export compute what its checkpoint does?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from edkm_export.api.artifacts import find_artifact
from edkm_export.api.calibration_data import read_calibration
from edkm_export.api.cards import refresh_card
from edkm_export.api.climbing import climb, verification_inputs
from edkm_export.api.exporting import Exported
from edkm_export.checkpoint import Checkpoint, load
from edkm_export.checkpoint_record import CheckpointRecord
from edkm_export.errors import InputError
from edkm_export.reference.memory_model import account_of_model, is_causal_lm
from edkm_export.reference.source import Source
from edkm_export.verify.report import Report

__all__ = ["verify"]


def verify(
    out: str | Path | Exported,
    checkpoint: Checkpoint | str | Path | None = None,
    *,
    original: Any = None,
    text: Any = None,
    tokens: int = 1024,
    prompts: Sequence[str] = (),
    max_perplexity_ratio: float | Literal["preset"] | None = "preset",
    tasks: str | Path | Sequence[str | Path] = (),
    max_task_loss: float | None = None,
    run: str | Path | None = None,
    localize: bool = False,
    minutes: float | None = None,
    memory_bytes: int | None = None,
    write_to: str | Path | None = None,
) -> Report:
    """Compare an exported language model with the PyTorch model of its checkpoint, from the bytes on disk.

    Args:
        out: what `export` gave, or the path of an exported folder or package.
        checkpoint: what it was exported from, or the path of that model.pt; default: what `export` told, or the
            model.pt whose sha256 the exported folder names, looked for beside it.
        original: the float model: a folder, hub id or GGUF file, or the model of transformers in memory. Default: where
            the checkpoint was palettized from, if that is still there.
        text: evaluation text: the path of a text file, strings, a dataset, or token ids; default: a built-in sample.
        tokens: of the text to use.
        prompts: also compare the greedy continuation of these texts.
        max_perplexity_ratio: worst allowed perplexity of the palettized model, as a multiple of the original's;
            "preset": what is usual for its bits; None: no limit.
        tasks: JSONL files of items with right answers, or "builtin": how many the original, the palettized model and
            the artifact get right.
        max_task_loss: share of a task's items that palettization may lose, from 0 to 1; None: no limit.
        run: folder of the training run, when the model.pt is not in it.
        localize: when an execution fails, find the first operation that is off.
        minutes: time for it: fewer tokens are compared then; default: no limit.
        memory_bytes: memory for it: models that do not fit are run layer by layer, which is slower and gives the same
            numbers; default: what is free.
        write_to: folder for report.html, report.md and report.json; in an exported folder the model card tells the
            verdict, too.

    Returns:
        The report. An artifact that is damaged fails; it does not raise.

    Raises:
        InputError: the checkpoint is not known, or original, text, prompts or tasks cannot be used.
        PackageError: nothing that was exported lies at `out`.
        CheckpointError: the checkpoint is damaged, or holds no tokenizer.

    Example:
        >>> report = edkm_export.verify(exported, original=model)
        >>> assert report.passed
        >>> report.write("model-report")
    """
    if not isinstance(out, (str, Path, Exported)):
        raise InputError(f"out: is {type(out).__name__}, expected what `export` gave, or the path of it.")
    if isinstance(prompts, str):
        prompts = (prompts,)
    if isinstance(tasks, (str, Path)):
        tasks = (tasks,)
    if isinstance(out, Exported):
        held = out.checkpoint if checkpoint is None else checkpoint
        path = out.path
        if out.weights_size_bytes is None:
            raise InputError(
                f"{path}: is no language model; compare `load_package(path).run(inputs)` with "
                "`edkm_export.decoded_module(checkpoint, module)`."
            )
    else:
        path = Path(out)
        held = _recorded(path) if checkpoint is None else checkpoint
    artifact = find_artifact(path)
    loaded = held if isinstance(held, Checkpoint) else load(held)
    with _source(original) as source:
        inputs = verification_inputs(
            loaded,
            text=None if text is None else _evaluation_text(text, tokens),
            tokens=tokens,
            original=source,
            run=run,
            max_perplexity_ratio=max_perplexity_ratio,
            prompts=prompts,
            localize=localize,
            minutes=minutes,
            memory_bytes=memory_bytes,
            command=(),
            tasks=tasks,
            max_task_loss=max_task_loss,
        )
        report = climb(loaded, artifact, inputs)
    if write_to is not None:
        report.write(write_to)
        refresh_card(Path(write_to), report)
    return report


def _recorded(path: Path) -> Path:
    """The model.pt that an exported folder names, by its sha256."""
    record = CheckpointRecord.read(path) if path.exists() else None
    if record is None:
        raise InputError(f"{path}: does not say which checkpoint it was exported from; give checkpoint=.")
    return record.find(path)


def _evaluation_text(given: Any, tokens: int) -> tuple[str | Tensor, str]:
    read = read_calibration(given, tokens, what="text")
    found = read.ids if read.text is None else read.text
    assert found is not None
    return found, read.name


@contextlib.contextmanager
def _source(original: Any) -> Iterator[Source | None]:
    """The float model as a source; one in memory is written to a temporary folder, where the verifier reads it."""
    if original is None or isinstance(original, (str, Path)):
        yield None if original is None else Source.parse(original).locate()
        return
    if not is_causal_lm(original):
        raise InputError(
            f"original: is {type(original).__name__}, expected a path, a hub id or a language model of transformers."
        )
    from transformers.utils import logging as transformers_logging

    account_of_model(original, f"{type(original).__name__} in memory")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / f"{type(original).__name__} in memory"
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            original.save_pretrained(place)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        yield Source.parse(place)
