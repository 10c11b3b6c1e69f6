"""llama.cpp reads the same files: what it expects after each token is what our model expects.

It shares no line with the reader nor with the writer of these files. `llamacpp.INSTALL` says how to install it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.reference import llamacpp
from edkm_export.reference.gguf.gguf_model import read_gguf
from tests.helpers.gguf_kinds import KINDS as OLDER
from tests.helpers.gguf_kinds import QUANTIZED, TEXT, decoded
from tests.helpers.gguf_models import agreement, divergence, log_probabilities, text
from tests.helpers.gguf_newer_kinds import NEWER
from tests.helpers.gguf_writer import write

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(llamacpp.available() is None, reason=f"llama.cpp is missing: {llamacpp.INSTALL}"),
]

KINDS = {**OLDER, **NEWER}
EXACT = [name for name, kind in KINDS.items() if kind.refused is None]
SAME = [name for name in EXACT if KINDS[name].llamacpp is True]
OTHER = [name for name in EXACT if KINDS[name].llamacpp is not True]


def compare(path: Path, tokens: torch.Tensor, cache: str = "F32") -> tuple[float, float]:
    """Largest divergence of a position, and share of equal most probable tokens."""
    expected = llamacpp.log_probabilities(path, tokens[0].tolist(), cache=cache)
    found = log_probabilities(read_gguf(path).load_model(torch.float32), tokens)
    return divergence(expected, found), agreement(expected, found)


@pytest.mark.parametrize("name", SAME)
def test_kind(name, tmp_path):
    """llama.cpp takes GELU from a table of float16 numbers: 3e-6, and 1e-4 in 46 layers; other kinds are at 1e-6."""
    kind = KINDS[name]
    worst, same = compare(kind.write(kind.model(), tmp_path), text(TEXT))
    assert worst < kind.tolerance
    assert same == 1 or (kind.tolerance > 1e-4 and same > 0.97)  # a near tie may go the other way there


@pytest.mark.parametrize("name", OTHER)
def test_kind_that_llamacpp_does_not_compute(name, tmp_path):
    """The table says so; when llama.cpp learns it, the kind moves to the test above."""
    kind = KINDS[name]
    path = kind.write(kind.model(), tmp_path)
    try:
        worst, _ = compare(path, text(TEXT))
    except InputError:
        return
    assert worst > 1e-3


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name, tmp_path):
    """The same weights in float32, and the file itself as llama.cpp unpacks it, which rounds no activations."""
    kind = QUANTIZED[name]
    model, tokens = kind.model(), text(TEXT)
    worst, same = compare(write(decoded(kind, model), tmp_path / "plain.gguf"), tokens)
    assert worst < 2e-5 and same == 1
    packed = read_gguf(write(kind.content(model), tmp_path / "packed.gguf"))
    with llamacpp.unpacked(packed.file.path, 4 * packed.values) as path:
        assert path is not None
        expected = llamacpp.log_probabilities(path, tokens[0].tolist(), cache="F32")
    found = log_probabilities(packed.load_model(torch.float32), tokens)
    assert divergence(expected, found) < 2e-5 and agreement(expected, found) == 1
