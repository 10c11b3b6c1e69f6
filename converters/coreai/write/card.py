"""What a model card says of a Core AI model: its engine, and what loads it."""

from __future__ import annotations

from converters.coreai.write.export_plan import CoreAIPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.device_lint import Finding, card_sections
from edkm_export.escaping import for_code_span
from edkm_export.model_card import FormatCard

__all__ = ["coreai_card"]

_ENGINES = {
    "dynamic": "one function for texts of any length, for the dynamic engine (GPU)",
    "neural-engine": "functions of fixed shapes, for the static engine (Neural Engine)",
}


def coreai_card(checkpoint: Checkpoint, plan: CoreAIPlan, name: str, findings: list[Finding]) -> FormatCard:
    """What the format adds.

    Args:
        checkpoint: what was exported.
        plan: of the export.
        name: of the model.
        findings: of the device lint.
    """
    sections = {
        "Use": f"{for_code_span(f'{name}.aimodel')}, `metadata.json` and `tokenizer/` are a bundle as the language "
        "model runner of apple/coreai-models reads it; open this folder with it on macOS 27 or iOS 27. It was not run "
        "on a device."
    }
    sections |= card_sections(findings)
    return FormatCard(
        library="coreai",
        tags=["coreai"],
        summary="A Core AI model for iOS 27, macOS 27 and later",
        facts={
            "interface": f"`{plan.interface}`: {_ENGINES[plan.interface]}",
            "positions": f"{plan.context:,}",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections=sections,
    )
