"""Sizes against checkpoints that were made, times and memory against what was measured."""

from __future__ import annotations

import pytest

from edkm_export.forecast import STEP_TOKENS, ModelSize, forecast_steps
from edkm_export.palettization import palettize_model
from edkm_export.recipe import PRESETS
from edkm_export.reference.outline import outline
from edkm_export.reference.source import Source
from edkm_export.training.train_config import TrainConfig
from tests.helpers.odd_models import build, save

SMOLLM2 = ModelSize({}, frozenset(), parameters=134_515_008, layers=30, vocabulary=49_152)
GEMMA = ModelSize({}, frozenset(), parameters=268_098_176, layers=18, vocabulary=262_144)
LLAMA_1B = ModelSize({}, frozenset(), parameters=1_235_814_400, layers=16, vocabulary=128_256)


@pytest.mark.parametrize("preset", ["4bit", "3bit-int8", "2bit-int4", "4bit-per-tensor", "dense"])
@pytest.mark.parametrize("shape", ["plain", "untied_and_biased", "odd_sizes"])
def test_sizes_are_those_of_the_checkpoint(shape, preset, tmp_path):
    model = build(shape).half()
    size = ModelSize.of(outline(Source.parse(str(save(model, tmp_path / "model")))))
    assert size.parameters == sum(each.numel() for each in model.parameters())
    found = size.footprint(PRESETS[preset], "model")
    made = palettize_model(model, PRESETS[preset])
    stored = 2 * sum(tensor.numel() for tensor in made.dense.values())
    for tensor in made.palettized.values():
        stored += tensor.numel * tensor.n_bits / 8 + tensor.lut.numel() * tensor.lut.element_size()
        stored += 0 if tensor.lut_scale is None else tensor.lut_scale.numel() * 2
    assert found.size_bytes == stored
    assert (found.decoder_bits is None) == (preset == "dense")


def test_a_target_fills_up_what_the_recipe_leaves(tiny_llama):
    size = ModelSize.of(outline(Source.parse(str(tiny_llama))))
    plain = size.footprint(PRESETS["3bit"], "model")
    mixed = size.footprint(PRESETS["3bit"], "model", target_decoder_bits=3.25)
    decoder = 786_432  # weights of the four layers
    rows = 4 * (2 * 128 + 2 * 64 + 2 * 384 + 128)
    assert plain.decoder_bits == pytest.approx(3 + rows / 16 * 8 * 16 / decoder)
    assert mixed.decoder_bits == 3.25
    assert mixed.size_bytes - plain.size_bytes == pytest.approx((3.25 - plain.decoder_bits) * decoder / 8)
    assert size.footprint(PRESETS["4bit"], "model", target_decoder_bits=4.1).decoder_bits == pytest.approx(
        4.104, abs=1e-3
    )


@pytest.mark.parametrize(
    ("size", "command", "seconds", "gigabytes"),
    [  # from docs/results.md
        (SMOLLM2, "palettize", 45, 1.0),
        (GEMMA, "palettize", 42, 1.6),
        (LLAMA_1B, "palettize", 3.7 * 60, 3.8),
        (SMOLLM2, "coreml", 55, 0.9),
        (LLAMA_1B, "coreml", 58, 2.9),
        (SMOLLM2, "verify", 89, 4.6),
        (GEMMA, "verify", 324, 16.4),
    ],
)
def test_forecasts_are_near_what_was_measured(size, command, seconds, gigabytes):
    (step,) = (each for each in forecast_steps(size, 1e8) if each.command.startswith(command))
    assert seconds / 1.7 < step.seconds < seconds * 1.7
    assert gigabytes / 1.3 < step.memory_bytes / 1e9 < gigabytes * 1.3


def test_the_step_is_that_of_the_defaults():
    config = TrainConfig()
    assert config.step_tokens == STEP_TOKENS
