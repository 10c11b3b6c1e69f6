"""What an export promises and writes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from converters.coreai.backend import missing_backend
from edkm_export.errors import ConversionError
from tests.helpers.coreai_models import mixed_checkpoint
from tests.helpers.odd_families import build_case, checkpoint_of, plain

if missing_backend():
    pytest.skip(f"not run: {missing_backend()}", allow_module_level=True)

from converters.coreai.read.asset import load_asset
from converters.coreai.write.asset_file import named_decoder, write_asset
from converters.coreai.write.bundle import bundle_metadata
from converters.coreai.write.export_plan import plan_coreai
from converters.coreai.write.lint import lint


@pytest.fixture(scope="module")
def made():
    return mixed_checkpoint()


def test_an_export_keeps_its_promises(made, tmp_path):
    plan = plan_coreai(made, context=64)
    write_asset(made, plan, tmp_path / "model.aimodel")
    asset = load_asset(tmp_path / "model.aimodel")
    for name, tensor in asset.palettized().items():
        assert tensor.same_bits(made.palettized[name]), name
    assert list(asset.program.public) == list(plan.function_names)
    # 100 small constants are a share of so small a model
    assert 0 <= asset.constants_size_bytes - plan.weights_size_bytes < 2000


def test_no_dense_weight_is_made(made):
    decoder = named_decoder(made)
    held = {name for name, _ in decoder.named_parameters()}
    assert not held & made.palettized.keys() and held <= made.dense.keys()
    assert all(parameter.dtype == torch.float16 for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interface": "other"}, "--interface 'other' is unknown"),
        ({"context": 1}, "--context-length 1 is outside 2 to 256"),
        ({"context": 257}, "--context-length 257 is outside 2 to 256"),
        (
            {"interface": "neural-engine", "context": 64},
            "is no length that the static engine's caches can have",
        ),
    ],
)
def test_refused(made, options, message):
    with pytest.raises(ConversionError) as caught:
        plan_coreai(made, **options)
    assert message in str(caught.value)


def test_padding_needs_something_to_pad():
    made = mixed_checkpoint()
    for name in [name for name, tensor in made.palettized.items() if tensor.n_bits == 3]:
        made.dense[name] = made.palettized.pop(name).decode()
    with pytest.raises(ConversionError, match="--pad-3bit is for weights of 3 bits"):
        plan_coreai(made, pad_3bit=True)


def test_padding_takes_a_third_more(made):
    plain, padded = (plan_coreai(made, pad_3bit=pad).weights_size_bytes for pad in (False, True))
    three = [tensor for tensor in made.palettized.values() if tensor.n_bits == 3]
    assert padded - plain == sum(
        tensor.indices.numel() // 3 + tensor.lut.numel() * tensor.lut.element_size() for tensor in three
    )


def test_metadata_of_the_bundle(made):
    """Field by field what `ModelBundle.swift` and `LanguageConfig.swift` decode."""
    found = bundle_metadata(made, plan_coreai(made), "model")
    kinds = {
        "metadata_version": str,
        "kind": str,
        "name": str,
        "assets": dict,
        "language": dict,
        "source": dict,
    }
    assert all(type(found[key]) is kind for key, kind in kinds.items())
    assert (found["metadata_version"], found["kind"]) == ("0.2", "llm")
    assert found["assets"] == {"main": "model.aimodel"}
    language = found["language"]
    expected = {"tokenizer": str, "vocab_size": int, "max_context_length": int, "embedded_tokenizer": bool}
    assert all(type(language[key]) is kind for key, kind in expected.items())
    assert language["function_map"] == {"main": ["main"]}
    assert found["source"]["hf_model_id"] and found["source"]["model_definition"] == "torch"
    static = bundle_metadata(made, plan_coreai(made, interface="neural-engine"), "model")
    assert static["language"]["max_context_length"] == 256 and "function_map" not in static["language"]


def test_lint(made):
    found = {finding.id for finding in lint(made, plan_coreai(made))}
    assert found == {"3-bit-indices", "one-function"}
    found = {
        finding.id for finding in lint(made, plan_coreai(made, interface="neural-engine", pad_3bit=True))
    }
    assert found == {"state-multiple"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "hands over embedded tokens, and the per-layer embedding of this model is looked up by their numbers"),
        ({"hidden_size_per_layer_input": 0}, "this model has heads of two sizes, or layers that share keys and"),
    ],
)  # fmt: skip
def test_the_static_engine_has_one_size_of_heads_and_no_per_layer_embedding(changes, message):
    model = build_case("gemma4_text", {**plain("gemma4_text"), **changes})
    with pytest.raises(ConversionError, match=message):
        plan_coreai(checkpoint_of(model), interface="neural-engine")
