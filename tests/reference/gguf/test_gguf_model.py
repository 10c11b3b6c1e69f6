"""Weights, rotation and tokenizer of a file, beyond what the table of kinds shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_model import read_gguf
from edkm_export.reference.source import Source, load_config, load_model, load_tokenizer
from tests.helpers.gguf_kinds import KINDS, LLAMA3, rope
from tests.helpers.gguf_models import tiny
from tests.helpers.gguf_writer import Content, content, write

DOWN = "blk.1.ffn_down.weight"


@pytest.fixture
def made() -> Content:
    kind = KINDS["llama"]
    return kind.content(kind.model())


def refusal(made: Content, path, dtype=torch.float32) -> str:
    write(made, path)
    with pytest.raises(SourceError) as caught:
        read_gguf(path).load_model(dtype)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# Values


def test_value_beyond_float16_is_named(made, tmp_path):
    made.tensors[DOWN] = made.tensors[DOWN].copy()
    made.tensors[DOWN][3, 5] = -70000
    message = refusal(made, tmp_path / "model.gguf", torch.float16)
    assert f"{DOWN} (model.layers.1.mlp.down_proj.weight): holds 70,000" in message and "65,504" in message
    wide = read_gguf(tmp_path / "model.gguf").load_model(torch.float32)
    assert wide.model.layers[1].mlp.down_proj.weight[3, 5] == -70000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_no_number(made, tmp_path, value):
    made.tensors[DOWN] = made.tensors[DOWN].copy()
    made.tensors[DOWN][3, 5] = value
    assert "holds a value that is no finite number" in refusal(made, tmp_path / "model.gguf")


def test_shape_that_does_not_fit(made, tmp_path):
    made.tensors[DOWN] = made.tensors[DOWN][:-1]
    message = refusal(made, tmp_path / "model.gguf")
    assert f"{DOWN}: has the shape [31, 48], but model.layers.1.mlp.down_proj.weight" in message


def test_every_value_advances_the_bar(made, tmp_path):
    read = read_gguf(write(made, tmp_path / "model.gguf"))
    amounts: list[int] = []
    read.load_model(torch.float16, amounts.append)
    assert sum(amounts) == read.values == sum(each.size for each in made.tensors.values())


def test_float16_unless_asked_for_more(made, tmp_path):
    source = Source.parse(str(write(made, tmp_path / "model.gguf")))
    assert load_model(source).dtype == torch.float16
    assert load_model(source, torch.float32).dtype == torch.float32
    assert load_config(source).model_type == "llama"


def test_tensors_are_decoded_one_at_a_time(made, tmp_path, monkeypatch):
    """No call decodes more than its part: what a large model needs beside its own weights."""
    from edkm_export.reference.gguf import gguf_file, gguf_weights

    monkeypatch.setattr(gguf_weights, "_PART", 64)
    largest = []
    decode = gguf_file.StoredTensor.values

    def values(self, first, last):
        found = decode(self, first, last)
        largest.append(found.size)
        return found

    monkeypatch.setattr(gguf_file.StoredTensor, "values", values)
    read_gguf(write(made, tmp_path / "model.gguf")).load_model()
    assert max(largest) <= 64


# Rotation


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_factors_of_llama3_are_recognized(tmp_path, factor, head_dim):
    """transformers then turns each pair by what the file's factors say, to the last bits of float32."""
    model = tiny("llama", head_dim=head_dim, **rope("llama3", factor=factor, **LLAMA3, rope_theta=500000.0))
    made = content(model)
    loaded = read_gguf(write(made, tmp_path / "model.gguf")).load_model()
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    turned = loaded.model.rotary_emb.inv_freq.double().numpy()
    np.testing.assert_allclose(turned, plain / made.tensors["rope_freqs.weight"], rtol=1e-6)


def test_other_factors_are_kept_to_the_last_bit(made, tmp_path):
    factors = np.random.default_rng(0).uniform(0.5, 9, 4).astype(np.float32)
    made.tensors["rope_freqs.weight"] = factors
    loaded = read_gguf(write(made, tmp_path / "model.gguf")).load_model()
    kept = loaded.config.rope_parameters
    assert np.array_equal(np.array(kept["short_factor"], np.float32), factors)
    assert kept["short_factor"] == kept["long_factor"] and kept["attention_factor"] == 1


# Account


def test_inspection_needs_no_weights(made, tmp_path, monkeypatch):
    from edkm_export.reference.gguf.gguf_file import StoredTensor

    monkeypatch.setattr(StoredTensor, "values", None)
    account = read_gguf(write(made, tmp_path / "model.gguf")).account()
    assert account.kind == "GGUF file (llama, F32)" and not account.not_understood


def test_zeros_are_remarked(tmp_path):
    """llama.cpp takes each bias alone; the transformers model has all four of attention or none."""
    model = tiny("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    made = content(model)
    for layer in range(2):
        del made.tensors[f"blk.{layer}.attn_output.bias"]
    read = read_gguf(write(made, tmp_path / "model.gguf"))
    assert read.account().remarks == ("attn_output.bias of the layers are zeros: the file holds none",)
    loaded = read.load_model(torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)


def test_ends_of_a_text(made, tmp_path):
    made.metadata["tokenizer.ggml.eot_token_id"] = 7
    config = read_gguf(write(made, tmp_path / "model.gguf")).config()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 7], None)


# Tokenizer


def test_bytes_and_what_surrounds_a_text(made, tmp_path):
    tokenizer = load_tokenizer(Source.parse(str(write(made, tmp_path / "model.gguf"))))
    sent = tokenizer("hé")["input_ids"]
    assert sent == [1, 259, *(3 + byte for byte in "hé".encode())]
    assert tokenizer.decode(sent, skip_special_tokens=True) == "hé"
    made.metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    made.metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = read_gguf(write(made, tmp_path / "model.gguf")).load_tokenizer()
    assert tokenizer("hé")["input_ids"] == [*(3 + byte for byte in "hé".encode()), 2]


BYTES = pre_tokenizers.ByteLevel.alphabet()


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["Ab", "12", "Ġ345"]),
        ("smollm", ["Ab", "1", "2", "Ġ", "3", "4", "5"]),
        ("qwen2", ["Ab", "1", "2", "Ġ", "3", "4", "5"]),
        ("llama-bpe", ["Ab", "12", "Ġ", "345"]),
        ("gpt-4o", ["Ab", "12", "Ġ", "345"]),
        ("tekken", ["Ab", "1", "2", "Ġ", "3", "4", "5"]),
    ],
)
def test_text_is_split_as_its_name_says(made, tmp_path, split, expected):
    tokens = ["<unk>", "<s>", "</s>", *sorted(BYTES), "Ab", "12"]
    tokens += [f"[PAD{number}]" for number in range(272 - len(tokens))]
    made.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["A b", "1 2"],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 269],
    }
    del made.metadata["tokenizer.ggml.scores"]
    tokenizer = read_gguf(write(made, tmp_path / "model.gguf")).load_tokenizer()
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("Ab12 345")
    assert [piece for piece, _ in pieces] == expected
    text = "naïve \n 数学 <s>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
