"""The folder that `edkm-export coreml` leaves: packages, tokenizer and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.coreml.format import DECODE, EMBEDDING, HIDDEN_IN, HIDDEN_OUT, LOGITS, PREFILL, TEXT, TOKENS
from converters.coreml.write.export_plan import ExportPlan
from converters.coreml.write.packages import export_packages
from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, MARKER
from edkm_export.checkpoint import Checkpoint
from edkm_export.checkpoint_record import KEY, CheckpointRecord
from edkm_export.end_tokens import as_setting, read_object, stored_end_tokens, with_end_tokens
from edkm_export.errors import ConversionError
from edkm_export.model_card import FILE
from edkm_export.sentence_documents import sentence_documents

__all__ = ["write_bundle"]

_OURS = ("config.json", MARKER, "report.json", "report.md", "report.html", FILE)


def write_bundle(checkpoint: Checkpoint, plan: ExportPlan, folder: str | Path, name: str) -> Path:
    """Export into an existing, empty folder.

    Args:
        checkpoint: what to export.
        plan: from `plan_export`.
        folder: receives the packages, the tokenizer files, config.json and metadata.json.
        name: of the model.

    Returns:
        Path of the first package.

    Raises:
        ConversionError: a tokenizer file has the name of one of ours, or see `export_packages`.
    """
    folder = Path(folder)
    ours = {*plan.package_names(name), *_OURS}
    if taken := sorted(ours & checkpoint.tokenizer.keys()):
        raise ConversionError(
            f"{checkpoint.path}: its tokenizer file {taken[0]} would take the place of one of ours; palettize again."
        )
    packages = export_packages(checkpoint, plan, folder, name)
    for file, content in checkpoint.tokenizer.items():
        (folder / file).write_bytes(content)
    _write_settings(checkpoint, folder)
    (folder / MARKER).write_text(json.dumps(_metadata(checkpoint, plan, name), indent=2) + "\n")
    return packages[0]


def _write_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and generation_config.json, which name the same end tokens; of embeddings those of their own."""
    if checkpoint.embedding is not None:
        documents = {"config.json": checkpoint.config}
        documents |= sentence_documents(checkpoint.embedding, int(checkpoint.config["hidden_size"]))
        for name, document in documents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(document, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        return
    config = with_end_tokens(checkpoint.config, checkpoint.tokenizer)
    documents = {"config.json": config}
    ends = stored_end_tokens(checkpoint.config, checkpoint.tokenizer)
    path = folder / "generation_config.json"
    if ends:
        own = read_object(checkpoint.tokenizer.get(path.name)) or {"_from_model_config": True}
        documents[path.name] = {**own, "eos_token_id": as_setting(ends)}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _metadata(checkpoint: Checkpoint, plan: ExportPlan, name: str) -> dict[str, Any]:
    """What it takes to run the packages: files, interface, sizes."""
    sizes = zip(plan.package_names(name), plan.chunks, plan.package_sizes_bytes, strict=True)
    known: dict[str, Any] = {
        "generator": f"{GENERATOR} {__version__}",
        "package": plan.package_names(name)[0],
        "interface": plan.interface,
        "target": plan.target,
        "sequence_length": plan.context,
        "packages": [
            {
                "file": file,
                "layers": [layers.first, layers.end],
                "input": TOKENS if layers.embeds else HIDDEN_IN,
                "output": LOGITS if layers.gives_logits else HIDDEN_OUT,
                "predicted_weights_size_bytes": size,
            }
            for file, layers, size in sizes
        ],
        "predicted_weights_size_bytes": plan.weights_size_bytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "recipe": checkpoint.recipe,
    }
    if checkpoint.path is not None:
        known[KEY] = CheckpointRecord.of(checkpoint.path).as_dict()
    if checkpoint.embedding is not None:
        known["packages"][0] |= {"input": TEXT, "output": EMBEDDING}
        known["embedding"] = checkpoint.embedding.model_dump(mode="json")
    if plan.interface == "logits":
        known["packages"][0]["input"] = TEXT
    if plan.interface == "neural-engine":
        known["functions"] = {PREFILL: plan.prefill, DECODE: 1}
    return known
