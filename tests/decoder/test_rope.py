from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edkm_export.decoder.rope import rope_tables
from edkm_export.errors import ConversionError
from tests.helpers.odd_models import CASES

THETA = {"rope_theta": 10000.0}

# Beyond the kinds of the odd models: what large models set. (rope_parameters, max_position_embeddings, head_dim)
SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama 2": ({"rope_type": "default", **THETA}, 4096, 128),
    "llama 3": ({"rope_type": "default", "rope_theta": 500000.0}, 8192, 128),
    "llama 3.2": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
        64,
    ),
    "linear": ({"rope_type": "linear", "factor": 3.0, **THETA}, 2048, 64),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, **THETA},
        32768,
        128,
    ),
    "yarn with its own factor": (
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "attention_factor": 0.7,
            "original_max_position_embeddings": 4096,
            **THETA,
        },
        32768,
        64,
    ),
    "yarn of DeepSeek": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            **THETA,
        },
        163840,
        64,
    ),
    "yarn, borders not rounded": (
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            **THETA,
        },
        131072,
        64,
    ),
    "dynamic within its context": ({"rope_type": "dynamic", "factor": 2.0, **THETA}, 2048, 64),
}


def of_transformers(config: LlamaConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [positions, head_dim]."""
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0], sin[0]


def assert_tables(config: LlamaConfig, head_dim: int, length: int) -> None:
    cos, sin = rope_tables(config.to_dict(), head_dim, length)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (length, head_dim)
    positions = torch.arange(length)
    expected_cos, expected_sin = of_transformers(config, positions)
    # transformers computes frequencies and angles in float32: an angle of p radians is off by up to p * 2**-23
    # through each of the two, and the tables by as much. Ours are rounded once.
    tolerance = 1e-6 + positions[:, None] * 2**-22
    assert bool(((cos - expected_cos).abs() <= tolerance).all())
    assert bool(((sin - expected_sin).abs() <= tolerance).all())


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers_for_odd_models(case):
    config = LlamaConfig(**{**CASES[case], "rope_parameters": dict(CASES[case]["rope_parameters"])})
    assert_tables(config, config.head_dim, config.max_position_embeddings)


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_are_those_of_transformers(name):
    parameters, positions, head_dim = SETTINGS[name]
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters=dict(parameters),
    )
    assert_tables(config, head_dim, min(positions, 2048))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_make_a_difference(name):
    """Were a parameter ignored by both sides, the comparison above would prove nothing."""
    tables = {
        other: torch.stack(
            rope_tables({"rope_parameters": parameters, "max_position_embeddings": positions}, 64, 512)
        )
        for other, (parameters, positions, _) in SETTINGS.items()
    }
    same = [other for other in tables if torch.equal(tables[other], tables[name])]
    unscaled = {"llama 2", "dynamic within its context"}
    assert set(same) == (unscaled if name in unscaled else {name})


def test_tables_are_exact_at_large_positions():
    """The graph of Hugging Face, in float16, is wrong by whole radians here."""
    cos, sin = rope_tables({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 64, 4096)
    for position in (1, 1000, 4095):
        for channel in (0, 1, 17, 31):
            angle = position * 10000.0 ** (-2 * channel / 64)
            for half in (0, 32):  # both halves of a head rotate together
                # rounded once to float32: 2**-24 of a value up to 1, and 1e-12 of the float64 angle
                assert abs(float(cos[position, half + channel]) - math.cos(angle)) < 1e-7
                assert abs(float(sin[position, half + channel]) - math.sin(angle)) < 1e-7


@pytest.mark.parametrize(
    "config",
    [{}, {"rope_parameters": None}, {"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000.0}}],
)
def test_defaults_of_older_configurations(config):
    expected = rope_tables({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 16, 8)
    assert all(torch.equal(a, b) for a, b in zip(rope_tables(config, 16, 8), expected, strict=True))


def test_theta_of_older_configurations():
    expected = rope_tables({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 16, 8)
    found = rope_tables({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 16, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["ntk", "su", "mrope"])
def test_unsupported_kind_lists_those_that_are(kind):
    known = "default, dynamic, linear, llama3, longrope, proportional, yarn"
    message = f"RoPE scaling '{kind}' is not supported; supported are {known}"
    with pytest.raises(ConversionError, match=message):
        rope_tables({"rope_parameters": {"rope_type": kind, **THETA}}, 16, 8)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 4.0, 9.0, 16.0],
    "original_max_position_embeddings": 64,
    **THETA,
}


@pytest.mark.parametrize("change", [{}, {"attention_factor": 0.8}, {"factor": 16.0}])
def test_longrope_within_its_context(change):
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={**LONGROPE, **change},
    )
    assert_tables(config, 8, 64)


def test_longrope_beyond_its_context_is_refused():
    config = {"rope_parameters": LONGROPE, "max_position_embeddings": 512}
    with pytest.raises(ConversionError, match=r"beyond 64 tokens.*use --sequence-length 64 or less"):
        rope_tables(config, 8, 65)


@pytest.mark.parametrize("factors", [None, 2.0, [1.0, 2.0], [1.0, 2.0, 0.0, 1.0], [1.0, 2.0, "3", 1.0]])
def test_longrope_with_factors_that_make_no_sense(factors):
    config = {"rope_parameters": {**LONGROPE, "short_factor": factors}, "max_position_embeddings": 512}
    with pytest.raises(ConversionError, match="'longrope': short_factor is .*, expected 4 positive numbers"):
        rope_tables(config, 8, 64)


def test_parameters_for_each_kind_of_layer():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    for kind, name in (("full", "full_attention"), ("sliding", "sliding_attention")):
        expected = rope_tables({"rope_parameters": nested[name]}, 16, 8)
        found = rope_tables({"rope_parameters": nested}, 16, 8, kind)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dynamic_scaling_beyond_its_context_is_refused():
    config = {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA},
        "max_position_embeddings": 64,
    }
    rope_tables(config, 16, 64)
    with pytest.raises(ConversionError, match=r"beyond 64 tokens.*use --sequence-length 64 or less"):
        rope_tables(config, 16, 65)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("linear", "factor"),
        ("llama3", "factor"),
        ("llama3", "low_freq_factor"),
        ("llama3", "high_freq_factor"),
        ("llama3", "original_max_position_embeddings"),
        ("yarn", "original_max_position_embeddings"),
    ],
)
def test_parameter_that_is_missing_is_named(kind, missing):
    parameters = {
        "rope_type": kind,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **THETA,
    }
    rope_tables({"rope_parameters": parameters}, 16, 8)
    del parameters[missing]
    with pytest.raises(ConversionError, match=missing):
        rope_tables({"rope_parameters": parameters}, 16, 8)
