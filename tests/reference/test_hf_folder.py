"""Folders of many kinds: each is read as the model that it was written from, or refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edkm_export.artifact.metrics import divergence
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import EdkmExportError, InputError
from edkm_export.reference.quantized_weights import DEQUANTIZED
from edkm_export.reference.quantized_weights import REFUSED as QUANTIZATIONS
from edkm_export.reference.source import Source, account, load_config, load_model, load_tokenizer
from edkm_export.reference.stored_buffers import stored_buffers
from tests.helpers import odd_families
from tests.helpers.folder_kinds import EXACT, HEAD, REFUSED, UP, Kind, edit_config, edit_weights, own_head
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled

TOKENS = torch.arange(3, 51)[None] * 7 % 96


def write(kind: Kind, folder: Path) -> tuple[object, Path]:
    """The model that a folder says, and the folder."""
    name, given = odd_families.CASES[kind.case]
    model = odd_families.build_case(name, {**given, **kind.settings})
    model.save_pretrained(folder)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = {key: value.clone() for key, value in weights.items()}
    kind.weights(weights)
    kind.change(folder)
    if HEAD in weights and not torch.equal(weights[HEAD], before[HEAD]) and model.config.tie_word_embeddings:
        model = odd_families.build_case(name, {**given, **kind.settings, "tie_word_embeddings": False})
    model.load_state_dict(weights)
    return model, folder


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits[0]


def same(expected: torch.Tensor, found: torch.Tensor) -> None:
    distance = divergence([(expected, found)])
    assert distance.kl_max < 1e-6
    assert distance.top1_agreement == 1.0


@pytest.mark.parametrize("name", EXACT)
def test_kind_that_is_read(tmp_path, name):
    """By transformers' own model, and by the decoder that is exported."""
    model, folder = write(EXACT[name], tmp_path / "model")
    source = Source.parse(str(folder))
    found = account(source)
    assert not found.not_understood
    loaded = load_model(source, torch.float32)
    expected = logits(model)
    same(expected, logits(loaded))
    decoder = build_decoder(odd_families.checkpoint_of(loaded))
    with torch.no_grad():
        same(expected, WholeSequence(decoder, loaded.config.to_dict(), TOKENS.shape[1])(TOKENS.int())[0])


@pytest.mark.parametrize("case", sampled(odd_families.CASES, 2))
def test_every_family(tmp_path, case):
    model, folder = write(Kind(lambda _folder: None, case=case), tmp_path / "model")
    found = account(Source.parse(str(folder)))
    assert not found.not_understood
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    assert set(found.tensors) == {*parameters.values(), *stored_buffers(model)}
    same(logits(model), logits(load_model(Source.parse(str(folder)), torch.float32)))


@pytest.mark.parametrize("name", REFUSED)
def test_kind_that_is_refused(tmp_path, name):
    kind = REFUSED[name]
    _, folder = write(kind, tmp_path / "model")
    with pytest.raises(EdkmExportError) as caught:
        load_model(Source.parse(str(folder)))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    assert all(word in message for word in kind.names), message


@pytest.mark.parametrize("name", ["own head under a tied configuration", "own head in GPT-2"])
def test_own_head_unties_the_configuration(tmp_path, name):
    _, folder = write(EXACT[name], tmp_path / "model")
    source = Source.parse(str(folder))
    assert not load_config(source).tie_word_embeddings
    assert "stays a weight of its own" in " ".join(account(source).remarks)
    model = load_model(source)
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_equal_twin_stays_tied(tmp_path):
    _, folder = write(EXACT["equal twin"], tmp_path / "model")
    model = load_model(Source.parse(str(folder)))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD in account(Source.parse(str(folder))).without_effect


def test_head_of_a_larger_vocabulary_is_no_twin(tmp_path):
    _, folder = write(Kind(lambda _folder: None, settings={"tie_word_embeddings": True}), tmp_path / "model")
    edit_weights(lambda weights: weights.update({HEAD: torch.zeros(97, 32)}))(folder)
    with pytest.raises(InputError, match=r"lm_head.weight: has shape \[97, 32\]"):
        load_model(Source.parse(str(folder)))


# Types


def test_float32_is_kept(tmp_path):
    """A row of 1e-7 has three values in float16."""
    _, folder = write(Kind(lambda _folder: None), tmp_path / "model")
    row = torch.linspace(-1e-7, 1e-7, 32)
    edit_weights(lambda weights: weights[UP][0].copy_(row))(folder)
    found = load_model(Source.parse(str(folder)))
    assert found.dtype == torch.float32
    assert torch.equal(found.get_parameter(UP)[0], row)


def test_float16_limit_itself_is_taken(tmp_path):
    _, folder = write(Kind(lambda _folder: None), tmp_path / "model")
    edit_weights(lambda weights: weights[UP][0, :1].fill_(65504.0))(folder)
    assert float(load_model(Source.parse(str(folder))).get_parameter(UP).max()) == 65504.0


# What is said of it


def test_provenance_names_the_account(tmp_path):
    _, folder = write(EXACT["FP8 blocks"], tmp_path / "model")
    found = account(Source.parse(str(folder))).provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["kind"] == "Hugging Face folder (LlamaForCausalLM)"
    assert found["tensors_used"] == 21 + 14  # 7 projections of 2 layers have scales
    assert "14 FP8 weights were dequantized" in found["remarks"][0]
    assert found["without_effect"]["initializer_range"] == "for new weights only"


def test_every_field_is_somewhere(tmp_path):
    _, folder = write(EXACT["fields of tools"], tmp_path / "model")
    found = account(Source.parse(str(folder)))
    named = {*found.settings, *found.without_effect, *found.not_understood}
    assert named == set(json.loads((folder / "config.json").read_text()))


def test_forgotten_fields_are_not_shipped(tmp_path):
    """A window that Llama does not have would make a sliding cache in transformers."""
    _, folder = write(EXACT["a window that the family never uses"], tmp_path / "model")
    config = load_model(Source.parse(str(folder))).config.to_dict()
    assert "sliding_window" not in config
    assert str(tmp_path) not in json.dumps(config, default=str)


def test_folder_without_tokenizer(tmp_path):
    _, folder = write(Kind(lambda _folder: None), tmp_path / "model")
    with pytest.raises(InputError, match=r"holds no tokenizer \(tokenizer.json\); copy it"):
        load_tokenizer(Source.parse(str(folder)))


def test_several_faults_are_counted(tmp_path):
    _, folder = write(Kind(edit_config(logit_scale=0.5, mup=True)), tmp_path / "model")
    with pytest.raises(InputError, match="1 more part is not understood either"):
        load_model(Source.parse(str(folder)))


def test_original_is_not_touched(tmp_path):
    _, folder = write(EXACT["own head under a tied configuration"], tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load_model(Source.parse(str(folder)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_paths_are_checked_without_torch(tmp_path):
    code = (
        "import sys\nfrom edkm_export.reference.source import Source\n"
        f"try:\n    Source.parse({str(tmp_path / 'gone')!r})\n"
        "except ValueError as error:\n    print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'gone'}: no such file or folder. False\n"


def test_trained_fixture():
    found = account(Source.parse(str(FIXTURES / "tiny-llama")))
    assert not found.not_understood and len(found.tensors) == 38


def test_own_head_is_seen_in_half_precision(tmp_path):
    """Head and embedding in two types are compared by value."""
    _, folder = write(
        Kind(edit_weights(own_head), settings={"tie_word_embeddings": True}), tmp_path / "model"
    )
    edit_weights(
        lambda weights: weights.update(
            {HEAD: weights["model.embed_tokens.weight"].bfloat16().float(),
             "model.embed_tokens.weight": weights["model.embed_tokens.weight"].bfloat16()}
        )
    )(folder)  # fmt: skip
    assert load_config(Source.parse(str(folder))).tie_word_embeddings


# Weights that are quantized already


def test_every_method_of_transformers_is_decided():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    decided = DEQUANTIZED.keys() | QUANTIZATIONS.keys()
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    assert known <= decided, "transformers reads a method of quantization that nothing here decides about"


def test_methods_are_documented():
    """The table of docs/sources.md has each method once, with what becomes of it."""
    text = (FIXTURES.parent / "docs" / "sources.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert {key: (name, what) for key, name, what in rows if key not in DEQUANTIZED} == {
        key: (name, f"refused: {why}") for key, (name, why) in QUANTIZATIONS.items()
    }
    found = {key: (name, what) for key, name, what in rows if key in DEQUANTIZED}
    assert {key: name for key, (name, _) in found.items()} == DEQUANTIZED
    assert all(what.startswith("dequantized") for _, what in found.values())


@pytest.mark.parametrize("name", ["FP8, one scale a weight", "Metal, 4 bits"])
def test_dequantized_weights_are_accounted_for(tmp_path, name):
    _, folder = write(EXACT[name], tmp_path / "model")
    found = account(Source.parse(str(folder)))
    assert "14 " in found.remarks[0] and "dequantized in float32" in found.remarks[0]
    apart = {each for each in found.without_effect if each.endswith(".activation_scale")}
    assert len(apart) == (14 if "FP8" in name else 0)
    stored = set(load_file(folder / "model.safetensors"))
    assert set(found.tensors) == stored - apart
