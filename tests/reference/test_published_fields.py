"""Fields that published files of newer families have beside those that transformers' classes declare."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from edkm_export.reference.config_class import config_class
from edkm_export.reference.config_fields import sort_fields
from edkm_export.reference.family_fields import IN_ANY_CASE, ONLY_AS

COHERE2: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 132096,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "use_qk_norm": False,
    "vocab_size": 256000,
}
HUNYUAN: dict[str, Any] = {
    "add_classification_head": False,
    "architectures": ["HunYuanDenseV1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "bos_token_id": 127958,
    "cla_share_factor": 2,
    "class_num": 0,
    "dense_list": [4096, 0],
    "eos_token_id": 127960,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "im_end_id": 5,
    "im_newline_id": 11,
    "im_start_id": 4,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mask_init_id": 12,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "model_type": "hunyuan_v1_dense",
    "norm_type": "rms",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "org_vocab_size": 128167,
    "pad_id": 127961,
    "pad_token_id": 127961,
    "pool_type": "last",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "sep_token_id": 127962,
    "text_end_id": 7,
    "text_start_id": 6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.6",
    "use_cache": True,
    "use_cla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "vocab_size": 128167,
}
STABLELM: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "layer_norm_eps": 1e-05,
    "model_type": "stablelm",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.25,
    "qk_layernorm": True,
    "rope_theta": 10000,
    "rotary_scaling_factor": 1.0,
    "use_norm_bias": False,
    "use_parallel_residual": True,
    "vocab_size": 100352,
}


@pytest.mark.parametrize("config", [COHERE2, HUNYUAN, STABLELM], ids=lambda each: each["model_type"])
def test_published_fields_are_understood(config):
    assert sort_fields(config).not_understood == {}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (COHERE2, "position_embedding_type", "rope"),
        (COHERE2, "position_embedding_type", "absolute"),
        (COHERE2, "rotary_pct", 0.5),
        (COHERE2, "use_qk_norm", True),
        (HUNYUAN, "add_classification_head", True),
        (HUNYUAN, "norm_type", "layer"),
        (HUNYUAN, "use_cla", True),
        (HUNYUAN, "position_embedding_type", "relative_key"),
        (STABLELM, "rotary_scaling_factor", 2.0),
    ],
)
def test_other_values_ask_for_other_models(config, name, value):
    assert list(sort_fields({**config, name: value}).not_understood) == [name]


@pytest.mark.parametrize("family", sorted({*ONLY_AS, *IN_ANY_CASE}))
def test_fields_are_none_of_transformers_own(family):
    """A field that a class declares is read by it, and needs no entry."""
    names = {*ONLY_AS.get(family, ()), *IN_ANY_CASE.get(family, ())}
    kind = config_class(family)
    assert kind is not None and not names & set(kind.declared)
    assert not names & transformers.AutoConfig.for_model(family).to_dict().keys()
