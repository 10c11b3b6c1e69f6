"""What a package says about itself in its user-defined metadata, and how it is read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from converters.coreml.export_plan import INTERFACES, ExportPlan, Interface
from converters.coreml.vocabulary import SPLIT_KEY
from edkm_export._version import __version__
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.models.config import SLIDING
from edkm_export.models.registry import decoder_config

__all__ = ["Description", "describe", "model_name"]

_KEY = "com.github.edkm-export."


@dataclass(frozen=True)
class Description:
    """What a package says about itself.

    Attributes:
        interface: how it is called.
        context: positions that it can hold.
        prefill: tokens of one prefill call, 0 without.
        packages: file names of all chunks, in the order in which they run.
    """

    interface: Interface
    context: int
    prefill: int
    packages: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, str], path: Path) -> Description | None:
        """Read it; None for a package that does not have it.

        Raises:
            PackageError: an entry is missing or makes no sense.
        """
        if f"{_KEY}interface" not in metadata:
            return None
        name = metadata[f"{_KEY}interface"]
        interface = next((known for known in INTERFACES if known == name), None)
        if interface is None:
            raise PackageError(
                f"{path}: metadata {_KEY}interface is {name!r}, expected one of {', '.join(INTERFACES)}."
            )
        numbers = [_number(metadata, key, path) for key in ("context", "prefill")]
        try:
            packages = json.loads(metadata.get(f"{_KEY}packages", ""))
        except (ValueError, RecursionError):
            packages = None
        if (
            not isinstance(packages, list)
            or not packages
            or not all(isinstance(file, str) and PurePosixPath(file).name == file for file in packages)
        ):
            raise PackageError(f"{path}: metadata {_KEY}packages is not a list of file names.")
        return cls(interface, numbers[0], numbers[1], tuple(packages))


def _number(metadata: Mapping[str, str], key: str, path: Path) -> int:
    text = metadata.get(_KEY + key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise PackageError(f"{path}: metadata {_KEY}{key} is {text!r}, expected a number.")
    return int(text)


def describe(checkpoint: Checkpoint, plan: ExportPlan, name: str) -> dict[str, str]:
    """User-defined metadata of the packages of a plan.

    Args:
        checkpoint: what is exported.
        plan: from `plan_export`.
        name: file name of the model.
    """
    config = decoder_config(checkpoint.config, str(checkpoint.path or "checkpoint"))
    entries = {
        f"{_KEY}version": __version__,
        f"{_KEY}interface": plan.interface,
        f"{_KEY}context": str(plan.context),
        f"{_KEY}prefill": str(plan.prefill),
        f"{_KEY}packages": json.dumps(plan.package_names(name)),
        # read by swift-transformers: where it finds the tokenizer on the hub unless it is given one
        "co.huggingface.exporters.name": model_name(checkpoint) or name,
        "co.huggingface.exporters.task": "text-generation",
        "co.huggingface.exporters.framework": "pytorch",
        "co.huggingface.exporters.precision": "float16",
    }
    if plan.split is not None:
        entries[SPLIT_KEY] = json.dumps({plan.split.name: plan.split.groups})
    if config.sliding_window is not None and SLIDING in config.layer_kinds:
        entries["co.huggingface.exporters.sliding_window"] = str(config.sliding_window)
    return entries


def model_name(checkpoint: Checkpoint) -> str | None:
    """The hub id of the model that was palettized, None when it was a folder or file."""
    base = checkpoint.provenance.get("base_model")
    reference = base.get("reference") if isinstance(base, dict) else None
    if not isinstance(reference, str) or Path(reference).exists():
        return None
    parts = reference.split("/")
    return reference if len(parts) == 2 and all(parts) and not reference.endswith(".gguf") else None
