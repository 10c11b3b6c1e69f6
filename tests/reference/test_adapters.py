"""LoRA adapters: what is merged computes what peft computes with the adapter beside the base."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edkm_export.errors import BackendMissingError, EdkmExportError, InputError
from edkm_export.reference.adapters import Adapter
from edkm_export.reference.source import Source, account, load_model, load_tokenizer
from tests.helpers import odd_families, odd_models

peft = pytest.importorskip("peft")

TOKENS = torch.arange(3, 51)[None] * 7 % 96
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": PROJECTIONS}),
    "rank-stabilized": (
        "llama",
        {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": PROJECTIONS},
    ),
    "DoRA": ("llama", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": PROJECTIONS}),
    "ranks of layers": (
        "llama",
        {
            "r": 2,
            "target_modules": PROJECTIONS,
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {"q_proj": 3},
            "layers_to_transform": [1],
        },
    ),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "head of a tied model": ("qwen2", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "embedding of a tied model": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "whole head of a tied model": (
        "qwen3",
        {"r": 4, "target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]},
    ),
    "norms": ("gemma2", {"r": 4, "target_modules": PROJECTIONS, "modules_to_save": ["input_layernorm"]}),
    "biases": ("llama: odd", {"r": 4, "target_modules": PROJECTIONS, "bias": "lora_only"}),
}


def train(base: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Save an adapter with random weights; returns the logits of peft's own model, not merged."""
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(input_ids=TOKENS, use_cache=False).logits[0]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits[0]


@pytest.fixture
def base(tmp_path) -> Path:
    odd_families.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    train(odd_families.build("llama"), tmp_path / "adapter", r=4, target_modules=PROJECTIONS)
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", CASES)
def test_merged_model_is_that_of_peft(tmp_path, name):
    case, settings = CASES[name]
    odd_families.build(case).save_pretrained(tmp_path / "base")
    expected = train(odd_families.build(case), tmp_path / "adapter", **settings)
    source = Source.parse(str(tmp_path / "base"), str(tmp_path / "adapter"))
    found = load_model(source)
    assert found.dtype == torch.float32 and type(found) is type(odd_families.build(case))
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    plain = logits(load_model(Source.parse(str(tmp_path / "base"))))
    assert float((plain - expected).abs().max()) > 0.1  # the adapter does something
    assert not any("lora" in key for key in found.state_dict())


@pytest.mark.parametrize(
    ("name", "tied"),
    [("LoRA", False), ("head of a tied model", False), ("embedding of a tied model", False), ("norms", True)],
)
def test_configuration_says_whether_the_head_is_tied(tmp_path, name, tied):
    case, settings = CASES[name]
    odd_families.build(case).save_pretrained(tmp_path / "base")
    train(odd_families.build(case), tmp_path / "adapter", **settings)
    found = load_model(Source.parse(str(tmp_path / "base"), str(tmp_path / "adapter")))
    assert found.config.tie_word_embeddings == tied
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied


def test_account_and_provenance(base, adapter):
    source = Source.parse(str(base), str(adapter))
    found = account(source)
    assert not found.not_understood and found.kind.endswith("with a LoRA adapter")
    assert found.settings["adapter: r"] == 4
    assert sum(name.startswith("adapter: ") for name in found.tensors) == 2 * 3 * 2
    known = source.provenance()["adapter"]
    assert known["reference"] == str(adapter) and known["sha256"].keys() == {"adapter_model.safetensors"}


def test_adapter_beside_its_base(base, adapter):
    expected = logits(load_model(Source.parse(str(base), str(adapter))))
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, base)
    with pytest.raises(InputError, match=f"to merge it add --adapter {base}"):
        Source.parse(str(base))
    torch.testing.assert_close(logits(load_model(Source.parse(str(base), str(base)))), expected)


def test_adapter_alone(base, adapter, monkeypatch):
    with pytest.raises(InputError, match=f"give its base model as MODEL and add --adapter {adapter}"):
        Source.parse(str(adapter))
    with pytest.raises(InputError, match="is no folder here; give the base model as MODEL"):
        Source.parse(str(adapter), str(adapter))
    edit(adapter, base_model_name_or_path=str(base))
    found = Source.parse(str(adapter), str(adapter))
    assert found.location == str(base)
    load_model(found)


def test_hub_id_of_the_base_is_not_fetched(adapter):
    edit(adapter, base_model_name_or_path="somebody/some-model")
    with pytest.raises(InputError, match="its base model 'somebody/some-model' is no folder here"):
        Source.parse(str(adapter), str(adapter))


def test_tokenizer_of_the_adapter_is_taken(base, adapter):
    odd_models.build_tokenizer(300).save_pretrained(base)
    odd_models.build_tokenizer(310).save_pretrained(adapter)
    assert len(load_tokenizer(Source.parse(str(base), str(adapter)))) == 310
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert len(load_tokenizer(Source.parse(str(base), str(adapter)))) == 300


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


LORA_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "kind": (lambda folder: edit(folder, peft_type="IA3"), "'IA3'"),
    "unknown setting": (lambda folder: edit(folder, magic=3), "magic: is 3"),
    "replicated layers": (
        lambda folder: edit(folder, layer_replication=[[0, 2], [0, 2]]),
        "layer_replication",
    ),
    "base is changed too": (
        lambda folder: edit(folder, init_lora_weights="pissa"),
        "init_lora_weights: is 'pissa'",
    ),
    "activated by tokens": (
        lambda folder: edit(folder, alora_invocation_tokens=[1]),
        "alora_invocation_tokens",
    ),
    "tensor lost": (lambda folder: edit_weights(folder, lambda weights: weights.pop(LORA_A)), "is missing"),
    "tensor of another model": (
        lambda folder: edit_weights(
            folder,
            lambda weights: weights.update({LORA_A.replace("layers.0", "layers.5"): torch.zeros(4, 48)}),
        ),
        "fits no layer",
    ),
    "shape of another model": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({LORA_A: torch.zeros(4, 47)})),
        "size mismatch",
    ),
    "damaged": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 50), "damaged"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "no JSON"),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "safe_serialization=True",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "so it is no adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(base, adapter, name):
    change, words = REFUSED[name]
    change(adapter)
    with pytest.raises(EdkmExportError) as caught:
        load_model(Source.parse(str(base), str(adapter)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value) or str(base) in str(caught.value)


def test_peft_is_not_installed(base, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    source = Source.parse(str(base), str(adapter))
    with pytest.raises(BackendMissingError, match=r"pip install 'edkm-export\[peft\]'"):
        load_model(source)
    load_model(Source.parse(str(base)))
    assert Adapter.open(str(adapter)).base() is None
