"""What each family takes from its configuration, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.families import FAMILIES
from edkm_export.errors import ConversionError
from tests.helpers.odd_families import CASES, keys_of, plain


def config_of(case: str, **changes: Any) -> dict[str, Any]:
    """As a checkpoint holds it."""
    kind, arguments = CASES[case]
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in arguments.items()}
    return {**transformers.AutoConfig.for_model(kind, **copied).to_dict(), **changes}


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in FAMILIES for key in keys_of(kind)],
)
def test_values_of_another_type_are_refused(kind, key):
    """Whatever a key should hold, it is no set of numbers."""
    config = {**plain(kind), "model_type": kind, key: {1, 2}}
    with pytest.raises(ConversionError, match=rf"^model.pt: {key}\b.* {{1, 2}}"):
        decoder_config(config, "model.pt")


@pytest.mark.parametrize("kind", FAMILIES)
def test_required_keys_are_named(kind):
    for key, field in keys_of(kind).items():
        if field.is_required():
            config = {name: value for name, value in plain(kind).items() if name != key}
            with pytest.raises(ConversionError, match=f"lacks '{key}'; palettize the model again"):
                decoder_config({**config, "model_type": kind}, "model.pt")


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("gemma2", "attn_logit_softcapping", -50.0),
        ("gemma2", "attn_logit_softcapping", float("nan")),
        ("gemma2", "final_logit_softcapping", float("inf")),
        ("gemma2", "final_logit_softcapping", "30"),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "hidden_activation", "tanh"),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "layer_types", ["sliding_attention", "chunked_attention"]),
        ("mistral", "sliding_window", 0),
        ("mistral", "hidden_act", "prelu"),
        ("qwen2", "layer_types", "full_attention"),
        ("qwen3", "attention_bias", "yes"),
        ("phi3", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 1.5}),
        ("phi3", "rope_parameters", [1.0]),
        ("gpt2", "activation_function", "tanh"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "n_positions", 2.5),
    ],
)
def test_refused_values_are_named(case, key, value):
    with pytest.raises(ConversionError, match=rf"^model.pt: {key}\b") as caught:
        decoder_config(config_of(case, **{key: value}), "model.pt")
    wrong = value[-1] if key == "layer_types" and isinstance(value, list) else value
    assert repr(wrong) in str(caught.value)


def test_as_many_layer_types_as_layers():
    config = config_of("qwen3: windows and biases", num_hidden_layers=3)
    with pytest.raises(ConversionError, match="layer_types .* names 2 layers, but num_hidden_layers is 3"):
        decoder_config(config, "model.pt")


def test_sliding_layers_need_a_window():
    config = config_of("gemma2", sliding_window=None)
    with pytest.raises(ConversionError, match="'sliding_attention', but sliding_window .* is None"):
        decoder_config(config, "model.pt")


def test_heads_that_cannot_be_halved():
    with pytest.raises(ConversionError, match="15 channels of a head rotate, which must be an even number"):
        decoder_config(config_of("llama", head_dim=15), "model.pt")


def test_heads_that_do_not_divide_the_hidden_size():
    with pytest.raises(ConversionError, match="n_head of its configuration is 5: it must divide n_embd, 32"):
        decoder_config(config_of("gpt2", n_head=5), "model.pt")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma3", "gemma", "phi", None])
def test_other_families_are_refused(model_type):
    known = ", ".join(FAMILIES)
    with pytest.raises(
        ConversionError, match=f"model type {model_type!r} cannot be exported yet; supported are {known}"
    ):
        decoder_config({"model_type": model_type}, "model.pt")


@pytest.mark.parametrize("case", ["qwen2: windows", "qwen3: windows and biases", "gemma2", "gemma3"])
def test_layers_are_those_of_transformers_without_layer_types(case):
    """Configurations on the hub give a pattern; transformers writes the list into what a checkpoint holds."""
    config = config_of(case)
    kinds = tuple(
        {"full_attention": FULL, "sliding_attention": SLIDING}[each] for each in config["layer_types"]
    )
    assert SLIDING in kinds
    assert decoder_config(config, "model.pt").layer_kinds == kinds
    if "windows and biases" not in case:  # whose list follows no pattern
        del config["layer_types"]
        pattern = {"sliding_window_pattern": CASES[case][1].get("sliding_window_pattern", 6)}
        assert decoder_config({**config, **pattern}, "model.pt").layer_kinds == kinds


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(
        [kind for kind in FAMILIES if {"sliding_window", "layer_types"} <= keys_of(kind).keys()]
    ),
    layers=st.integers(1, 13),
    first=st.integers(0, 14),
    pattern=st.integers(1, 7),
    slides=st.booleans(),
)
def test_layer_patterns_are_those_of_transformers(kind, layers, first, pattern, slides):
    given_keys = plain(kind) | {
        "num_hidden_layers": layers,
        "max_window_layers": first,
        "use_sliding_window": slides,
        "sliding_window": 5,
        "sliding_window_pattern": pattern,
        "no_rope_layers": None,
        "no_rope_layer_interval": pattern,
        "layer_types": None,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
    }
    of_transformers = transformers.AutoConfig.for_model(kind, **given_keys).layer_types
    found = decoder_config({"model_type": kind, **given_keys}, "model.pt").layer_kinds
    assert [f"{each}_attention" for each in found] == of_transformers


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(kind):
    """For keys that a configuration does not give."""
    forced = {
        key: field.examples[0]
        for key, field in keys_of(kind).items()
        if field.is_required() and field.examples
    }
    if "layer_types" in forced:
        forced["num_hidden_layers"] = len(forced["layer_types"])
    whole = transformers.AutoConfig.for_model(kind, **forced).to_dict()
    needed = {
        name: whole[name]
        for name, field in keys_of(kind).items()
        if field.is_required() or name in ("num_key_value_heads", "rope_parameters")
    }
    assert decoder_config({"model_type": kind, **needed}, "m") == decoder_config(whole, "m")
