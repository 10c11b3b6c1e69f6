"""The folder that `edkm-export coreai` leaves: what `LanguageBundle` of apple/coreai-models reads.

`metadata.json` has the schema 0.2 of `swift/Sources/CoreAIShared/Bundle/ModelBundle.swift` and
`swift/Sources/CoreAILanguageModels/Bundle/LanguageConfig.swift`, commit 86b363d; keys of our own are ignored there.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from converters.coreai.format import ASSET_SUFFIX, BUNDLE_VERSION, MAIN, TOKENIZER_FOLDER
from converters.coreai.write.asset_file import write_asset
from converters.coreai.write.export_plan import CoreAIPlan
from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, MARKER
from edkm_export.checkpoint import Checkpoint
from edkm_export.checkpoint_record import KEY, CheckpointRecord
from edkm_export.end_tokens import as_setting, read_object, stored_end_tokens, with_end_tokens
from edkm_export.model_card import base_models

__all__ = ["bundle_metadata", "write_bundle"]


def write_bundle(checkpoint: Checkpoint, plan: CoreAIPlan, folder: Path, name: str) -> Path:
    """Export into an existing, empty folder.

    Args:
        checkpoint: what to export.
        plan: from `plan_coreai`.
        folder: receives the .aimodel, tokenizer/ and metadata.json.
        name: of the model.

    Returns:
        Path of the .aimodel.

    Raises:
        ConversionError: see `write_asset`.
    """
    asset = folder / f"{name}{ASSET_SUFFIX}"
    write_asset(checkpoint, plan, asset)
    tokenizer = folder / TOKENIZER_FOLDER
    tokenizer.mkdir()
    for file, content in checkpoint.tokenizer.items():
        (tokenizer / file).write_bytes(content)
    documents = {"config.json": with_end_tokens(checkpoint.config, checkpoint.tokenizer)}
    if ends := stored_end_tokens(checkpoint.config, checkpoint.tokenizer):
        own = read_object(checkpoint.tokenizer.get("generation_config.json")) or {"_from_model_config": True}
        documents["generation_config.json"] = {**own, "eos_token_id": as_setting(ends)}
    for file, document in documents.items():
        (tokenizer / file).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    metadata = bundle_metadata(checkpoint, plan, name)
    (folder / MARKER).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return asset


def bundle_metadata(checkpoint: Checkpoint, plan: CoreAIPlan, name: str) -> dict[str, Any]:
    """Contents of metadata.json."""
    reference = next(iter(base_models(checkpoint)), name)
    language: dict[str, Any] = {
        "tokenizer": reference,
        "vocab_size": plan.config.vocab_size,
        "max_context_length": plan.context,
        "embedded_tokenizer": True,
    }
    if plan.interface == "dynamic":  # the static engine finds its functions by their names
        language["function_map"] = {MAIN: [MAIN]}
    known = {
        "metadata_version": BUNDLE_VERSION,
        "kind": "llm",
        "name": name,
        "assets": {MAIN: f"{name}{ASSET_SUFFIX}"},
        "language": language,
        "source": {"model_definition": "torch", "hf_model_id": reference},
        "compression": f"palettized, {checkpoint.bits_per_weight:.2f} bits a weight",
        "compilation": {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "targets": [],
        },
        "generator": f"{GENERATOR} {__version__}",
        "interface": plan.interface,
        "kv_cache": plan.kv_cache,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
        "predicted_weights_size_bytes": plan.weights_size_bytes,
        "recipe": checkpoint.recipe,
    }
    if checkpoint.path is not None:
        known[KEY] = CheckpointRecord.of(checkpoint.path).as_dict()
    return known
