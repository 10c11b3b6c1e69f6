"""Several checkpoints and artifacts side by side, on one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from edkm_export.artifact.execution import Execute
from edkm_export.artifact.metrics import (
    Divergence,
    Perplexity,
    Positions,
    compare_positions,
    perplexity,
    summarize,
    token_losses,
)
from edkm_export.artifact.protocol import Artifact, DamagedArtifact
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import EdkmExportError, InputError, PackageError
from edkm_export.guarded_tokenizer import open_tokenizer
from edkm_export.local_paths import without_folders
from edkm_export.memory_budget import room_if_needed
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.outline import outline
from edkm_export.reference.source import Source, load_model
from edkm_export.reference.streamed_model import streamed_weights
from edkm_export.text import token_windows
from edkm_export.verify import charts
from edkm_export.verify.html import page
from edkm_export.verify.time_budget import WINDOW, Budget, run_windows
from edkm_export.verify.torch_runs import transformers_model

__all__ = ["Compared", "Comparison", "Contestant", "compare", "comparison_page"]


@dataclass(frozen=True)
class Contestant:
    """One thing to compare.

    Attributes:
        name: for the table.
        kind: "checkpoint" or the kind of artifact.
        bits_per_weight: of storage, LUTs and unpalettized parameters included.
        size_bytes: on disk.
        context: most positions of one text; None: no limit of its own.
        tokenizer: loads its tokenizer.
        load: gives what runs it; the memory of it is free when the result is dropped.
    """

    name: str
    kind: str
    bits_per_weight: float
    size_bytes: int
    context: int | None
    tokenizer: Callable[[], Any]
    load: Callable[[], Execute]

    @classmethod
    def of_checkpoint(
        cls, checkpoint: Checkpoint, name: str, size_bytes: int, room_bytes: int | None = None
    ) -> Contestant:
        """A model.pt, run as hard PyTorch.

        Args:
            checkpoint: the checkpoint.
            name: for the table.
            size_bytes: of the file.
            room_bytes: what decoded weights may take in memory, see `load_hard_model`.
        """
        room_bytes = room_if_needed(checkpoint.numel, room_bytes)
        positions = checkpoint.config.get("max_position_embeddings")
        return cls(
            name=name,
            kind="checkpoint, hard PyTorch" + ("" if room_bytes is None else ", layer by layer"),
            bits_per_weight=checkpoint.bits_per_weight,
            size_bytes=size_bytes,
            context=positions if isinstance(positions, int) else None,
            tokenizer=lambda: load_hard_tokenizer(checkpoint),
            load=lambda: transformers_model(load_hard_model(checkpoint, room_bytes=room_bytes)),
        )

    @classmethod
    def of_artifact(cls, artifact: Artifact, name: str, folder: str | Path) -> Contestant:
        """An artifact, run by its first execution.

        Args:
            artifact: what was opened.
            name: for the table.
            folder: where its tokenizer lies.

        Raises:
            PackageError: it is damaged.
        """
        folder = Path(folder)
        if isinstance(artifact, DamagedArtifact):
            raise PackageError(artifact.reason)
        execution = artifact.executions[0]
        if execution.execute is None:
            raise PackageError(f"{artifact.path}: cannot be run here: {execution.missing}.")
        palettized = artifact.palettized()
        # Parameters have dotted names; tables and masks, which are constants of the program, do not.
        dense = {name: tensor for name, tensor in artifact.dense().items() if "." in name}
        bits = 8 * sum(tensor.size_bytes for tensor in palettized.values())
        bits += 16 * sum(tensor.numel() for tensor in dense.values())
        weights = sum(tensor.numel for tensor in palettized.values())
        weights += sum(tensor.numel() for tensor in dense.values())
        execute = execution.execute
        return cls(
            name=name,
            kind=f"{artifact.kind}, {execution.words}",
            bits_per_weight=bits / max(1, weights),
            size_bytes=artifact.size_bytes(),
            context=artifact.context,
            tokenizer=lambda: _tokenizer_of(folder),
            load=lambda: execute,
        )


@dataclass(frozen=True)
class Compared:
    """What came of one contestant; `distance` is from the original, None without it."""

    name: str
    kind: str
    bits_per_weight: float | None
    size_bytes: int | None
    perplexity: Perplexity
    distance: Divergence | None


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        rows: the original first, if it was given; all on the same tokens.
        text_name: what they read.
        tokens: how many tokens of it were read.
        asked: how many there were.
        cut: why these are fewer, in words; empty: they are not.
    """

    rows: list[Compared]
    text_name: str
    tokens: int
    asked: int
    cut: str = ""


def compare(
    contestants: Iterable[Contestant],
    text: str,
    text_name: str,
    *,
    tokens: int = 1024,
    original: Source | None = None,
    minutes: float | None = None,
    room_bytes: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> Comparison:
    """Run all of them on the same windows of one text.

    Args:
        contestants: at least one.
        text: evaluation text.
        text_name: for messages.
        tokens: tokens of it to use.
        original: the float model; the first row of the result when it is given.
        minutes: time for all of them; as many windows are compared as the slowest model had time for, one at least.
            None: no limit.
        room_bytes: what the weights of the original may take in memory: it is run layer by layer where they take
            more. None: no limit.
        advance: called with the name of each model before it runs.

    Raises:
        InputError: the text is too short, the original cannot be used, or the tokenizers differ.
        PackageError: an artifact fails.
    """
    entries, begin, budget = list(contestants), advance or (lambda _name: None), Budget(minutes)
    budget.expect(len(entries) + (original is not None))
    limits = [entry.context for entry in entries if entry.context is not None]
    context = min([512 if minutes is None else WINDOW, *limits])
    windows: Tensor | None = None
    for entry in entries:
        found = token_windows(text, entry.tokenizer(), tokens=tokens, context=context, source=text_name)
        if windows is not None and not windows.equal(found):
            raise InputError(
                f"{entry.name}: its tokenizer cuts {text_name} into other tokens than that of {entries[0].name}; "
                "only models of one tokenizer can be compared."
            )
        windows = found
    assert windows is not None
    asked, slowest = int(windows.numel()), ""
    runs: list[_Run] = []
    reference: list[Tensor] | None = None
    how = ""

    def run(name: str, execute: Execute) -> list[Tensor]:
        nonlocal windows, slowest
        assert windows is not None
        logits = run_windows(execute, windows, budget.share())
        if len(logits) < len(windows):
            windows, slowest = windows[: len(logits)], name
        losses = [token_losses(one, window) for one, window in zip(logits, windows, strict=True)]
        pairs = [] if reference is None else zip(reference, logits, strict=False)
        runs.append(_Run(losses, [compare_positions(before, after) for before, after in pairs]))
        return logits

    if original is not None:
        begin("the original")
        values = sum(parameter.numel() for parameter in outline(original).parameters())
        room = room_if_needed(values, room_bytes)
        loaded = load_model(original, torch.float32, room_bytes=room)
        how = "float model" if streamed_weights(loaded) is None else "float model, layer by layer"
        reference = run("the original", transformers_model(loaded))
        del loaded
    for entry in entries:
        begin(entry.name)
        run(entry.name, entry.load())
    count = len(windows)
    listed: list[Contestant | None] = [*([] if original is None else [None]), *entries]
    rows = [
        Compared(
            *(("original", how, None, None) if entry is None else _described(entry)),
            perplexity(each.losses[:count]),
            summarize(each.positions[:count]) if each.positions else None,
        )
        for entry, each in zip(listed, runs, strict=True)
    ]
    read = int(windows.numel())
    cut = f"{slowest} had no time for more in {minutes:g} minutes (--minutes)" if slowest and minutes else ""
    return Comparison(rows, text_name, read, asked, cut)


@dataclass(frozen=True)
class _Run:
    """Of each window: losses of its tokens, float64 [positions - 1], and distances from the original, if it ran."""

    losses: list[Tensor]
    positions: list[Positions]


def _described(entry: Contestant) -> tuple[str, str, float | None, int | None]:
    return entry.name, entry.kind, entry.bits_per_weight, entry.size_bytes


def comparison_page(comparison: Comparison) -> str:
    """One self-contained page; files are called by their names, not by their paths."""
    rows = [replace(row, name=without_folders(row.name)) for row in comparison.rows]
    points = [
        charts.Point(row.name, row.size_bytes, row.perplexity.value, row.perplexity.standard_error)
        for row in rows
        if row.size_bytes is not None
    ]
    original = next((row for row in rows if row.size_bytes is None), None)
    return page(
        "compare.html.jinja",
        rows=rows,
        plot=Markup(charts.size_against_quality(points)),
        original=original,
        text_name=without_folders(comparison.text_name),
        comparison=comparison,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _tokenizer_of(folder: Path) -> Any:
    try:
        return open_tokenizer(folder, str(folder))
    except EdkmExportError:
        raise
    except Exception as error:  # what a folder without a tokenizer raises has no common base
        raise InputError(
            f"{folder}: holds no tokenizer that can be read; give the whole folder that was exported."
        ) from error
