"""genai_config.json and generation_config.json: how onnxruntime-genai and transformers find their way in a folder.

Fields as in onnxruntime-genai's documentation ("Generate API, config reference").
"""

from __future__ import annotations

from typing import Any

from converters.onnx.format import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY,
    LOGITS,
    POSITION_IDS,
    VALUE,
    past_name,
    present_name,
)
from converters.onnx.write.export_plan import OnnxPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.states import Columns, KeysValues, layers_with
from edkm_export.end_tokens import as_setting, read_object, stored_end_tokens
from edkm_export.kv_cache import FLOAT

__all__ = ["genai_config", "genai_runs", "generation_config"]

GENERATION_CONFIG = "generation_config.json"

# Families that onnxruntime-genai runs as a plain decoder under their own name; any other one is a "decoder" there.
_GENAI_TYPES = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's own, or one with the special tokens of its configuration; with every end token of the checkpoint."""
    found = _own_generation_config(checkpoint)
    if ends := stored_end_tokens(checkpoint.config, checkpoint.tokenizer):
        found["eos_token_id"] = as_setting(ends)
    return found


def _own_generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    own = read_object(checkpoint.tokenizer.get(GENERATION_CONFIG))
    return own or {"_from_model_config": True, **_special_tokens(checkpoint.config)}


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def genai_runs(plan: OnnxPlan) -> bool:
    """Whether onnxruntime-genai can: it has no names for other states than keys and values, and one size of heads.

    Keys and values of int8 it knows inside of GroupQueryAttention only, with scales that are constants.
    """
    return (
        plan.interface == "decoder"
        and not layers_with(plan.config, Columns)
        and not plan.config.full_heads
        and plan.kv_cache == FLOAT
    )


def genai_config(checkpoint: Checkpoint, plan: OnnxPlan, model: str) -> dict[str, Any]:
    """Configuration of onnxruntime-genai.

    Args:
        checkpoint: the model.
        plan: of its graph.
        model: path of the graph in the folder.
    """
    config, family = plan.config, checkpoint.config["model_type"]
    generation = generation_config(checkpoint)
    tokens = _special_tokens({**checkpoint.config, **generation})
    ends = tokens.get("eos_token_id")
    if "pad_token_id" not in tokens and ends is not None:  # what follows the end is never looked at
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    decoder = {
        "session_options": session_options(plan.runtime),
        "filename": model,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": len(layers_with(config, KeysValues)),  # it looks for a cache of each
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "position_ids": POSITION_IDS,
            "past_key_names": past_name("%d", KEY),
            "past_value_names": past_name("%d", VALUE),
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": present_name("%d", KEY),
            "present_value_names": present_name("%d", VALUE),
        },
    }
    return {
        "model": {
            "type": family if family in _GENAI_TYPES else "decoder",
            "context_length": plan.context,
            "vocab_size": config.vocab_size,
            **tokens,  # none is made up: 0 would be an ordinary word
            "decoder": decoder,
        },
        # the cache grows: present is longer than past
        "search": {"do_sample": False, "max_length": plan.context, "past_present_share_buffer": False},
    }


def session_options(runtime: str) -> dict[str, Any]:
    """Options of onnxruntime that a profile is made for, by the names that genai_config.json uses."""
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if runtime == "low-memory":  # an arena would keep what decoding a weight took
        options |= {"enable_cpu_mem_arena": False, "enable_mem_pattern": False}
    return options
