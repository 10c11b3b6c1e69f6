"""What a model card says of a Core AI model: its engine, and what loads it."""

from __future__ import annotations

from converters.coreai.format import KEY_CACHE, KEY_SCALES, VALUE_CACHE, VALUE_SCALES
from converters.coreai.write.export_plan import CoreAIPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.device_lint import Finding, card_sections
from edkm_export.escaping import for_code_span
from edkm_export.kv_cache import INT8
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
    asset = for_code_span(f"{name}.aimodel")
    use = (
        f"{asset}, `metadata.json` and `tokenizer/` are a bundle as the language model runner of apple/coreai-models "
        "reads it; open this folder with it on macOS 27 or iOS 27. It was not run on a device."
    )
    if plan.kv_cache == INT8:
        use = (
            f"{asset} is for programs that call Core AI themselves: its keys and values are int8 (`{KEY_CACHE}`, "
            f"`{VALUE_CACHE}`), with float16 states of their scales (`{KEY_SCALES}`, `{VALUE_SCALES}`), which the "
            "engines of apple/coreai-models do not take. All begin as zeros and grow along their fourth axis. It was "
            "not run on a device."
        )
    sections = {"Use": use}
    sections |= card_sections(findings)
    return FormatCard(
        library="coreai",
        tags=["coreai"],
        summary="A Core AI model for iOS 27, macOS 27 and later",
        facts={
            "interface": f"`{plan.interface}`: {_ENGINES[plan.interface]}",
            "positions": f"{plan.context:,}",
            "keys and values": "int8, a float16 scale for each head and token"
            if plan.kv_cache == INT8
            else "float16",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections=sections,
    )
