"""What only Gemma 3n has: several residual streams beyond float16, and settings that must fit each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edkm_export.decoder.build import build_decoder, decoder_config
from edkm_export.decoder.families import gemma3n
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import ConversionError
from tests.helpers.odd_families import build, checkpoint_of, plain

TOKENS = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(3))


def with_outliers() -> Any:
    """Streams and products in an MLP beyond float16, as those of trained Gemma 3 and Gemma 4 are (`test_gemma4`).

    What reads the streams ignores the channel and makes the others large again.
    """
    model = build("gemma3n")
    with torch.no_grad():
        first = model.model.layers[0]
        first.pre_feedforward_layernorm.weight.mul_(600)
        first.post_feedforward_layernorm.weight[3] = 6e4
        for layer in model.model.layers:
            layer.per_layer_input_gate.weight[:, 3] = 0
            layer.altup.router_norm.weight[3] = 0
        for layer in model.model.layers[1:]:
            for norm, factor in ((layer.input_layernorm, 2000), (layer.pre_feedforward_layernorm, 300)):
                norm.weight.mul_(factor)
                norm.weight[3] = 0
        for layer in model.model.altup_unembed_projections:
            layer.weight[:, 3] = 0
            layer.weight[3] = 0.5
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
    assert min(largest.values()) > 65504 and expected.std() > 0.3, largest  # the model does what it is for
    found = in_float16(model).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    print(largest, kl.max())
    assert float(kl.max()) < 3e-2
    for name in ("_RESIDUAL_SCALE", "POST_NORM_INNER_SCALE"):  # each is needed
        with monkeypatch.context() as patch:
            patch.setattr(gemma3n, name, 1.0)
            assert not in_float16(model).isfinite().all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"altup_active_idx": 4}, "altup_active_idx .* 4: it must be less than altup_num_inputs, 4"),
        ({"altup_num_inputs": 1}, "altup_num_inputs of its configuration is 1"),
        (
            {"num_kv_shared_layers": 2},
            "num_kv_shared_layers .* 2: layers of each kind must come before those",
        ),
        (
            {"activation_sparsity_pattern": [0.5]},
            "activation_sparsity_pattern .* a number for each of 3 layers",
        ),
        ({"activation_sparsity_pattern": [1.0, 0, 0]}, "activation_sparsity_pattern .* less than 1"),
        ({"intermediate_size": [48, 0, 48]}, "intermediate_size .* it must be positive"),
        ({"intermediate_size": [48, 48]}, "num_hidden_layers .* 3: intermediate_size has 2 values"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        decoder_config({**plain("gemma3n_text"), "model_type": "gemma3n_text", **changes}, "model.pt")
