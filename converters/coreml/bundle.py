"""The folder that `edkm-export coreml` leaves: package, tokenizer and metadata."""

from __future__ import annotations

import json
from pathlib import Path

from converters.coreml.language_model import LogitsPlan, export_logits
from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, MARKER
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError, PackageError

__all__ = ["find_package", "write_bundle"]


def write_bundle(checkpoint: Checkpoint, plan: LogitsPlan, folder: Path, name: str) -> Path:
    """Export into an existing, empty folder.

    Args:
        checkpoint: what to export.
        plan: from `plan_logits`.
        folder: receives `<name>.mlpackage`, the tokenizer files, config.json and metadata.json.
        name: of the package.

    Returns:
        Path of the package.

    Raises:
        ConversionError: a tokenizer file has the name of one of ours, or see `export_logits`.
    """
    package = folder / f"{name}.mlpackage"
    ours = {package.name, "config.json", MARKER, "report.json", "report.md"}
    if taken := sorted(ours & checkpoint.tokenizer.keys()):
        raise ConversionError(
            f"{checkpoint.path}: its tokenizer file {taken[0]} would take the place of one of ours; palettize again."
        )
    export_logits(checkpoint, plan, package)
    for file, content in checkpoint.tokenizer.items():
        (folder / file).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n")
    metadata = {
        "generator": f"{GENERATOR} {__version__}",
        "package": package.name,
        "interface": "logits",
        "target": plan.target,
        "sequence_length": plan.sequence_length,
        "predicted_weights_size_bytes": plan.weights_size_bytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "recipe": checkpoint.recipe,
    }
    (folder / MARKER).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
    return package


def find_package(path: Path) -> Path:
    """The .mlpackage that a user means: the package itself, or the one inside a bundle.

    Raises:
        PackageError: there is none, or more than one.
    """
    if not path.exists():
        raise PackageError(f"{path}: no such package.")
    if path.suffix == ".mlpackage" or (path / "Manifest.json").is_file():
        return path
    found = sorted(path.glob("*.mlpackage")) if path.is_dir() else []
    if len(found) != 1:
        raise PackageError(f"{path}: expected an .mlpackage, or a folder with one in it; found {len(found)}.")
    return found[0]
