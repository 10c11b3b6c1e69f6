"""What a model card says of an ONNX folder: its profile, and what loads it."""

from __future__ import annotations

from converters.onnx.write.export_plan import OnnxPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.model_card import FormatCard, code

__all__ = ["onnx_card"]

_PROFILES = {
    "exact": "Lookup tables are decoded when the graph is loaded; products are computed in float32.",
    "low-memory": "Weights are decoded while the graph runs, a few at a time: little memory, and slow.",
    "fast": "Products take int8 or int4 weights and round activations to int8: logits may differ from those of the "
    "other profiles.",
}


def onnx_card(checkpoint: Checkpoint, plan: OnnxPlan) -> FormatCard:
    """What the format adds.

    Args:
        checkpoint: what was exported.
        plan: of the export.
    """
    return FormatCard(
        library="onnx",
        tags=["onnx", "onnxruntime", "onnxruntime-genai", "transformers.js"],
        summary=f"An ONNX decoder with cache (opset {plan.opset})",
        facts={
            "runtime profile": f"`{plan.runtime}`. {_PROFILES[plan.runtime]}",
            "activations and cache": plan.dtype,
            "positions": f"{plan.context:,}",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections={"Use": _use(plan)},
    )


def _use(plan: OnnxPlan) -> str:
    return "\n\n".join(
        (
            "The graph is `onnx/model.onnx`, its weights `onnx/model.onnx_data`: keep both. Inputs and outputs are "
            "named as optimum names them (`input_ids`, `attention_mask`, `position_ids`, "
            f"`past_key_values.N.key`, `logits`, `present.N.key`); cache and logits are {plan.dtype}. In this folder, "
            "with onnxruntime-genai:",
            code("python", _GENAI.strip().splitlines()),
            "With transformers.js, REPO being where this folder lies on a hub:",
            code("js", _TRANSFORMERS_JS.strip().splitlines()),
        )
    )


_GENAI = """
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=100)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""

_TRANSFORMERS_JS = """
import { pipeline } from "@huggingface/transformers";

const generator = await pipeline("text-generation", "REPO");
console.log(await generator("Once upon a time", { max_new_tokens: 100 }));
"""
