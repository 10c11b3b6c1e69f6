"""The user-defined metadata of a package; read again by `read.description`."""

from __future__ import annotations

import json

from converters.coreml.format import EMBEDDING_KEY, METADATA_PREFIX, SPLIT_KEY
from converters.coreml.write.export_plan import ExportPlan
from edkm_export._version import __version__
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.config import SLIDING
from edkm_export.model_card import base_models

__all__ = ["describe"]


def describe(checkpoint: Checkpoint, plan: ExportPlan, name: str) -> dict[str, str]:
    """User-defined metadata of the packages of a plan.

    Args:
        checkpoint: what is exported.
        plan: from `plan_export`.
        name: file name of the model.
    """
    embeds = checkpoint.embedding is not None
    entries = {
        f"{METADATA_PREFIX}version": __version__,
        f"{METADATA_PREFIX}interface": plan.interface,
        f"{METADATA_PREFIX}context": str(plan.context),
        f"{METADATA_PREFIX}prefill": str(plan.prefill),
        f"{METADATA_PREFIX}packages": json.dumps(plan.package_names(name)),
        # read by swift-transformers: where it finds the tokenizer on the hub unless it is given one
        "co.huggingface.exporters.name": next(iter(base_models(checkpoint)), name),
        "co.huggingface.exporters.task": "feature-extraction" if embeds else "text-generation",
        "co.huggingface.exporters.framework": "pytorch",
        "co.huggingface.exporters.precision": "float16",
    }
    if plan.split is not None:
        entries[SPLIT_KEY] = json.dumps({plan.split.name: plan.split.groups})
    if checkpoint.embedding is not None:
        entries[EMBEDDING_KEY] = checkpoint.embedding.model_dump_json()
        return entries
    config = decoder_config(checkpoint.config, str(checkpoint.path or "checkpoint"))
    if config.sliding_window is not None and SLIDING in config.layer_kinds:
        entries["co.huggingface.exporters.sliding_window"] = str(config.sliding_window)
    return entries
