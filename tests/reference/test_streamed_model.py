"""Models whose weights are read while they run give the bits of the same models in memory whole."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from edkm_export.artifact.generation import generate
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source, load_model
from edkm_export.reference.streamed_model import WAVE, run_all, streamed_weights
from edkm_export.reference.torch_session import TorchSession
from tests.helpers import odd_families
from tests.helpers.folder_kinds import EXACT
from tests.helpers.gguf_models import tiny
from tests.helpers.gguf_writer import content, write
from tests.helpers.sampling import sampled
from tests.reference.test_hf_folder import write as write_folder

GGUF = ["llama", "gemma3_text", "gpt2", "qwen2"]


def palettized(case: str) -> Checkpoint:
    model = odd_families.build(case)
    settings = model.config.to_dict()
    parts = palettize_model(model, uniform_recipe(3, 0))
    return Checkpoint(settings, parts.palettized, parts.dense, parts.tied)


def texts(count: int, vocabulary: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, vocabulary, (length + 9,), generator=generator) for length in range(count)]


@torch.no_grad()
def logits(model: Any, given: list[Tensor]) -> list[Tensor]:
    return run_all(
        model, [lambda ids=ids: model(input_ids=ids[None], use_cache=False).logits for ids in given]
    )


def continued(model: Any, given: list[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    """Greedy tokens by the cache, and the logits of a text in pieces."""

    def one(ids: Tensor) -> tuple[list[int], list[Tensor]]:
        session = TorchSession(model)
        # lengths differ, so that the runs do not end at the same pass
        tokens = generate(session, ids, max_new_tokens=len(ids) - 6).tokens
        session.reset()
        return tokens, [session.feed(ids[:5]), *(session.feed(token[None]) for token in ids[5:])]

    return run_all(model, [lambda ids=ids: one(ids) for ids in given])


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("case", sampled(odd_families.CASES, 3))
def test_hard_pytorch_of_every_family(case):
    made = palettized(case)
    whole, streamed = load_hard_model(made), load_hard_model(made, room_bytes=0)
    assert streamed_weights(whole) is None and streamed_weights(streamed) is not None
    assert all(parameter.is_meta for parameter in streamed.parameters())
    given = texts(3)
    assert same(logits(streamed, given), logits(whole, given))
    assert same(continued(streamed, given), continued(whole, given))


@pytest.mark.parametrize("name", sampled(EXACT, 3))
def test_folders_of_every_kind(tmp_path, name):
    _, folder = write_folder(EXACT[name], tmp_path / "model")
    source = Source.parse(str(folder))
    whole, streamed = load_model(source, torch.float32), load_model(source, torch.float32, room_bytes=0)
    if streamed_weights(streamed) is None:  # several tensors make one parameter
        assert "quantization_config" in (folder / "config.json").read_text()
    given = texts(2)
    assert same(logits(streamed, given), logits(whole, given))


@pytest.mark.parametrize("family", GGUF)
def test_gguf_files(tmp_path, family):
    source = Source.parse(write(content(tiny(family)), tmp_path / "model.gguf"))
    whole, streamed = load_model(source, torch.float32), load_model(source, torch.float32, room_bytes=0)
    assert streamed_weights(streamed) is not None
    given = texts(2)
    assert same(logits(streamed, given), logits(whole, given))
    assert same(continued(streamed, given), continued(whole, given))


def test_one_layer_at_a_time(monkeypatch):
    """Whatever is read, no more than one block is there; and runs that share a pass read each block once."""
    made = palettized("gemma3: scaled RoPE")
    model = load_hard_model(made, room_bytes=0)
    read: list[str] = []
    own = Checkpoint.parameter

    def counted(self: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
        read.append(name)
        there = [key for key, parameter in model.named_parameters() if not parameter.is_meta]
        block = name.rpartition(".")[0] if ".layers." not in name else ".".join(name.split(".")[:3])
        assert all(key.startswith(block) for key in there)
        return own(self, name, dtype)

    monkeypatch.setattr(Checkpoint, "parameter", counted)
    logits(model, texts(4))
    stored = [*made.palettized, *made.dense]
    assert sorted(read) == sorted([*stored, *made.tied.values()])  # the tied head is read at both ends


def test_layers_that_there_is_room_for_stay(monkeypatch):
    made = palettized("mistral")
    whole = logits(load_hard_model(made), texts(2))
    everything = load_hard_model(made, room_bytes=1 << 30)
    some = load_hard_model(made, room_bytes=made.numel * 4)
    for model in (everything, some):
        assert same(logits(model, texts(2)), whole)
    read: list[str] = []
    own = Checkpoint.parameter
    monkeypatch.setattr(
        Checkpoint, "parameter", lambda self, name, dtype: read.append(name) or own(self, name, dtype)
    )
    assert same(logits(everything, texts(2)), whole) and not read
    assert same(logits(some, texts(2)), whole) and 0 < len(read) < len(made.palettized) + len(made.dense)
    weights = streamed_weights(some)
    assert weights is not None and "held" in weights.words
    weights.release()
    assert all(parameter.is_meta for parameter in some.parameters())
    assert same(logits(some, texts(2)), whole)


def test_more_runs_than_share_a_pass():
    made = palettized("gpt2")
    given = texts(WAVE + 3)
    assert same(logits(load_hard_model(made, room_bytes=0), given), logits(load_hard_model(made), given))


def test_run_that_fails_ends_the_others():
    model = load_hard_model(palettized("gpt2"), room_bytes=0)
    before = threading.active_count()
    given = texts(3)

    def fail() -> None:
        logits_of = model(input_ids=given[0][None]).logits
        raise InputError(f"after {logits_of.shape[1]} positions")

    runs = [lambda: generate(TorchSession(model), given[1], max_new_tokens=5), fail]
    with pytest.raises(InputError, match="after 9 positions"):
        run_all(model, runs)
    assert threading.active_count() == before
    assert len(logits(model, given)) == 3  # it can still be run


def test_weight_that_no_export_can_hold_is_refused_before_the_run(tmp_path):
    model = odd_families.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = 1e9
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight holds 1e\+09, beyond 65,504"):
        load_model(Source.parse(str(tmp_path / "model")), torch.float32, room_bytes=0)
