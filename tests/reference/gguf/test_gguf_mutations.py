"""No single change of a file makes another model without a word.

Each key of several files is changed, left out or added, and each tensor left out or added. The file is then refused; or
its logits stay what they were; or they change because the value is used, and the configuration shows it. Where
llama.cpp is installed, it says the same of all that is not refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.reference import llamacpp
from edkm_export.reference.account import Account
from edkm_export.reference.gguf.gguf_model import read_gguf
from tests.helpers.gguf_kinds import KINDS, LLAMA3, YARN, Kind, rope
from tests.helpers.gguf_models import divergence, log_probabilities, text
from tests.helpers.gguf_mutations import key_mutations, tensor_mutations
from tests.helpers.gguf_newer_kinds import NEWER
from tests.helpers.gguf_writer import Content, write
from tests.helpers.sampling import sampled

FILES = {
    "llama": Kind("llama", {"attention_bias": True}),
    "llama 3.2": Kind("llama", {"tie_word_embeddings": True, **rope("llama3", factor=32.0, **LLAMA3)}),
    "llama, yarn": Kind("llama", YARN),
    "llama, longrope": KINDS["llama, longrope"],
    "qwen2": KINDS["qwen2, linear"],
    "qwen3": KINDS["qwen3, tied"],
    "phi3": KINDS["phi3, half of a head rotates"],
    "gemma2": KINDS["gemma2"],
    "gemma3": KINDS["gemma3"],
    "gpt2": KINDS["gpt2"],
}
NEWER_FILES = {
    "cohere2": NEWER["cohere2"],
    "exaone4": NEWER["exaone4"],
    "granite": NEWER["granite, tied"],
    "hunyuan": NEWER["hunyuan"],
    "lfm2": NEWER["lfm2"],
    "ministral3": NEWER["ministral3"],
    "olmo3": NEWER["olmo3, yarn"],
    "qwen35": NEWER["qwen35"],
    "smollm3": NEWER["smollm3"],
    "stablelm": NEWER["stablelm"],
    "starcoder2": NEWER["starcoder2"],
}
CASES = [*sampled(FILES, 4), *(pytest.param(name, marks=pytest.mark.slow) for name in NEWER_FILES)]
FILES |= NEWER_FILES
TOKENS = text(24)
# Tensors whose absence or presence means another model, in llama.cpp too, and what the configuration says of it.
MEANING = {
    "output.weight": "tie_word_embeddings",
    "rope_freqs.weight": "rope_parameters",
    "blk.0.attn_output.bias": "attention_bias",
}
# (file, key): where llama.cpp reads a key and computes otherwise, and why ours is the model's own way.
LLAMACPP_DIFFERS = {
    ("phi3", "phi3.attention.sliding_window"): "llama.cpp leaves the window of Phi-3 out, and warns of it",
    ("llama, longrope", "llama.rope.scaling.original_context_length"): (
        "llama.cpp chooses long or short factors by the context that is asked for, at least 256, not by the text"
    ),
}


@dataclass(frozen=True)
class Outcome:
    """A changed file that was not refused."""

    account: Account
    config: dict[str, Any]
    logits: torch.Tensor


def outcome(made: Content, path: Path) -> Outcome | None:
    """None when it is refused, which must be in one line that names the file."""
    write(made, path)
    try:
        read = read_gguf(path)
        model = read.load_model(torch.float32)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return None
    return Outcome(read.account(), model.config.to_dict(), log_probabilities(model, TOKENS))


def numbers(value: Any) -> Iterator[float]:
    """Every number in a configuration."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, (int, float)):
        yield float(value)


def shown(value: Any, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """The configuration says another thing, and a number is in it: as it is, as a part of a head, or as a factor."""
    if before == after:
        return False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    head = (
        after.get("head_dim")
        or after.get("n_embd", 0)
        or after["hidden_size"] // after["num_attention_heads"]
    )
    ratios = [new / old for new, old in zip(numbers(after), numbers(before), strict=False) if old]
    return any(
        math.isclose(each, wanted, rel_tol=1e-6, abs_tol=1e-5)  # float32 in the file
        for each in (*numbers(after), *ratios)
        for wanted in (value, value / head)
    )


@pytest.mark.parametrize("name", CASES)
def test_changed_key(name, tmp_path):
    kind = FILES[name]
    made = kind.content(kind.model())
    original = outcome(made, tmp_path / "original.gguf")
    assert original is not None
    seen = {"refused": 0, "same": 0, "shown": 0}
    for label, key, value, changed in key_mutations(made):
        found = outcome(changed, tmp_path / "changed.gguf")
        if found is None:
            seen["refused"] += 1
            continue
        if value is not None:
            assert key in found.account.settings or key in found.account.without_effect, label
        if torch.equal(found.logits, original.logits):
            seen["same"] += 1
            continue
        assert key not in found.account.without_effect, label
        assert shown(value, original.config, found.config), label
        seen["shown"] += 1
    assert min(seen.values()) > 0 and sum(seen.values()) > 60, seen


@pytest.mark.parametrize("name", CASES)
def test_changed_tensor(name, tmp_path):
    kind = FILES[name]
    made = kind.content(kind.model())
    original = outcome(made, tmp_path / "original.gguf")
    assert original is not None
    for label, tensor, changed in tensor_mutations(made):
        found = outcome(changed, tmp_path / "changed.gguf")
        if found is None:
            continue
        assert tensor in MEANING, label
        assert found.config[MEANING[tensor]] != original.config[MEANING[tensor]], label
        assert not torch.equal(found.logits, original.logits), label


@pytest.mark.llamacpp
@pytest.mark.slow
@pytest.mark.skipif(llamacpp.available() is None, reason=f"llama.cpp is missing: {llamacpp.INSTALL}")
@pytest.mark.parametrize("name", FILES)
def test_llamacpp_says_the_same_of_changed_files(name, tmp_path):
    """Of every change that is not refused here. What llama.cpp itself refuses is no other reading."""
    kind = FILES[name]
    made = kind.content(kind.model())
    wrong, compared = [], 0
    changes = [(label, key, changed) for label, key, _, changed in key_mutations(made)]
    changes += list(tensor_mutations(made))
    for label, key, changed in changes:
        if key.startswith(("general.", "tokenizer.")) or (name, key) in LLAMACPP_DIFFERS:
            continue  # nothing that llama.cpp computes with, or known
        found = outcome(changed, tmp_path / "changed.gguf")
        if found is None:
            continue
        try:
            expected = llamacpp.log_probabilities(tmp_path / "changed.gguf", TOKENS[0].tolist(), cache="F32")
        except InputError:
            continue
        compared += 1
        if divergence(expected, found.logits) > 2e-5:
            wrong.append(label)
    assert compared and not wrong
