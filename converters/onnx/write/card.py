"""What a model card says of an ONNX folder: its profile, and what loads it."""

from __future__ import annotations

from converters.onnx.write.export_plan import OnnxPlan
from converters.onnx.write.genai import genai_runs
from edkm_export.checkpoint import Checkpoint
from edkm_export.embedding_card import MARKED_PROMPTS, prompts_section
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.kv_cache import FLOAT
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
    if checkpoint.embedding is not None:
        return _embedding_card(checkpoint, checkpoint.embedding, plan)
    return FormatCard(
        library="onnx",
        tags=[
            "onnx",
            "onnxruntime",
            *["onnxruntime-genai"] * genai_runs(plan),
            *["transformers.js"] * (plan.kv_cache == FLOAT),
        ],
        summary=f"An ONNX decoder with cache (opset {plan.opset})",
        facts={
            "runtime profile": f"`{plan.runtime}`. {_PROFILES[plan.runtime]}",
            "activations and cache": _cache_words(plan),
            "positions": f"{plan.context:,}",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections={"Use": _use(plan)},
    )


def _embedding_card(checkpoint: Checkpoint, settings: EmbeddingSettings, plan: OnnxPlan) -> FormatCard:
    return FormatCard(
        library="onnx",
        tags=["onnx", "onnxruntime", "sentence-transformers", "sentence-similarity", "transformers.js"],
        summary=f"An ONNX embedding model (opset {plan.opset})",
        facts={
            "embedding": f"{settings.dimension(plan.config.hidden_size):,} channels: {settings.words()}",
            "runtime profile": f"`{plan.runtime}`. {_PROFILES[plan.runtime]}",
            "activations": plan.dtype,
            "positions": f"{plan.context:,}",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections={"Use": _embedding_use(settings, plan), **prompts_section(settings)},
    )


def _embedding_use(settings: EmbeddingSettings, plan: OnnxPlan) -> str:
    types = ", `token_type_ids` (zeros)" if plan.config.token_types else ""
    marks = "" if settings.include_prompt else MARKED_PROMPTS
    return "\n\n".join(
        (
            "The graph is `onnx/model.onnx`, its weights `onnx/model.onnx_data`: keep both. Inputs are `input_ids`, "
            f"`attention_mask`{types}, int64 [batch, tokens] with any batch, length and padding; outputs "
            "`last_hidden_state`, the token vectors, and `sentence_embedding`, one vector a text, with pooling, dense "
            f"layers and normalization done.{marks} With transformers.js, REPO being where this folder lies on a hub:",
            code("js", _EMBEDDING_JS.strip().splitlines()),
        )
    )


def _cache_words(plan: OnnxPlan) -> str:
    if plan.kv_cache == FLOAT:
        return plan.dtype
    return f"{plan.dtype}; keys and values int8, a {plan.dtype} scale for each head and token"


def _use(plan: OnnxPlan) -> str:
    if plan.kv_cache != FLOAT:
        return (
            "The graph is `onnx/model.onnx`, its weights `onnx/model.onnx_data`: keep both. Inputs are `input_ids`, "
            "`attention_mask`, `position_ids`, and for each layer `past_key_values.N.key` and `.value`, int8, with "
            f"`past_key_values.N.key_scale` and `.value_scale`, {plan.dtype}; they begin with a length of 0, and each "
            "call gives what the next one takes as `present.N.key` and so on, beside `logits`. onnxruntime runs it; "
            "onnxruntime-genai, optimum and transformers.js, which expect a float cache, do not."
        )
    genai = ("In this folder, with onnxruntime-genai:", code("python", _GENAI.strip().splitlines()))
    return "\n\n".join(
        (
            "The graph is `onnx/model.onnx`, its weights `onnx/model.onnx_data`: keep both. Inputs and outputs are "
            "named as optimum names them (`input_ids`, `attention_mask`, `position_ids`, "
            f"`past_key_values.N.key`, `logits`, `present.N.key`); cache and logits are {plan.dtype}.",
            *(genai if genai_runs(plan) else ()),
            "With transformers.js, where it knows the family, REPO being where this folder lies on a hub:",
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

_EMBEDDING_JS = """
import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("REPO");
const model = await AutoModel.from_pretrained("REPO");
const inputs = tokenizer(["a small boat", "warm bread"], { padding: true, truncation: true });
const { sentence_embedding } = await model(inputs);
console.log(sentence_embedding.tolist());
"""
