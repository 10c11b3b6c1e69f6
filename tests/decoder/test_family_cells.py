"""Every family in every format and interface, exported, read back and run; or refused by name.

`tests/helpers/family_cells.py` has the list, which the table of docs/families.md is made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.api.artifacts import open_artifact, open_embedding_artifact, predicted_size_bytes
from edkm_export.artifact.encodings import TextTokens
from edkm_export.artifact.metrics import divergence
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.reference.hard_model import load_hard_embedding_model, load_hard_model
from tests.helpers.family_cells import CELLS, COLUMNS, KINDS, Cell, Column, some_text
from tests.helpers.onnx_texts import assert_same_logits

PIECES = [13, 1, 3, *[1] * 7]


def _need(column: Column) -> None:
    """Skip where the format's library is missing."""
    pytest.importorskip(column.extra)
    if column.format == "Core AI":
        from converters.coreai.backend import missing_backend

        if missing := missing_backend():
            pytest.skip(f"not run: {missing}")


def marked(cells: list[Cell]) -> list[Any]:
    """As parameters of a test, slow where they are."""
    return [pytest.param(cell, id=str(cell), marks=() if cell.quick else pytest.mark.slow) for cell in cells]


def _kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest divergence of any position, in nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


def _is_onnx_graph(checkpoint: Checkpoint, path: Path) -> None:
    """A batch with padding through the cache. Without optimization MatMulNBits multiplies the very weights."""
    from converters.onnx import load_graph

    graph = load_graph(path)
    assert_same_logits(graph.graph, graph.new_runtime("disabled", 1).run, load_hard_model(checkpoint))


@torch.no_grad()
def _is_language_model(checkpoint: Checkpoint, artifact: Any, column: Column) -> None:
    """A text in pieces through the cache, or whole where there is none, against transformers' own model."""
    text = some_text(checkpoint)
    expected = load_hard_model(checkpoint)(text[None], use_cache=False).logits[0]
    session = artifact.session()
    if session is None:
        found = artifact.executions[0].execute(text)
    else:
        found = torch.cat([session.feed(piece) for piece in text.split(PIECES)])
    if column.format == "Core AI":
        # Random weights make flat distributions, and float16 logits of up to 30 are rounded by 0.01.
        assert divergence([(expected, found)]).kl_mean < 1e-3
        return
    # Tables and epsilons are float16 in a package: 3e-6 at most as measured.
    assert _kl(expected, found) < 3e-5
    rounded = next(each for each in artifact.executions if each.id == "execution-rounded")
    assert _kl(expected, rounded.execute(text)) < 1e-2  # 2e-3 at most as measured


@torch.no_grad()
def _is_embedding_model(checkpoint: Checkpoint, artifact: Any) -> None:
    """Texts of several lengths, in every way to run it here."""
    texts = [TextTokens(some_text(checkpoint, length, seed=length)) for length in (19, 1, 7)]
    model = load_hard_embedding_model(checkpoint)
    expected = torch.cat([model(text.ids[None], torch.ones_like(text.ids[None])) for text in texts])
    ran = 0
    for encoding in artifact.encodings:
        if encoding.encode is None:
            continue
        ran += 1
        least = float(torch.cosine_similarity(encoding.encode(texts), expected).min())
        assert least >= encoding.threshold.cosine, (encoding.id, least)
    assert ran >= 2


@pytest.mark.parametrize("cell", marked([cell for cell in CELLS if cell.refusal is None]))
def test_cell(cell, tmp_path):
    _need(cell.column)
    checkpoint, column = cell.checkpoint(), cell.column
    path = column.write(checkpoint, tmp_path)
    artifact: Any = open_embedding_artifact(path) if column.embeds else open_artifact(path)
    found = artifact.palettized()
    assert found.keys() == checkpoint.palettized.keys()
    assert all(tensor.same_bits(found[name]) for name, tensor in checkpoint.palettized.items())
    dense = artifact.dense()
    for name, tensor in checkpoint.dense.items():
        # what a format computes from, or leaves out, has no place of its own
        assert name not in dense or torch.equal(dense[name].half().flatten(), tensor.half().flatten()), name
    actual, predicted = artifact.weights_size_bytes(), predicted_size_bytes(checkpoint, artifact)
    assert predicted is not None
    # Constants that the prediction does not count in so small a model: up to 2,263 bytes in Core AI (Cohere 2, static
    # functions; not traced). OLMo 3 in Core ML is smaller by 2,176, the size of a pair of RoPE tables with headers.
    room_bytes = 0
    if column.format == "Core AI":
        room_bytes = 3000
    elif column.format == "Core ML" and checkpoint.config["model_type"] == "olmo3":
        room_bytes = 2200
    assert abs(actual - predicted) < 0.01 * predicted + room_bytes
    if column.embeds:
        _is_embedding_model(checkpoint, artifact)
    elif column.format == "ONNX":
        _is_onnx_graph(checkpoint, path)
    else:
        _is_language_model(checkpoint, artifact, column)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.refusal is not None], ids=str)
def test_refused_cell(cell):
    _need(cell.column)
    with pytest.raises(ConversionError) as caught:
        cell.column.plan(cell.checkpoint())
    assert cell.refusal.message in str(caught.value)


def test_a_refusal_refuses_something_and_a_column_runs_something():
    for column in COLUMNS:
        assert any(cell.refusal is None for cell in CELLS if cell.column is column), column
    for kind in KINDS:
        assert any(cell.refusal is None for cell in CELLS if cell.kind == kind), kind
