"""A palettized checkpoint becomes Core ML packages, as its plan says."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.coreml.backend import load_coremltools
from converters.coreml.format import DECODE, EMBEDDING, HIDDEN_OUT, LOGITS, PREFILL, TEXT, TEXT_MASK
from converters.coreml.write import neural_engine, stateful
from converters.coreml.write.conversion import convert, save_package
from converters.coreml.write.export_plan import ExportPlan, chunk_decoder
from converters.coreml.write.metadata import describe
from converters.coreml.write.multifunction import merge_functions
from converters.coreml.write.neural_engine import Chunk, LayerRange
from converters.coreml.write.standins import decoder_of_stand_ins, embedding_model_of_stand_ins
from converters.coreml.write.vocabulary import split_palettes
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.embedding.fixed_length import FixedLength
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.memory import return_freed_memory
from edkm_export.palette import PalettizedTensor

__all__ = ["export_packages"]


def export_packages(checkpoint: Checkpoint, plan: ExportPlan, folder: str | Path, name: str) -> list[Path]:
    """Write the packages of a plan.

    Args:
        checkpoint: what to export.
        plan: from `plan_export`.
        folder: which gets them.
        name: of the model.

    Returns:
        The packages, in the order in which they run.

    Raises:
        ConversionError, CheckpointError, BackendMissingError: see `convert` and `build_decoder`.
    """
    folder = Path(folder)
    paths = [folder / file for file in plan.package_names(name)]
    metadata = describe(checkpoint, plan, name)
    if plan.interface == "embedding":
        _export_embedding(checkpoint, plan, metadata, paths[0])
    elif plan.interface == "logits":
        _export_logits(checkpoint, plan, metadata, paths[0])
    elif plan.interface == "swift-transformers":
        _export_stateful(checkpoint, plan, metadata, paths[0])
    else:
        for layers, path in zip(plan.chunks, paths, strict=True):
            _export_chunk(checkpoint, plan, layers, metadata, path)
    return paths


def _export_logits(checkpoint: Checkpoint, plan: ExportPlan, metadata: dict[str, str], path: Path) -> None:
    """One function, `input_ids` int32 [1, context] -> `logits` float16 [1, context, vocab_size]."""
    ct = load_coremltools()
    decoder = decoder_of_stand_ins(checkpoint)
    module = WholeSequence(decoder, checkpoint.config, plan.context).eval()
    model = convert(
        module,
        (torch.zeros(1, plan.context, dtype=torch.int32),),
        checkpoint.palettized,
        inputs=[ct.TensorType(TEXT, (1, plan.context), dtype=np.int32)],
        outputs=[ct.TensorType(LOGITS, dtype=np.float16)],
        target=plan.target,
        **_options(checkpoint, metadata),
    )
    save_package(model, path)


def _export_embedding(checkpoint: Checkpoint, plan: ExportPlan, metadata: dict[str, str], path: Path) -> None:
    """One function: `input_ids` and `attention_mask` int32 [1, context] -> `sentence_embedding` [1, channels]."""
    ct = load_coremltools()
    module = FixedLength(embedding_model_of_stand_ins(checkpoint), checkpoint.config, plan.context).eval()
    text = torch.zeros(1, plan.context, dtype=torch.int32)
    model = convert(
        module,
        (text, torch.ones_like(text)),
        checkpoint.palettized,
        inputs=[ct.TensorType(name, (1, plan.context), dtype=np.int32) for name in (TEXT, TEXT_MASK)],
        outputs=[ct.TensorType(EMBEDDING, dtype=np.float16)],
        target=plan.target,
        **_options(checkpoint, metadata),
    )
    save_package(model, path)


def _export_stateful(checkpoint: Checkpoint, plan: ExportPlan, metadata: dict[str, str], path: Path) -> None:
    """One function of flexible shapes, see `stateful`."""
    ct = load_coremltools()
    module = stateful.Stateful(decoder_of_stand_ins(checkpoint), checkpoint.config, plan.context).eval()
    model = convert(
        module,
        stateful.example_inputs(),
        checkpoint.palettized,
        inputs=stateful.input_types(plan.context),
        outputs=[ct.TensorType(LOGITS, dtype=np.float16)],
        states=module.layout.types(),
        target=plan.target,
        **_options(checkpoint, metadata),
    )
    save_package(model, path)


def _export_chunk(
    checkpoint: Checkpoint, plan: ExportPlan, layers: LayerRange, metadata: dict[str, str], path: Path
) -> None:
    """Two functions of static shapes with shared weights, see `neural_engine`."""
    decoder = chunk_decoder(checkpoint, layers, plan.split)
    held = {name for name, _ in decoder.named_parameters()}
    palettes = split_palettes(checkpoint.palettized, plan.split)
    palettes = {name: palette for name, palette in palettes.items() if name in held}
    held_layers = slice(layers.first, layers.end)
    tables = PositionTables(decoder.config, checkpoint.config, plan.context, held_layers)
    lengths = {PREFILL: plan.prefill, DECODE: 1}
    with tempfile.TemporaryDirectory(prefix=".functions.", dir=path.parent) as work:
        packages = {function: Path(work) / f"{function}.mlpackage" for function in lengths}
        for function, new in lengths.items():
            chunk = Chunk(decoder, tables, layers, new).eval()
            _export_function(chunk, checkpoint, plan, palettes, metadata, packages[function])
            _free()
        merge_functions(packages, DECODE, path)
    _free()


def _export_function(
    chunk: Chunk,
    checkpoint: Checkpoint,
    plan: ExportPlan,
    palettes: dict[str, PalettizedTensor],
    metadata: dict[str, str],
    path: Path,
) -> None:
    """One function of a chunk, as a package of its own."""
    ct = load_coremltools()
    model = convert(
        chunk,
        neural_engine.example_inputs(chunk),
        palettes,
        inputs=neural_engine.input_types(chunk),
        outputs=[ct.TensorType(LOGITS if chunk.layers.gives_logits else HIDDEN_OUT, dtype=np.float16)],
        states=chunk.layout.types(),
        target=plan.target,
        **_options(checkpoint, metadata),
    )
    save_package(model, path)


def _free() -> None:
    """Give back what a converted program held, before the next one is made: its parts refer to each other."""
    gc.collect()
    return_freed_memory()


def _options(checkpoint: Checkpoint, metadata: dict[str, str]) -> dict[str, Any]:
    return {
        "metadata": metadata,
        "prefix": "decoder.",
        "stand_ins": True,
        "source": str(checkpoint.path or "checkpoint"),
    }
