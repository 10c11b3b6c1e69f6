"""Fields of published config.json files that transformers' class of the family does not declare.

They come from the code that the model was trained with. Some have one value with which they say what transformers does
in any case; with another one the file asks for another model. Others change no logit, whatever they say.
"""

from __future__ import annotations

from typing import Any

__all__ = ["IN_ANY_CASE", "ONLY_AS"]

ONLY_AS: dict[str, dict[str, tuple[Any, str]]] = {
    "cohere2": {
        "layer_switch": (4, "every fourth layer is full"),
        "order_of_interleaved_layers": ("local_attn_first", "sliding layers come first"),
        "position_embedding_type": ("rope_gptj", "neighbouring channels rotate"),
        "rotary_pct": (1.0, "heads rotate as a whole"),
        "use_embedding_sharing": (True, "the head is the embedding"),
        "use_gated_activation": (True, "the MLP is gated"),
        "use_parallel_block": (True, "attention and MLP lie side by side"),
        "use_qk_norm": (False, "queries and keys are not normalized"),
    },
    "hunyuan_v1_dense": {
        "add_classification_head": (False, "a language model alone"),
        "norm_type": ("rms", "norms are root mean square norms"),
        "num_experts": (1, "an MLP without experts"),
        "use_cla": (False, "layers do not share keys and values"),
        "use_qk_norm": (True, "queries and keys are normalized"),
        "use_rotary_pos_emb": (True, "positions are rotary ones"),
    },
    "stablelm": {
        "rotary_scaling_factor": (1.0, "the rotation is not scaled"),
    },
    "starcoder2": {
        "mlp_type": ("default", "the MLP has no gate"),
        "norm_type": ("layer_norm", "norms are layer norms"),
        "scale_attn_weights": (True, "scores are scaled"),
    },
}
"""{family: {field: (value, what it says)}}."""

_TOKENS = "the id of a token, which is the tokenizer's to give"
_OTHER_HEAD = "for models of another task"
IN_ANY_CASE: dict[str, dict[str, str]] = {
    "cohere2": {
        "use_parallel_embedding": "how the embedding is divided over machines",
    },
    "hunyuan_v1_dense": {
        "cla_share_factor": "of layers that share keys and values; use_cla says whether there are any",
        "class_num": _OTHER_HEAD,
        "dense_list": _OTHER_HEAD,
        "pool_type": _OTHER_HEAD,
        "mask_init_id": _TOKENS,
        "im_end_id": _TOKENS,
        "im_newline_id": _TOKENS,
        "im_start_id": _TOKENS,
        "pad_id": _TOKENS,
        "sep_token_id": _TOKENS,
        "text_end_id": _TOKENS,
        "text_start_id": _TOKENS,
        "org_vocab_size": "the vocabulary before it was padded",
    },
    "stablelm": {
        "use_norm_bias": "norms have biases in any case, and the folder must hold them",
    },
}
"""{family: {field: why it changes no logit}}."""
