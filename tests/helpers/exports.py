"""Hugging Face folders, palettized and exported by the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.palettization import palettize_model
from edkm_export.recipe import Recipe
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.reference.tokenizer_files import tokenizer_files

__all__ = ["SEQUENCE_LENGTH", "Exported", "exported", "palettized_folder"]

SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class Exported:
    """A checkpoint on disk and the folder that was made of it.

    Attributes:
        checkpoint: read back from `model`.
        model: the model.pt.
        bundle: the folder, as `edkm-export coreml --no-verify` leaves it.
        package: the .mlpackage in it.
        weights_size_bytes: predicted.
    """

    checkpoint: Checkpoint
    model: Path
    bundle: Path
    package: Path
    weights_size_bytes: int


def palettized_folder(folder: Path, recipe: Recipe, path: Path) -> Checkpoint:
    """What `edkm-export palettize` writes, without calibration."""
    source = Source.parse(str(folder))
    model, tokenizer = load_model(source), load_tokenizer(source)
    files, config = tokenizer_files(tokenizer, model), model.config.to_dict()
    parts = palettize_model(model, recipe, source=str(folder))
    made = Checkpoint(
        config=config,
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        tokenizer=files,
        recipe=recipe.model_dump(mode="json"),
        provenance={"base_model": source.provenance()},
    )
    checkpoint.save(made, path)
    return checkpoint.load(path)


def exported(folder: Path, recipe: Recipe, work: Path) -> Exported:
    """Palettize a Hugging Face folder and export it."""
    from converters.coreml.write.bundle import write_bundle
    from converters.coreml.write.export_plan import plan_export

    made = palettized_folder(folder, recipe, work / "model.pt")
    plan = plan_export(made, interface="logits", sequence_length=SEQUENCE_LENGTH)
    (work / "model-coreml").mkdir()
    package = write_bundle(made, plan, work / "model-coreml", "model")
    return Exported(made, work / "model.pt", work / "model-coreml", package, plan.weights_size_bytes)
