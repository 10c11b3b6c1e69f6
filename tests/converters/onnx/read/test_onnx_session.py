"""The cache of an exported decoder: in parts, in batches, and against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from converters.onnx import load_graph
from converters.onnx.read.interface import batch_feeds, past_of
from converters.onnx.read.session import OnnxSession
from edkm_export.artifact.generation import first_difference, generate
from edkm_export.errors import InputError, PackageError
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.torch_session import TorchSession
from tests.helpers.onnx_models import export, palettized_checkpoint

EXACT = ("exact", "low-memory")
# Float32's own noise in logits of about 1 is 1e-5 here; a position off by one, or a key in the wrong place, moves them
# by more than 1e-2.
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def checkpoint():
    return palettized_checkpoint(4)


@pytest.fixture(scope="module", params=EXACT)
def folder(request, checkpoint, tmp_path_factory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("onnx") / request.param, runtime=request.param)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_hard_model(checkpoint)


def text(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens[None], use_cache=False).logits[0]


@pytest.mark.parametrize("optimization", ["all", "disabled"])
@pytest.mark.parametrize("parts", [[30], [1] * 30, [17, 1, 12], [1, 29], [29, 1]])
def test_in_parts_equals_whole(folder, model, optimization, parts):
    tokens = text(30)
    session = OnnxSession.open(folder, optimization=optimization, threads=1)
    logits = torch.cat([session.feed(part) for part in tokens.split(parts)])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole(model, tokens), **CLOSE)


def test_greedy_equals_hard_pytorch(folder, model):
    prompt = text(5)
    expected = generate(TorchSession(model), prompt, max_new_tokens=60)
    found = generate(OnnxSession.open(folder), prompt, max_new_tokens=60)
    difference = first_difference(expected.choices, found.choices)
    assert difference is None or difference.near_tie, difference
    assert len(found.choices) == 60


def test_reset_forgets(folder):
    session = OnnxSession.open(folder)
    first = session.feed(text(4)).clone()
    session.feed(text(3))
    session.reset()
    assert torch.equal(session.feed(text(4)), first)


def test_results_outlive_the_next_call(folder):
    session = OnnxSession.open(folder)
    first = session.feed(text(4))
    copy = first.clone()
    for _ in range(5):
        session.feed(text(4))
    assert torch.equal(first, copy)


def test_context(folder):
    session = OnnxSession.open(folder)
    assert session.context == 128
    session.feed(text(127))
    session.feed(text(1))
    with pytest.raises(InputError, match="holds 128 positions; 128 are taken, 1 more do not fit"):
        session.feed(text(1))


@pytest.mark.parametrize("token", [-1, 320])
def test_tokens_outside_the_vocabulary(folder, token):
    with pytest.raises(InputError, match=f"token {token} is outside its vocabulary of 320"):
        OnnxSession.open(folder).feed(torch.tensor([3, token]))


@pytest.mark.parametrize("optimization", ["all", "disabled"])
@pytest.mark.parametrize("splits", [[24], [9, 15], [23, 1], [1, 1, 22]])
def test_batch_of_different_lengths(folder, model, optimization, splits):
    """Texts of 1 to 24 tokens, padded on the left, in one or several calls; padding must change nothing."""
    graph = load_graph(folder)
    texts = [text(count, seed=count) for count in (24, 17, 9, 1)]
    feeds = batch_feeds(graph.graph, texts, 24)
    assert feeds["position_ids"][1].tolist() == [0] * 7 + list(range(17))
    runtime = graph.runtime(optimization)
    past = {name: value for name, value in feeds.items() if name.startswith("past")}
    logits, start = [], 0
    for count in splits:
        part = {name: feeds[name][:, start : start + count] for name in ("input_ids", "position_ids")}
        results = runtime.run({**part, "attention_mask": feeds["attention_mask"][:, : start + count], **past})
        logits.append(results["logits"])
        past, start = past_of(results), start + count
    found = torch.from_numpy(np.concatenate(logits, 1))
    for row, tokens in zip(found, texts, strict=True):
        torch.testing.assert_close(row[24 - len(tokens) :], whole(model, tokens), **CLOSE)


def test_what_padding_holds_does_not_matter(folder):
    graph = load_graph(folder)
    feeds = batch_feeds(graph.graph, [text(6)], 10)
    first = graph.runtime().run(feeds)["logits"]
    feeds["input_ids"][0, :4] = [7, 300, 12, 5]
    feeds["position_ids"][0, :4] = [9, 0, 100, 3]
    assert np.array_equal(graph.runtime().run(feeds)["logits"][0, 4:], first[0, 4:])


def edited(folder: Path, target: Path, edit) -> Path:
    """A copy of a folder with a change to its message."""
    shutil.copytree(folder, target)
    path = target / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return target


def drop_output(model):
    del model.graph.output[-1]


def rename_input(model):
    model.graph.input[0].name = "tokens"
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "input_ids":
                node.input[place] = "tokens"


def absurd_cache(model):
    for value in model.graph.input:
        if value.name.startswith("past_key_values.0"):
            value.type.tensor_type.shape.dim[1].dim_value = 1 << 30


def float_ids(model):
    model.graph.input[0].type.tensor_type.elem_type = 1


def open_vocabulary(model):
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "vocab"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_output, "expected a decoder with"),
        (rename_input, "expected a decoder with"),
        (absurd_cache, "expected a float [batch, kv_heads, past, head_dim]"),
        (float_ids, "expected int64 [batch, length]"),
        (open_vocabulary, "expected a float [batch, length, size of the vocabulary]"),
    ],
)
def test_other_interfaces_are_refused(folder, tmp_path, edit, message):
    with pytest.raises(PackageError) as caught:
        OnnxSession.open(edited(folder, tmp_path / "edited", edit))
    assert message in str(caught.value)


def test_a_model_that_onnxruntime_refuses(folder, tmp_path):
    def edit(model):
        model.graph.node.append(helper.make_node("Conv", ["logits"], ["nothing"], name="broken"))

    with pytest.raises(PackageError, match="onnxruntime refuses it: "):
        OnnxSession.open(edited(folder, tmp_path / "edited", edit))


def test_a_context_that_the_tables_do_not_hold(folder, tmp_path):
    """The metadata promise more positions than there are: said when the table ends, not read beyond it."""

    def edit(model):
        for entry in model.metadata_props:
            if entry.key == "edkm_export.context_length":
                entry.value = "1000"

    session = OnnxSession.open(edited(folder, tmp_path / "edited", edit))
    session.feed(text(128))
    with pytest.raises(PackageError, match="fails in onnxruntime: "):
        session.feed(text(1))


def test_without_onnxruntime(folder, monkeypatch):
    import sys

    from edkm_export.errors import BackendMissingError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'edkm-export\[onnx\]'"):
        OnnxSession.open(folder)


@pytest.mark.parametrize("case", ["gqa_4", "head_dim_6", "one_layer", "untied_and_biased", "rope_linear"])
def test_odd_shapes(case, tmp_path):
    checkpoint = palettized_checkpoint(2, case=case)
    model = load_hard_model(checkpoint)
    folder = export(checkpoint, tmp_path / "out", runtime="low-memory")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    tokens = text(20)
    session = OnnxSession.open(folder)
    logits = torch.cat([session.feed(part) for part in tokens.split([11, 1, 8])])
    torch.testing.assert_close(logits, whole(model, tokens), **CLOSE)
    found = load_graph(folder).palettized()
    assert all(found[name].same_bits(tensor) for name, tensor in checkpoint.palettized.items())
