from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edkm_export.activity import Activity, watched_by
from edkm_export.errors import EdkmExportError, InputError
from edkm_export.reference.source import (
    Source,
    load_config,
    load_model,
    load_tokenizer,
    value_count,
)
from edkm_export.reference.tokenizer_files import tokenizer_files
from tests.helpers.gguf_kinds import KINDS
from tests.helpers.odd_models import build, save


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder that a test may spoil."""
    return save(build("untied"), tmp_path / "model")


def refused(action: Callable[[], object], named: object) -> str:
    """The message of the refusal: one line that names what was given."""
    with pytest.raises(EdkmExportError) as caught:
        action()
    message = str(caught.value)
    assert message.startswith(f"{named}: ") and "\n" not in message
    return message


# Telling the forms apart


def test_folder_is_a_source(folder, monkeypatch):
    source = Source.parse(str(folder))
    assert (source.reference, source.location, source.gguf_file) == (str(folder), str(folder), None)
    assert source.is_local and source.weight_files() == [folder / "model.safetensors"]
    monkeypatch.chdir(folder.parent)
    assert Source.parse("model").location == str(folder)  # holds after a change of the working folder


def test_gguf_file_is_a_source(tmp_path):
    (tmp_path / "model.Q4_0.GGUF").write_bytes(b"GGUF")
    source = Source.parse(str(tmp_path / "model.Q4_0.GGUF"))
    assert (source.location, source.gguf_file) == (str(tmp_path), "model.Q4_0.GGUF")
    assert source.weight_files() == [tmp_path / "model.Q4_0.GGUF"]


@pytest.mark.parametrize("reference", ["openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_hub_id_is_a_source(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Source.parse(reference)
    assert source.location == reference and not source.is_local and source.weight_files() == []
    assert source.provenance() == {"reference": reference, "sha256": {}}


@pytest.mark.parametrize("reference", ["./gone", "/gone/model", "a/b/c", "~/model"])
def test_path_to_nothing_is_not_taken_for_a_hub_id(reference):
    assert "no such file or folder" in refused(lambda: Source.parse(reference), reference)


def test_folder_without_configuration(tmp_path):
    assert "holds no config.json" in refused(lambda: Source.parse(str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("model.safetensors", ".safetensors file"), ("model", "plain file")]
)
def test_file_of_another_kind(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"")
    message = refused(lambda: Source.parse(str(tmp_path / name)), tmp_path / name)
    assert f"expected a Hugging Face folder, a hub id or a .gguf file, not a {kind}" in message


def test_checkpoint_is_told_from_a_model(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    message = refused(lambda: Source.parse(str(tmp_path / "model.pt")), tmp_path / "model.pt")
    assert "It looks like a finished checkpoint: `" in message and message.endswith("` takes it.")


def test_provenance_identifies_the_weights(folder, monkeypatch):
    content = (folder / "model.safetensors").read_bytes()
    monkeypatch.chdir(folder.parent)
    assert Source.parse("model").provenance() == {
        "reference": str(folder),
        "sha256": {"model.safetensors": hashlib.sha256(content).hexdigest()},
    }


# Loading


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_model_is_loaded_in_the_type_that_it_is_stored_in(tmp_path, stored, loaded):
    model = build("plain").to(stored)
    found = load_model(Source.parse(str(save(model, tmp_path / "model"))))
    assert found.dtype == loaded and not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(loaded))


def test_model_is_loaded_in_the_dtype_that_is_asked_for(folder):
    assert load_model(Source.parse(str(folder)), torch.float32).dtype == torch.float32


def test_configuration_and_tokenizer(folder):
    source = Source.parse(str(folder))
    assert load_config(source).model_type == "llama"
    assert load_tokenizer(source)("ab")["input_ids"]


def test_tokenizer_files_hold_no_paths(folder):
    source = Source.parse(str(folder))
    files = tokenizer_files(load_tokenizer(source), load_model(source))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files.keys()
    assert "config.json" not in files  # the checkpoint has its own
    assert not any(str(folder.parent).encode() in content for content in files.values())
    settings = json.loads(files["tokenizer_config.json"])
    assert not {"name_or_path", "tokenizer_file", "vocab_file"} & settings.keys()


def test_tokenizer_survives_being_stored(folder, tmp_path):
    import transformers

    source = Source.parse(str(folder))
    tokenizer = load_tokenizer(source)
    (tmp_path / "stored").mkdir()
    for name, content in tokenizer_files(tokenizer, load_model(source)).items():
        (tmp_path / "stored" / name).write_bytes(content)
    (tmp_path / "stored" / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "stored")
    text = "Plain words, naïve “quotes” 🙂"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


# Models that are broken


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN_MODELS: dict[str, Callable[[Path], None]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights are a pickle": lambda folder: (
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None
    ),
    "weights are empty": write("model.safetensors", b""),
    "weights are garbage": write("model.safetensors", b"garbage " * 20),
    "weights lose their end": truncate("model.safetensors", 20_000),
    "weights lose their header": truncate("model.safetensors", 20),
    "header of 2**63 bytes": write("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
    "configuration is empty": write("config.json", b""),
    "configuration is cut": truncate("config.json", 50),
    "configuration is a list": write("config.json", b"[]"),
    "configuration is not text": write("config.json", b"\xff\xfe\x00"),
    "no model type": edit_config(model_type=None),
    "unknown model type": edit_config(model_type="no_such_model"),
    "size is text": edit_config(hidden_size="32"),
    "no heads": edit_config(num_attention_heads=0),
    "other size than the weights": edit_config(intermediate_size=64),
    "misshapen parameter": edit_weights(lambda weights: weights.update({UP: torch.zeros(47, 32)})),
    "missing parameter": edit_weights(lambda weights: weights.pop(UP)),
    "missing norm": edit_weights(lambda weights: weights.pop("model.norm.weight")),
    "a layer too few": edit_config(num_hidden_layers=3),
    "a layer too many": edit_config(num_hidden_layers=1),
    "parameter of another model": edit_weights(
        lambda weights: weights.update({"model.extra.weight": torch.zeros(3)})
    ),
}


@pytest.mark.parametrize("damage", BROKEN_MODELS)
def test_broken_model_is_refused(folder, damage):
    """Above all, parameters that are missing must not be made up."""
    source = Source.parse(str(folder))
    load_model(source)
    BROKEN_MODELS[damage](folder)
    refused(lambda: load_model(source), folder)


def test_message_says_what_to_check(folder):
    (folder / "model.safetensors").unlink()
    message = refused(lambda: load_model(Source.parse(str(folder))), folder)
    assert "check that the folder holds config.json, *.safetensors and the tokenizer of one model" in message


BROKEN_TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "empty": write("tokenizer.json", b""),
    "cut": truncate("tokenizer.json", 500),
    "garbage": write("tokenizer.json", b"garbage"),
    "another object": write("tokenizer.json", b'{"version": "1.0", "model": {"type": "Abacus"}}'),
    "settings are cut": truncate("tokenizer_config.json", 20),
}


@pytest.mark.parametrize("damage", BROKEN_TOKENIZERS)
def test_broken_tokenizer_is_refused(folder, damage):
    source = Source.parse(str(folder))
    load_tokenizer(source)
    BROKEN_TOKENIZERS[damage](folder)
    refused(lambda: load_tokenizer(source), folder)


def test_remote_code_is_not_run(folder, tmp_path):
    """A model folder may bring Python of its own; it is not imported unless the user asks for it."""
    proof = tmp_path / "proof"
    code = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    (folder / "modeling_mine.py").write_text(code)
    (folder / "configuration_mine.py").write_text(code)
    edit_config(
        model_type="mine",
        auto_map={
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
            "AutoTokenizer": ["modeling_mine.MineTokenizer", None],
        },
    )(folder)
    source = Source.parse(str(folder))
    for action in (load_config, load_model):
        refused(lambda action=action: action(source), folder)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"garbage " * 10])
def test_broken_gguf_file_is_refused(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    refused(lambda: load_model(Source.parse(str(tmp_path / "model.gguf"))), tmp_path / "model.gguf")


def test_model_that_is_not_there_and_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: load_model(Source.parse("nobody/no-such-model")), "nobody/no-such-model")
    assert "no such folder here, and the hub https://huggingface.co cannot be reached" in message


def test_folder_may_hold_shards(folder):
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    source = Source.parse(str(folder))
    assert [path.name for path in source.weight_files()] == sorted(parts)
    assert torch.equal(load_model(source, torch.float32).state_dict()[UP], whole[UP])
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: load_model(source), folder)


def test_copy_of_a_folder_has_the_same_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first, second = (Source.parse(str(path)).provenance() for path in (folder, tmp_path / "copy"))
    assert first["sha256"] == second["sha256"] and first["reference"] != second["reference"]


def test_errors_are_input_errors(folder):
    with pytest.raises(InputError):
        Source.parse(str(folder / "gone"))


def test_a_folder_is_read_without_a_word(tiny_llama, capfd):
    load_model(Source.parse(str(tiny_llama)))
    assert capfd.readouterr() == ("", "")


def test_what_the_caller_draws_while_a_file_is_read_is_seen(tmp_path, capfd):
    """A progress bar on standard error moves while the weights are read."""
    kind = KINDS["llama"]
    source = Source.parse(str(kind.write(kind.model(), tmp_path)))
    load_model(source, advance=lambda count: print(count, file=sys.stderr))
    shown = [int(line) for line in capfd.readouterr().err.splitlines()]
    assert len(shown) > 1 and sum(shown) == value_count(source)


def test_reading_a_gguf_file_is_counted(tmp_path):
    """Whoever watches sees every value, whichever command reads it."""
    kind = KINDS["llama"]
    source = Source.parse(str(kind.write(kind.model(), tmp_path)))
    seen: list[Activity] = []

    class Watcher:
        def began(self, activity: Activity) -> None:
            seen.append(activity)

        def renamed(self, activity: Activity) -> None:
            pass

        def ended(self, activity: Activity) -> None:
            pass

    with watched_by(Watcher()):
        load_model(source)
    (reading,) = (each for each in seen if each.words.startswith("reading "))
    assert reading.total == reading.done == value_count(source)
