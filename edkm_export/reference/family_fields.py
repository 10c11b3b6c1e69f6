"""Fields of published config.json files that transformers' class of the family does not declare.

They come from the code that the model was trained with. Each has one value with which it says what transformers does in
any case; with another one the file asks for another model.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ONLY_AS"]

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
        "norm_type": ("rms", "norms are root mean square norms"),
        "num_experts": (1, "an MLP without experts"),
        "use_cla": (False, "layers do not share keys and values"),
        "use_qk_norm": (True, "queries and keys are normalized"),
        "use_rotary_pos_emb": (True, "positions are rotary ones"),
    },
    "starcoder2": {
        "mlp_type": ("default", "the MLP has no gate"),
        "norm_type": ("layer_norm", "norms are layer norms"),
        "scale_attn_weights": (True, "scores are scaled"),
    },
}
"""{family: {field: (value, what it says)}}."""
