"""Evaluation texts that will not do are refused before a model is loaded or converted, by every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edkm_export import checkpoint
from edkm_export.reference import hard_model
from tests.helpers.snapshots import snapshot

pytest.importorskip("coremltools")


@pytest.mark.parametrize(
    ("content", "message", "early"),
    [
        (None, "text: no such text file.", True),
        (b"", "text: is empty", True),
        (b"\0" * 999, "text: is not text (character 0 is zero)", True),
        (b"word", "text: holds 4 characters, and at least 32 tokens are needed", True),
        (b"the first of the three, the last", "tokens, at least 32 are needed; use a longer text", False),
    ],
    ids=["missing", "empty", "binary", "word", "short"],
)
@pytest.mark.parametrize("command", ["coreml", "onnx", "verify", "compare"])
def test_a_text_that_will_not_do(edkm, small_export, work, monkeypatch, command, content, message, early):
    if content is not None:
        Path("text").write_bytes(content)
    before = snapshot(work)
    monkeypatch.setattr(hard_model, "load_hard_model", lambda *_: pytest.fail("a model must not be loaded"))
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: pytest.fail("nothing must be converted"))
    if early:
        monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("the checkpoint must not be read"))
    made = {"verify": [small_export.bundle], "compare": []}.get(command, ["-o", "out"])
    result = edkm(command, small_export.model, *made, "--text", "text")
    assert result.status == 2 and message in result.message
    assert snapshot(work) == before
