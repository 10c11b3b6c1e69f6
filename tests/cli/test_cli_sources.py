"""Sources through the command line: an own head, adapters, end tokens, `inspect`, and the first rung of `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from edkm_export import checkpoint
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.report import Report, Verdict
from tests.helpers.folder_kinds import HEAD, edit_config, edit_weights, own_head
from tests.helpers.odd_models import build, build_tokenizer, save
from tests.helpers.sampling import sampled

EMBEDDING = "model.embed_tokens.weight"
pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tied model with a tokenizer."""
    return save(build("plain"), tmp_path / "model")


@pytest.fixture
def untied(folder) -> Path:
    """The same with a head of its own, under a configuration that says tied."""
    edit_weights(own_head)(folder)
    return folder


def palettized(edkm, folder: Path, *options: object) -> checkpoint.Checkpoint:
    result = edkm("palettize", folder, "--recipe", "8bit", "-o", "model.pt", "--overwrite", *options)
    assert result.status == 0, result.err
    return checkpoint.load(Path("model.pt"))


def test_own_head_is_palettized(edkm, untied):
    made = palettized(edkm, untied)
    assert made.config["tie_word_embeddings"] is False and made.tied == {}
    heads = {name: made.palettized[name].decode().float() for name in (HEAD, EMBEDDING)}
    weights = {}
    edit_weights(weights.update)(untied)
    for name, found in heads.items():
        assert float((found - weights[name]).abs().max()) < 0.02
    model = load_hard_model(made)
    assert torch.equal(model.lm_head.weight, heads[HEAD])
    assert "stays a weight of its own" in " ".join(made.provenance["source"]["remarks"])


def test_equal_twin_stays_tied(edkm, folder):
    edit_weights(lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))(folder)
    made = palettized(edkm, folder)
    assert made.tied == {HEAD: EMBEDDING} and made.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("command", "module"), sampled([("onnx", "onnxruntime"), ("coreml", "coremltools")], 2, several=True)
)
def test_own_head_is_exported_and_verified(edkm, untied, command, module):
    pytest.importorskip(module)
    text = untied.parent / "text.txt"
    text.write_text("some words to read " * 400)
    made = palettized(edkm, untied, "--calibration", text, "--calibration-tokens", 32)
    sizes = ("--sequence-length", 64) if command == "coreml" else ()
    result = edkm(command, Path("model.pt").absolute(), "-o", "out", "--tokens", 128, "--text", text, *sizes)
    assert result.status == 0, result.out + result.err
    words = made.provenance["command"]
    assert words[2] == untied.name and words[words.index("--calibration") + 1] == "text.txt"
    shipped = [
        path for path in Path("out").rglob("*") if path.is_file()
    ]  # model.pt says where its original lies
    assert [path for path in shipped if str(untied.parent).encode() in path.read_bytes()] == []
    report = Report.model_validate_json(Path("out/report.json").read_text(encoding="utf-8"))
    first = report.rungs[0]
    assert first.id == "source" and first.verdict is Verdict.PASS, first
    assert "21 tensors and 18 settings used" in first.detail
    assert first.measures["sha256"].keys() == {"model.safetensors"} and not first.measures["not_understood"]
    assert report.provenance["source"]["kind"] == "Hugging Face folder (LlamaForCausalLM)"
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False
    texts = [
        edkm("generate", path, "--prompt", "ab", "--max-new-tokens", 8).out for path in ("model.pt", "out")
    ]
    assert texts[0] == texts[1] != "\n"


def test_own_head_is_trained(edkm, untied):
    Path("text.txt").write_text("some words to read " * 200)
    options = (
        "--steps",
        1,
        "--context",
        32,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--objective",
        "cross-entropy",
    )
    result = edkm("train", untied, "--data", "text.txt", "-o", "run", "--bits", 3, *options)
    assert result.status == 0, result.err
    made = checkpoint.load(Path("run/model.pt"))
    assert made.config["tie_word_embeddings"] is False and HEAD not in made.tied
    assert made.provenance["source"]["tensors_used"] == 21


def test_own_head_is_compared(edkm, untied):
    palettized(edkm, untied)
    result = edkm("compare", "model.pt", "--original", untied, "--tokens", 64, "--json")
    assert result.status == 0, result.err
    rows = json.loads(result.out)
    assert rows[1]["distance"]["kl_mean"] < 0.05


def test_source_that_changed_its_mind(edkm, folder):
    """A field that appears later: the weights are the same, and the model is another one."""
    pytest.importorskip("onnxruntime")
    palettized(edkm, folder)
    assert edkm("onnx", "model.pt", "-o", "out", "--no-verify").status == 0
    edit_config(logit_scale=0.5)(folder)
    result = edkm("verify", "model.pt", "out", "--tokens", 64, "--report", "report")
    assert result.status == 1
    first = Report.model_validate_json(Path("report/report.json").read_text(encoding="utf-8")).rungs[0]
    assert first.verdict is Verdict.FAIL and "not understood: logit_scale" in first.detail
    shutil.rmtree(folder)
    result = edkm("verify", "model.pt", "out", "--tokens", 64, "--report", "report")
    assert result.status == 0
    first = Report.model_validate_json(Path("report/report.json").read_text(encoding="utf-8")).rungs[0]
    assert first.verdict is Verdict.NOT_RUN
    assert "20 tensors and 18 settings were used and none was left over" in first.detail


# Adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        build("plain"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_is_merged(edkm, folder, adapter):
    plain, merged = palettized(edkm, folder), palettized(edkm, folder, "--adapter", adapter)
    changed = {
        name for name, tensor in plain.palettized.items() if not tensor.same_bits(merged.palettized[name])
    }
    assert changed == {
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    known = merged.provenance["base_model"]["adapter"]
    assert Path(known["reference"]) == adapter.absolute()
    assert "adapter_model.safetensors" in known["sha256"]
    assert "with a LoRA adapter" in merged.provenance["source"]["kind"]


def test_original_is_found_with_its_adapter(edkm, folder, adapter):
    pytest.importorskip("onnxruntime")
    palettized(edkm, folder, "--adapter", adapter)
    result = edkm("onnx", "model.pt", "-o", "out", "--tokens", 64)
    assert result.status == 0, result.out
    report = Report.model_validate_json(Path("out/report.json").read_text(encoding="utf-8"))
    assert "LoRA adapter" in report.rungs[0].detail and report.rungs[0].verdict is Verdict.PASS
    ratio = next(rung for rung in report.rungs if rung.id == "palettization").measures["kl_mean"]
    assert ratio < 0.05
    assert report.provenance["base_model"]["adapter"]["reference"] == "adapter"  # no folder above it
    words = ("compare", "model.pt", "--original", folder, "--tokens", 64, "--json")
    merged, plain = (
        json.loads(edkm(*words, *option).out)[1]["distance"]["kl_mean"]
        for option in (("--adapter", adapter), ())
    )
    assert merged < 0.05 < plain
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    edkm("verify", "model.pt", "out", "--tokens", 64, "--report", "report")
    first = Report.model_validate_json(Path("report/report.json").read_text(encoding="utf-8")).rungs[0]
    assert first.verdict is Verdict.NOT_RUN and "has changed since it was palettized" in first.detail


def test_adapter_that_was_not_asked_for(edkm, folder, adapter):
    result = edkm("palettize", adapter)
    assert result.status == 2 and f"add --adapter {adapter}" in result.message
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, folder)
    result = edkm("palettize", folder)
    assert result.status == 2 and f"to merge it add --adapter {folder}" in result.message
    assert not Path("model.pt").exists()


# End tokens


def ends_of(path: Path) -> object:
    return json.loads(path.read_text())["eos_token_id"]


@pytest.mark.parametrize(
    ("command", "module"), sampled([("onnx", "onnxruntime"), ("coreml", "coremltools")], 2, several=True)
)
def test_end_tokens_are_the_same_everywhere(edkm, folder, command, module):
    """Each of the three files names one."""
    pytest.importorskip(module)
    edit_config(eos_token_id=7)(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [5]}))
    made = palettized(edkm, folder)
    assert made.config["eos_token_id"] == [5, 7, 0]
    assert json.loads(made.tokenizer["generation_config.json"])["eos_token_id"] == [5, 7, 0]
    assert edkm(command, "model.pt", "-o", "out", "--no-verify").status == 0
    names = ["config.json", "generation_config.json"]
    for name in names:
        assert ends_of(Path("out") / name) == [5, 7, 0]
    if command == "onnx":
        assert json.loads(Path("out/genai_config.json").read_text())["model"]["eos_token_id"] == [5, 7, 0]


def test_no_end_token_is_made_up(edkm, folder):
    pytest.importorskip("onnxruntime")
    edit_config(eos_token_id=None, bos_token_id=None, pad_token_id=None)(folder)
    (folder / "generation_config.json").unlink()
    tokenizer = build_tokenizer(320)
    tokenizer.eos_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    palettized(edkm, folder)
    assert edkm("onnx", "model.pt", "-o", "out", "--no-verify").status == 0
    settings = json.loads(Path("out/genai_config.json").read_text())["model"]
    assert not {"eos_token_id", "bos_token_id", "pad_token_id"} & settings.keys()
    assert json.loads(Path("out/generation_config.json").read_text()).get("eos_token_id") is None


def test_chat_template_is_in_both_files(edkm, folder):
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    files = palettized(edkm, folder).tokenizer
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == tokenizer.chat_template
    assert files["chat_template.jinja"].decode() == tokenizer.chat_template


def test_several_chat_templates_are_kept(edkm, folder):
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(folder)
    files = palettized(edkm, folder).tokenizer
    Path("stored").mkdir()
    for name, content in files.items():
        (Path("stored") / name).write_bytes(content)
    found = transformers.AutoTokenizer.from_pretrained("stored", trust_remote_code=False)
    assert found.chat_template == tokenizer.chat_template


# inspect


def test_inspect_folder(edkm, folder):
    result = edkm("inspect", folder)
    assert result.status == 0, result.err
    for words in (
        "Hugging Face folder (LlamaForCausalLM)",
        "20 tensors and 18 settings are used, ",
        "model.layers.*.mlp.up_proj.weight",
        "2 tensors",
        "dropout acts in training only",
    ):
        assert words in result.out
    found = json.loads(edkm("inspect", folder, "--json").out)
    assert len(found["tensors"]) == 20 and found["not_understood"] == {}


def test_inspect_says_what_would_be_refused(edkm, folder):
    edit_config(logit_scale=0.5)(folder)
    result = edkm("inspect", folder)
    assert result.status == 2 and "logit_scale" in result.message and "not understood" in result.out
    result = edkm("inspect", folder, "--json")
    assert json.loads(result.out)["not_understood"].keys() == {"logit_scale"} and result.status == 2


def test_inspect_adapter(edkm, folder, adapter):
    result = edkm("inspect", adapter)
    assert result.status == 0, result.err
    assert "LoRA adapter" in result.out and "target_modules" in result.out
    result = edkm("inspect", folder, "--adapter", adapter)
    assert result.status == 0 and "with a LoRA adapter" in result.out and "adapter: r" in result.out


def test_inspect_still_knows_what_we_made(edkm, folder):
    pytest.importorskip("onnxruntime")
    palettized(edkm, folder)
    assert edkm("onnx", "model.pt", "-o", "out", "--no-verify").status == 0
    assert "ONNX folder" in edkm("inspect", "out").out
    assert "checkpoint" in edkm("inspect", "model.pt").out
