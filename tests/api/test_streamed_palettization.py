"""Palettization of a model that is read layer by layer gives the checkpoint of one that is read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.api.calibration_data import CalibrationInput
from edkm_export.api.one_shot import palettize_language_model
from edkm_export.api.subjects import SourceSubject
from edkm_export.checkpoint import Checkpoint
from edkm_export.memory_budget import MemoryBudget
from edkm_export.recipe import load_recipe
from edkm_export.reference import source as sources
from edkm_export.reference.source import Source
from edkm_export.reference.streamed_model import streamed_weights
from tests.helpers import odd_families
from tests.helpers.gguf_models import tiny
from tests.helpers.gguf_writer import content, write
from tests.helpers.odd_models import build_tokenizer
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled

TEXT = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")


def palettized(source: Source, memory: MemoryBudget | None) -> tuple[Checkpoint, Any]:
    done = palettize_language_model(
        SourceSubject(source),
        load_recipe("3bit" if source.gguf_file else "4bit"),
        calibration=CalibrationInput("words", text=TEXT),
        calibration_tokens=96,
        estimate=True,
        command=(),
        memory=memory,
    )
    return done.checkpoint, done.estimate


def assert_same(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    own = sources.load_model

    def load(*arguments: Any, **named: Any) -> Any:
        loaded.append(own(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(sources, "load_model", load)
    whole, expected = palettized(source, None)
    streamed, found = palettized(source, MemoryBudget(1, asked=True))
    assert streamed_weights(loaded[0]) is None and streamed_weights(loaded[1]) is not None
    assert sum(not parameter.is_meta for parameter in loaded[1].parameters()) <= 1  # the last block: the head
    assert streamed.palettized.keys() == whole.palettized.keys() and whole.palettized
    assert all(tensor.same_bits(whole.palettized[name]) for name, tensor in streamed.palettized.items())
    assert streamed.dense.keys() == whole.dense.keys()
    for name, tensor in whole.dense.items():
        assert torch.equal(streamed.dense[name], tensor) and streamed.dense[name].dtype == tensor.dtype
    for part in ("config", "tied", "tokenizer", "recipe", "provenance"):
        assert getattr(streamed, part) == getattr(whole, part), part
    assert found == expected and found is not None


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16], 2))
@pytest.mark.parametrize("case", ["gpt2", "gemma3: scaled RoPE", "qwen2: windows", "phi3"])
def test_folder(tmp_path: Path, monkeypatch, case, dtype):
    kind, given = odd_families.CASES[case]
    model = odd_families.build_case(kind, {**given, "vocab_size": 300})
    model.to(dtype).save_pretrained(tmp_path / "model")
    build_tokenizer(300).save_pretrained(tmp_path / "model")
    assert_same(Source.parse(tmp_path / "model"), monkeypatch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gguf_file(tmp_path: Path, monkeypatch, family):
    assert_same(Source.parse(write(content(tiny(family)), tmp_path / "model.gguf")), monkeypatch)


def test_what_fits_is_read_whole(tiny_llama, monkeypatch):
    asked = []
    own = sources.load_model
    monkeypatch.setattr(
        sources, "load_model", lambda source, room_bytes: asked.append(room_bytes) or own(source)
    )
    palettized(Source.parse(tiny_llama), MemoryBudget(1 << 36))
    assert asked == [None]
