"""What only Gemma 4 has: numbers beyond float16, settings that must fit each other, and layers without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edkm_export.decoder.build import build_decoder, decoder_config
from edkm_export.decoder.config import FULL, SLIDING, HeadSizes
from edkm_export.decoder.families import gemma4
from edkm_export.decoder.states import KeysValues, layer_states, layers_with
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import ConversionError
from tests.helpers.odd_families import build, checkpoint_of, plain

TOKENS = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(3))


def with_outliers() -> Any:
    """A residual stream and products in an MLP beyond float16, and small scalars, as users of trained models report.

    The product of gate and values is infinite in the first MLP of E2B when it is computed in float16
    (unslothai/unsloth-zoo pull request 600); scalars of 12B are 0.005 to 0.92 (cloudrift-ai/emmy pull request 371). One
    channel of the stream passes 65,504 as in Gemma 3; what reads the stream ignores it, as trained norms do, and makes
    the others large again.
    """
    model = build("gemma4")
    with torch.no_grad():
        first, *others = model.model.layers
        first.pre_feedforward_layernorm.weight.mul_(300)  # gate and values: hundreds
        first.post_feedforward_layernorm.weight[3] = 6e4
        for layer, scalar in zip(model.model.layers, (0.9, 0.005, 0.6), strict=True):
            layer.layer_scalar.fill_(scalar)
            layer.per_layer_input_gate.weight[:, 3] = 0
        for layer in others:
            for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
                norm.weight.mul_(2000)
                norm.weight[3] = 0
        model.model.norm.weight.mul_(2000)
        model.model.norm.weight[3] = 0
    return model


@torch.no_grad()
def in_float16(model: Any) -> torch.Tensor:
    """Logits of our decoder, natively in float16."""
    made = checkpoint_of(model)
    whole = WholeSequence(build_decoder(made, torch.float16), made.config, TOKENS.shape[1]).half()
    return whole(TOKENS)[0].float()


@torch.no_grad()
def test_numbers_beyond_float16(monkeypatch):
    model = with_outliers().half().float()
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: Any) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    first = model.model.layers[0]
    first.mlp.down_proj.register_forward_pre_hook(watch("product"))
    first.per_layer_input_gate.register_forward_pre_hook(watch("stream"))
    expected = model(TOKENS, use_cache=False).logits[0].log_softmax(-1)
    assert min(largest.values()) > 65504 and expected.std() > 0.3  # the model does what it is for
    found = in_float16(model).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    assert float(kl.max()) < 3e-2  # 5e-3 as measured
    for name in ("_RESIDUAL_SCALE", "POST_NORM_INNER_SCALE"):  # each is needed
        with monkeypatch.context() as patch:
            patch.setattr(gemma4, name, 1.0)
            assert not in_float16(model).isfinite().all(), name


def config_of(**changes: Any) -> Any:
    return decoder_config({**plain("gemma4_text"), "model_type": "gemma4_text", **changes}, "model.pt")


def test_layers_that_share_keep_nothing():
    config = config_of(
        num_hidden_layers=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
    )  # fmt: skip
    assert [config.source_of(layer) for layer in range(5)] == [None, None, None, 2, 1]
    assert config.sources() == {1, 2}
    assert layers_with(config, KeysValues) == [0, 1, 2]
    assert layer_states(config, 1) == (KeysValues(2, 24),) and layer_states(config, 3) == ()


def test_sizes_are_read_from_published_and_from_saved_files():
    published = config_of(attention_k_eq_v=True, num_global_key_value_heads=1)
    saved = config_of(
        attention_k_eq_v=True,
        per_layer_config={str(layer): {"head_dim": 24, "num_key_value_heads": 1} for layer in (1, 2)},
    )
    assert published == saved
    assert saved.heads_of(FULL) == HeadSizes(1, 24) and saved.heads_of(SLIDING) == HeadSizes(2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block True is not supported in the gemma4_text family"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers .* 2: layers of each kind must come before those"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers .* 3: layers of each kind must come before those"),
        ({"vocab_size_per_layer_input": 95}, "hidden_size_per_layer_input .* rows, 95, fewer than vocab_size, 96"),
        ({"per_layer_config": {"1": {"head_dim": 24}}}, "per_layer_config .* must have heads of one size"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "layer '1' may have head_dim and num_key_value_heads"),
        ({"per_layer_config": {"1": {"head_dim": True}}}, "layer '1' must have positive numbers"),
        ({"global_head_dim": 15}, "15 channels of a head rotate, which must be an even number; it has head_dim 15"),
        ({"layer_types": []}, "layer_types of its configuration is \\[\\]"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        config_of(**changes)


def test_a_part_beyond_the_head_is_refused():
    made = checkpoint_of(build("gemma4"))
    rope = {**made.config["rope_parameters"]}
    rope["full_attention"] = {"rope_type": "proportional", "partial_rotary_factor": 1.5, "rope_theta": 1e4}
    with pytest.raises(
        ConversionError, match="partial_rotary_factor is 1.5, expected more than 0 and at most 1"
    ):
        WholeSequence(build_decoder(made), {**made.config, "rope_parameters": rope}, 8)
