"""The folder that `edkm-export onnx` leaves: graph, weights, tokenizer and what other runtimes want to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.onnx.format import MODEL_FILE
from converters.onnx.write.export_plan import OnnxPlan
from converters.onnx.write.genai import GENERATION_CONFIG, genai_config, genai_runs, generation_config
from converters.onnx.write.graph_file import write_graph
from edkm_export._version import __version__
from edkm_export.atomic import GENERATOR, MARKER
from edkm_export.checkpoint import Checkpoint
from edkm_export.checkpoint_record import KEY, CheckpointRecord
from edkm_export.decoder.families import FAMILIES
from edkm_export.end_tokens import with_end_tokens
from edkm_export.errors import ConversionError
from edkm_export.model_card import FILE
from edkm_export.sentence_documents import sentence_documents

__all__ = ["write_bundle"]

_GRAPH_FOLDER = "onnx"  # where transformers.js looks
_OURS = ("config.json", "genai_config.json", MARKER, "report.json", "report.md", "report.html", FILE)


def write_bundle(checkpoint: Checkpoint, plan: OnnxPlan, folder: str | Path) -> Path:
    """Export into an existing, empty folder.

    Args:
        checkpoint: what to export.
        plan: from `plan_onnx`.
        folder: receives onnx/model.onnx with its data, the tokenizer, configurations and metadata.json.

    Returns:
        Path of the model.

    Raises:
        ConversionError: a tokenizer file has the name of one of ours.
    """
    folder = Path(folder)
    if taken := sorted({*_OURS, _GRAPH_FOLDER} & checkpoint.tokenizer.keys()):
        raise ConversionError(
            f"{checkpoint.path}: its tokenizer file {taken[0]} would take the place of one of ours; palettize again."
        )
    embeds = checkpoint.embedding is not None
    graph_folder = folder / _GRAPH_FOLDER
    graph_folder.mkdir()
    model = write_graph(plan, graph_folder)
    for file, content in checkpoint.tokenizer.items():
        (folder / file).write_bytes(content)
    config = (
        checkpoint.config if embeds else with_end_tokens(_published(checkpoint.config), checkpoint.tokenizer)
    )
    documents: dict[str, Any] = {
        "config.json": {**config, **_transformers_js(plan)},
        MARKER: _metadata(checkpoint, plan),
    }
    if checkpoint.embedding is not None:
        documents |= sentence_documents(checkpoint.embedding, plan.config.hidden_size)
    else:
        documents[GENERATION_CONFIG] = generation_config(checkpoint)
    if genai_runs(plan):
        documents["genai_config.json"] = genai_config(checkpoint, plan, f"{_GRAPH_FOLDER}/{MODEL_FILE}")
    for name, document in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return model


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration in the words of published ones."""
    family = FAMILIES.get(config["model_type"])
    words = {} if family is None else family.published_layer_types
    if not words:
        return config
    return {**config, "layer_types": [words.get(kind, kind) for kind in config["layer_types"]]}


def _transformers_js(plan: OnnxPlan) -> dict[str, Any]:
    """Settings of transformers.js, which otherwise looks for a quantized graph in a browser."""
    settings: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": True}  # "fp32" names model.onnx
    if plan.dtype == "float16" and plan.interface == "decoder":
        settings["kv_cache_dtype"] = "float16"
    return {"transformers.js_config": settings}


def _metadata(checkpoint: Checkpoint, plan: OnnxPlan) -> dict[str, Any]:
    known: dict[str, Any] = {
        "generator": f"{GENERATOR} {__version__}",
        "model": f"{_GRAPH_FOLDER}/{MODEL_FILE}",
        "runtime": plan.runtime,
        "dtype": plan.dtype,
        "opset": plan.opset,
        "context_length": plan.context,
        "kv_cache": plan.kv_cache,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
        "predicted_weights_size_bytes": plan.weights_size_bytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "recipe": checkpoint.recipe,
    }
    if checkpoint.embedding is not None:
        known |= {"interface": plan.interface, "embedding": checkpoint.embedding.model_dump(mode="json")}
    if checkpoint.path is not None:
        known[KEY] = CheckpointRecord.of(checkpoint.path).as_dict()
    return known
