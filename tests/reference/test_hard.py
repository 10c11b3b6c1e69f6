from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.decoder import Decoder
from edkm_export.errors import CheckpointError
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from tests.helpers.odd_models import build
from tests.helpers.palettes import random_palette


def palettized(case: str) -> Checkpoint:
    model = build(case).half()
    config = model.config.to_dict()
    parts = palettize_model(model, uniform_recipe(4, 0))
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


def changed(made: Checkpoint, **changes: Any) -> Checkpoint:
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("case", ["plain", "untied_and_biased", "odd_sizes", "rope_llama3"])
def test_model_of_transformers_with_the_decoded_weights(case):
    made = palettized(case)
    model = load_hard_model(made)
    assert type(model) is LlamaForCausalLM and not isinstance(model, Decoder) and not model.training
    state = model.state_dict()
    for name, tensor in made.palettized.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor.decode().float())
    for name, tensor in made.dense.items():
        assert torch.equal(state[name], tensor.float())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    expected = build(case)
    expected.set_attn_implementation("eager")
    expected.load_state_dict(made.state_dict())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)  # RoPE buffers and all


def test_tied_weights_stay_tied():
    model = load_hard_model(palettized("plain"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_hard_model(palettized("untied")).lm_head.weight is not None


def test_weights_in_another_dtype():
    model = load_hard_model(palettized("plain"), torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_stored_dtype_does_not_matter():
    made = palettized("plain")
    logits = [
        load_hard_model(changed(made, config={**made.config, "dtype": dtype}))(torch.arange(9)[None]).logits
        for dtype in ("float32", "bfloat16", None)
    ]
    assert all(torch.equal(one, logits[0]) for one in logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.dense.pop("model.norm.weight"), "parameter model.norm.weight is missing"),
        (lambda made: made.tied.clear(), "parameter lm_head.weight is missing"),
        (
            lambda made: made.dense.update({"model.extra": torch.ones(2)}),
            "parameter model.extra is not part of the model",
        ),
        (
            lambda made: made.palettized.update({"model.embed_tokens.weight": random_palette((320, 16), 8)}),
            r"parameter model.embed_tokens.weight has shape \[320, 16\], the model needs \[320, 32\]",
        ),
    ],
    ids=["missing", "untied", "extra", "misshapen"],
)
def test_parameters_that_do_not_fit_are_named(change, message):
    made = palettized("plain")
    change(made)
    with pytest.raises(CheckpointError, match=f"^checkpoint: {message}"):
        load_hard_model(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"rope_parameters": {"rope_type": "no_such_kind"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_configuration_that_is_not_understood(changes):
    made = palettized("plain")
    with pytest.raises(CheckpointError) as caught:
        load_hard_model(changed(made, config={**made.config, **changes}))
    assert str(caught.value).startswith("checkpoint: ")


def test_configuration_without_model_type():
    made = palettized("plain")
    del made.config["model_type"]
    with pytest.raises(CheckpointError, match="checkpoint: "):
        load_hard_model(made)


# Tokenizers


def test_tokenizer_of_the_checkpoint(tiny_checkpoint, tiny_llama):
    from transformers import AutoTokenizer

    text = "A hacker is a person who naïvely quotes “text”."
    expected = AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]
    assert load_hard_tokenizer(tiny_checkpoint)(text)["input_ids"] == expected


def test_checkpoint_without_tokenizer():
    with pytest.raises(CheckpointError, match="holds no tokenizer; palettize from a folder that has one"):
        load_hard_tokenizer(palettized("plain"))


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"version": "1.0"', b'{"model": {"type": "Abacus"}}'])
def test_broken_tokenizer(tiny_checkpoint, content):
    broken = changed(tiny_checkpoint, tokenizer={**tiny_checkpoint.tokenizer, "tokenizer.json": content})
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read") as caught:
        load_hard_tokenizer(broken)
    assert "\n" not in str(caught.value)


def test_tokenizer_with_code_of_its_own(tiny_checkpoint, tmp_path):
    proof = tmp_path / "proof"
    files = {
        "tokenization_mine.py": f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n".encode(),
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}, '
        b'"tokenizer_class": "Mine"}',
    }
    broken = changed(tiny_checkpoint, tokenizer={**tiny_checkpoint.tokenizer, **files})
    with contextlib.suppress(CheckpointError):
        load_hard_tokenizer(broken)
    assert not proof.exists()
