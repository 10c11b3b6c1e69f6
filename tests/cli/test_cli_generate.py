from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edkm_export.artifact.generation import generate
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.torch_session import TorchSession
from tests.helpers.onnx_models import export

PROMPT = "The house on the hill"
TOKENS = 24


@pytest.fixture(scope="module")
def onnx_folder(tiny_checkpoint, tmp_path_factory) -> Path:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("onnx") / "tiny-onnx")


@pytest.fixture(scope="module")
def expected(tiny_checkpoint) -> str:
    """What transformers writes: its own `generate` and its own decoding."""
    model, tokenizer = load_hard_model(tiny_checkpoint), load_hard_tokenizer(tiny_checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=0, pad_token_id=0)
    prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
    return tokenizer.decode(made[0], skip_special_tokens=True)[len(prompt) :]


def test_checkpoint(edkm, tiny_checkpoint, expected):
    result = edkm("generate", tiny_checkpoint.path, "--prompt", PROMPT, "--max-new-tokens", TOKENS)
    assert result.status == 0, result.err
    assert result.out == expected + "\n"
    assert f"text: {TOKENS} tokens, " in result.err and "tokens/s; --max-new-tokens reached" in result.err
    assert "prompt: " in result.err and "prompt" not in result.out


@pytest.mark.parametrize("form", ["", "onnx/model.onnx"])
def test_onnx_folder(edkm, onnx_folder, expected, form):
    result = edkm("generate", onnx_folder / form, "--prompt", PROMPT, "--max-new-tokens", TOKENS)
    assert result.status == 0, result.err
    assert result.out == expected + "\n"


def test_core_ml_bundle(edkm, tiny_export, tiny_checkpoint):
    """A step of the interpreter takes longer, so that a few tokens must do."""
    pytest.importorskip("coremltools")
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 6)
    result = edkm("generate", tiny_export.bundle, *arguments)
    assert result.status == 0, result.err
    assert result.out == edkm("generate", tiny_checkpoint.path, *arguments).out


def test_text_streams(onnx_folder):
    """The first words are out while the rest is still being written: a reader that leaves early ends it."""
    command = [sys.executable, "-m", "edkm_export", "generate", str(onnx_folder)]
    process = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-new-tokens", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.read(4)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(60) == 0 and len(first) == 4
    assert "Traceback" not in error and "tokens/s" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(edkm, onnx_folder, monkeypatch, number):
    from converters.onnx.read.session import OnnxSession

    calls, real = 0, OnnxSession.feed

    def feed(self: OnnxSession, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(number)
        return real(self, tokens)

    monkeypatch.setattr(OnnxSession, "feed", feed)
    result = edkm("generate", onnx_folder, "--prompt", PROMPT)
    assert result.status == 130 and result.message == "interrupted; nothing was left behind."
    assert result.out.endswith("\n") and len(result.out) > 4  # what was written so far, on a line of its own


def test_context_that_is_full(edkm, onnx_folder):
    result = edkm("generate", onnx_folder, "--prompt", "word " * 240, "--max-new-tokens", 1000)
    assert result.status == 0, result.err
    assert "its context is full: the model cannot go on (512 positions)" in result.err.replace("\n", " ")


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_prompt_that_is_too_long(edkm, onnx_folder, tiny_checkpoint, kind):
    path = onnx_folder if kind == "onnx" else tiny_checkpoint.path
    result = edkm("generate", path, "--prompt", "word " * 600)
    assert result.status == 2 and result.out == ""
    assert "but the context holds 512; shorten it" in result.message


def test_drawing(edkm, onnx_folder, tiny_checkpoint):
    """The same seed draws the same tokens from the same distribution, in either format."""
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 16, "--temperature", 0.9, "--top-p", 0.9)
    first = edkm("generate", onnx_folder, *arguments, "--seed", 5).out
    assert first == edkm("generate", onnx_folder, *arguments, "--seed", 5).out
    assert first == edkm("generate", tiny_checkpoint.path, *arguments, "--seed", 5).out
    assert first != edkm("generate", onnx_folder, *arguments, "--seed", 6).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: gives no tokens"),
        (["--prompt", "\udce4"], "--prompt: is not valid text"),
        (["--prompt", "a", "--chat"], "has no chat template; leave --chat out"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "top-p is 0.0"),
    ],
)
def test_mistakes(edkm, onnx_folder, arguments, message):
    result = edkm("generate", onnx_folder, *arguments)
    assert result.status == 2 and message in result.message and result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--prompt'"),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p is for drawing at random; add --temperature"),
        (["--prompt", "a", "--seed", "5"], "--seed is for drawing at random; add --temperature"),
        (["--prompt", "a", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage(edkm, onnx_folder, arguments, message):
    result = edkm("generate", onnx_folder, *arguments)
    assert result.status == 2 and message in result.err and "Traceback" not in result.err


def test_nothing_there(edkm, tmp_path):
    result = edkm("generate", tmp_path / "nothing", "--prompt", "a")
    assert result.status == 2 and "no such file or folder" in result.message


def test_folder_without_tokenizer(edkm, onnx_folder, tmp_path):
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "folder"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    result = edkm("generate", folder, "--prompt", "a")
    assert result.status == 2 and f"{folder}: holds no tokenizer" in result.message


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_tokenizer(edkm, onnx_folder, tmp_path, content):
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "folder"))
    (folder / "tokenizer.json").write_bytes(content)
    result = edkm("generate", folder, "--prompt", "a")
    assert result.status == 2 and f"{folder}: its tokenizer cannot be read" in result.message


def with_template(folder: Path, target: Path, template: str) -> Path:
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(template)
    return target


def test_chat(edkm, onnx_folder, tiny_checkpoint, tmp_path):
    """The template's own text is what is continued; special tokens in it stay special tokens."""
    template = (
        "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = with_template(onnx_folder, tmp_path / "chat", template)
    result = edkm("generate", folder, "--prompt", "Hello", "--chat", "--max-new-tokens", 12)
    assert result.status == 0, result.err
    tokenizer = load_hard_tokenizer(tiny_checkpoint)
    ids = torch.tensor(tokenizer("<user> Hello\n<assistant>").input_ids)
    made = generate(TorchSession(load_hard_model(tiny_checkpoint)), ids, max_new_tokens=12)
    assert result.out == tokenizer.decode(made.tokens) + "\n"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_chat_template_that_fails(edkm, onnx_folder, tmp_path, template):
    folder = with_template(onnx_folder, tmp_path / "chat", template)
    result = edkm("generate", folder, "--prompt", "Hello", "--chat")
    assert result.status == 2 and "its chat template fails" in result.message


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_of_the_folder(edkm, onnx_folder, expected, tmp_path, file, tiny_checkpoint):
    """The third token of the text is declared to end it."""
    full = edkm("generate", onnx_folder, "--prompt", PROMPT, "--max-new-tokens", 3).out
    tokenizer = load_hard_tokenizer(tiny_checkpoint)
    ids = torch.tensor(tokenizer(PROMPT).input_ids)
    tokens = generate(TorchSession(load_hard_model(tiny_checkpoint)), ids, max_new_tokens=3).tokens
    assert tokens[2] not in tokens[:2]
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "folder"))
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, "eos_token_id": [tokens[2]]}))
    result = edkm("generate", folder, "--prompt", PROMPT)
    assert result.out == tokenizer.decode(tokens[:2]) + "\n" and full.startswith(result.out[:-1])
    assert "the model ended its text" in result.err.replace("\n", " ")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings(edkm, onnx_folder, tmp_path, content):
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "folder"))
    (folder / "generation_config.json").write_text(content)
    result = edkm("generate", folder, "--prompt", "a")
    assert result.status == 2 and result.message.startswith(
        f"{folder / 'generation_config.json'}: is no JSON"
    )


# Stop texts


def test_stop_text_that_spans_tokens(edkm, onnx_folder, expected):
    """It begins and ends within tokens, and neither it nor what comes after it is printed."""
    cut = expected[7:12]
    place = expected.index(cut)
    arguments = (onnx_folder, "--prompt", PROMPT, "--max-new-tokens", TOKENS)
    result = edkm("generate", *arguments, "--stop", "never in this text", "--stop", cut)
    assert result.status == 0, result.err
    assert result.out == expected[:place] + "\n" and "a --stop text came" in result.err
    result = edkm("generate", *arguments, "--stop", "never in this text")
    assert result.out == expected + "\n"


def test_empty_stop_text(edkm, onnx_folder):
    result = edkm("generate", onnx_folder, "--prompt", PROMPT, "--stop", "")
    assert result.status == 2 and "--stop: is empty" in result.message and result.out == ""


# Conversations

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def talks(onnx_folder, tmp_path, edkm, monkeypatch):
    """Hold a conversation: lines of standard input, then options."""
    folder = with_template(onnx_folder, tmp_path / "chat", TEMPLATE)

    def talk(lines: str, *options: object):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return edkm("generate", folder, "--chat", *options)

    return talk


def test_conversation(talks, tiny_checkpoint):
    """Each answer is that of transformers to all turns so far, and the cache is not read anew."""
    model, tokenizer = load_hard_model(tiny_checkpoint), load_hard_tokenizer(tiny_checkpoint)
    result = talks("Hello\n\nWho are you?\nAnd then?\n", "--max-new-tokens", 8)
    assert result.status == 0, result.err
    answers = result.out.removesuffix("\n").split("\n")
    text, expected = "", []
    for said in ("Hello", "Who are you?", "And then?"):
        text += f"<user> {said}\n<assistant> "
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        made = generate(TorchSession(model), ids, max_new_tokens=8, stop=[tokenizer.eos_token_id])
        answer = tokenizer.decode(made.tokens, skip_special_tokens=True)
        expected += answer.split("\n")
        text += f"{answer}\n"
    assert answers == expected
    assert result.err.count("; text: ") == 3


def test_first_turn_of_a_conversation_by_option(talks):
    """Without a terminal the option is the only turn: a script does not wait for its standard input."""
    result = talks("more\n", "--prompt", "Hello", "--max-new-tokens", 4)
    assert result.status == 0 and result.err.count("; text: ") == 1


def test_conversation_without_a_turn(talks):
    result = talks("")
    assert (result.status, result.out) == (0, "")


@pytest.mark.slow
def test_conversation_that_outgrows_the_context(talks):
    """The oldest turns are forgotten, and that is said; one turn that does not fit alone is refused."""
    result = talks("\n".join(["word " * 100] * 5), "--max-new-tokens", 4)
    assert result.status == 0, result.err
    assert result.err.count("; text: ") == 5
    assert "the context of 512 positions is full: the first 2 of the turns so far are forgotten" in result.err
    result = talks("word " * 600)
    assert result.status == 2 and "but the context holds 512; shorten it" in result.message


# Packages without a cache


def test_warning_before_a_package_without_a_cache(edkm, tiny_checkpoint, tmp_path):
    pytest.importorskip("coremltools")
    folder = tmp_path / "logits"
    options = ("--interface", "LOGITS", "--sequence-length", 16, "--no-verify")
    assert edkm("coreml", tiny_checkpoint.path, "-o", folder, *options).status == 0
    result = edkm("generate", folder, "--prompt", "The house", "--max-new-tokens", 2)
    assert result.status == 0, result.err
    assert f"warning: {folder} has no cache" in result.err and "which is slow" in result.err
    assert "edkm-export coreml MODEL.PT --interface swift-transformers" in result.err
    quiet = edkm("generate", folder, "--prompt", "The house", "--max-new-tokens", 2, "--quiet")
    assert quiet.out == result.out and quiet.err == ""
