"""Families by formats and interfaces: one list that the tests run and that the table of docs/families.md is made from.

Each cell is run by `tests/decoder/test_family_cells.py`, by default or as a slow test, or the export is refused with a
message that the same test looks for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.embedding.embedding_model import ENCODERS
from edkm_export.decoder.families import FAMILIES
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.sentence_model import SentenceModel
from tests.helpers.embedding_models import CASES as EMBEDDING_CASES
from tests.helpers.embedding_models import base_model
from tests.helpers.odd_families import build_case, checkpoint_of, plain

__all__ = [
    "CELLS",
    "COLUMNS",
    "KINDS",
    "Cell",
    "Column",
    "Refusal",
    "embedding_checkpoint",
    "text_checkpoint",
]

CONTEXT = 32
"""Positions of what is exported, where an interface leaves the choice."""


@dataclass(frozen=True)
class Column:
    """A format with an interface or a profile of it.

    Attributes:
        format: "Core ML", "ONNX", "Core AI".
        name: of the interface or profile.
        options: of the planning function.
        embeds: it takes embedding models, not language models.
    """

    format: str
    name: str
    options: dict[str, Any]
    embeds: bool = False

    def __str__(self) -> str:
        return f"{self.format} {self.name}"

    @property
    def extra(self) -> str:
        """The library that this format is made with."""
        return {"Core ML": "coremltools", "ONNX": "onnxruntime", "Core AI": "coreai"}[self.format]

    def plan(self, checkpoint: Checkpoint) -> Any:
        """What the exporter makes of it.

        Raises:
            ConversionError: it is refused.
        """
        module, function = {
            "Core ML": ("converters.coreml.write.export_plan", "plan_export"),
            "ONNX": ("converters.onnx.write.export_plan", "plan_onnx"),
            "Core AI": ("converters.coreai.write.export_plan", "plan_coreai"),
        }[self.format]
        return getattr(importlib.import_module(module), function)(checkpoint, **self.options)

    def write(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Export into an empty folder; path of what was made."""
        plan = self.plan(checkpoint)
        if self.format == "ONNX":
            from converters.onnx.write.bundle import write_bundle

            write_bundle(checkpoint, plan, folder)
            return folder
        if self.format == "Core ML":
            from converters.coreml.write.packages import export_packages

            return export_packages(checkpoint, plan, folder, "model")[0]
        from converters.coreai.write.asset_file import write_asset

        write_asset(checkpoint, plan, folder / "model.aimodel")
        return folder / "model.aimodel"


_FIXED = {"sequence_length": CONTEXT}
COLUMNS = (
    Column("Core ML", "logits", {"interface": "logits", **_FIXED}),
    Column("Core ML", "swift-transformers", {"interface": "swift-transformers", **_FIXED}),
    Column("Core ML", "neural-engine", {"interface": "neural-engine", "prefill": 8, **_FIXED}),
    Column("ONNX", "exact", {"interface": "decoder", "runtime": "exact", "opset": 23}),
    Column("ONNX", "low-memory", {"interface": "decoder", "runtime": "low-memory"}),
    Column("ONNX", "fast", {"interface": "decoder", "runtime": "fast"}),
    Column("Core AI", "dynamic", {}),
    Column("Core AI", "neural-engine", {"interface": "neural-engine"}),
    Column("Core ML", "embedding", {"interface": "embedding", "sequence_length": 24}, embeds=True),
    Column("ONNX", "embedding", {"interface": "embedding"}, embeds=True),
)
"""In the order of the table."""

KINDS = (*FAMILIES, *(kind for kind in ENCODERS if kind not in FAMILIES))
"""Model types: the families of language models, and those that are embedding models alone."""


@dataclass(frozen=True)
class Refusal:
    """Why an export is refused.

    Attributes:
        message: part of what it says.
        reason: for the table.
        kinds: the families.
        refuses: of which columns.
    """

    message: str
    reason: str
    kinds: tuple[str, ...]
    refuses: Callable[[Column], bool]


REFUSALS = (
    Refusal(
        "--interface neural-engine feeds some tokens again, which the state of a convolution or a recurrence cannot "
        "take back",
        "the engine feeds some tokens again, which the state of a convolution or a recurrence cannot take back",
        ("lfm2", "qwen3_5_text"),
        lambda column: str(column) == "Core AI neural-engine",
    ),
    Refusal(
        "--interface neural-engine hands over embedded tokens, and the per-layer embedding of this model is looked "
        "up by their numbers",
        "the engine hands over embedded tokens, and a per-layer embedding is looked up by their numbers",
        ("gemma3n_text", "gemma4_text"),
        lambda column: str(column) == "Core AI neural-engine",
    ),
    Refusal(
        "embedding models are made of attention alone",
        "states that do not grow would take in the padding of a batch",
        ("lfm2", "qwen3_5_text"),
        lambda column: column.embeds,
    ),
    Refusal(
        "model type 'gpt2' cannot be exported yet",
        "not supported as an embedding model",
        ("gpt2",),
        lambda column: column.embeds,
    ),
    Refusal(
        "holds an embedding model",
        "an embedding model gives no logits",
        tuple(kind for kind in ENCODERS if kind not in FAMILIES),
        lambda column: not column.embeds,
    ),
)
"""In the order of their numbers under the table."""

_QUICK = {
    "Core ML swift-transformers": ("mistral",),
    "ONNX exact": tuple(FAMILIES),
    "ONNX low-memory": tuple(FAMILIES),
    "ONNX fast": tuple(FAMILIES),
    "Core AI dynamic": ("qwen3",),
    "ONNX embedding": ("bert",),
}


@dataclass(frozen=True)
class Cell:
    """A family in a column."""

    kind: str
    column: Column

    def __str__(self) -> str:
        return f"{self.kind}: {self.column}"

    @property
    def refusal(self) -> Refusal | None:
        """Why it is refused; None: it is run."""
        return next(
            (each for each in REFUSALS if self.kind in each.kinds and each.refuses(self.column)),
            None,
        )

    @property
    def quick(self) -> bool:
        """It is run by default."""
        return self.kind in _QUICK.get(str(self.column), ())

    def checkpoint(self) -> Checkpoint:
        """What is exported."""
        embeds = self.column.embeds or self.kind not in FAMILIES
        return embedding_checkpoint(self.kind) if embeds else text_checkpoint(self.kind)


CELLS = tuple(Cell(kind, column) for kind in KINDS for column in COLUMNS)


def _arguments(kind: str) -> dict[str, Any]:
    """Of a plain configuration with 256 positions, which Core AI's static engine needs."""
    if kind not in FAMILIES:
        case = {"bert": "minilm"}.get(kind, kind)
        return EMBEDDING_CASES[case].settings
    given = plain(kind)
    sizes = dict.fromkeys({"max_position_embeddings", "n_positions"} & given.keys(), 256)
    return given | sizes


@functools.cache
def text_checkpoint(kind: str) -> Checkpoint:
    """A random language model at 3 bits, its LUTs on an int8 grid, which every profile takes."""
    model = build_case(kind, _arguments(kind))
    config = model.config.to_dict()
    parts = palettize_model(model, uniform_recipe(3, 16, "int8"))
    assert parts.palettized.keys() <= checkpoint_of(model).dense.keys()
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


@functools.cache
def embedding_checkpoint(kind: str) -> Checkpoint:
    """The stack of a random model with mean pooling, at 4 bits."""
    import transformers

    settings = EmbeddingSettings(pooling="mean", max_tokens=24)
    config = transformers.AutoConfig.for_model(kind, **_arguments(kind))
    model = SentenceModel(config, settings)
    if kind in FAMILIES:
        body = build_case(kind, _arguments(kind)).base_model
    else:
        body = base_model(EMBEDDING_CASES[{"bert": "minilm"}.get(kind, kind)])
    missing, _unused = model.model.load_state_dict(body.state_dict(), strict=False)
    assert not missing
    told = config.to_dict()
    parts = palettize_model(model, uniform_recipe(4, 16, fit_groups=True))
    return Checkpoint(
        config=told, palettized=parts.palettized, dense=parts.dense, tied=parts.tied, embedding=settings
    )


def some_text(checkpoint: Checkpoint, length: int = 24, seed: int = 3) -> Tensor:
    """Random tokens, int64 [length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, checkpoint.config["vocab_size"], (length,), generator=generator)
