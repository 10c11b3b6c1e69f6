"""Each kind of file is read as the model that it was written of, or refused by name; none becomes another model."""

from __future__ import annotations

import pytest
import torch

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_model import read_gguf
from tests.helpers.gguf_kinds import KINDS as OLDER
from tests.helpers.gguf_kinds import QUANTIZED, TEXT, decoded
from tests.helpers.gguf_models import agreement, divergence, log_probabilities, text
from tests.helpers.gguf_newer_kinds import NEWER
from tests.helpers.gguf_writer import write

KINDS = {**OLDER, **NEWER}
EXACT = [name for name, kind in KINDS.items() if kind.refused is None]
REFUSED = [name for name, kind in KINDS.items() if kind.refused is not None]


def test_table_is_long_enough():
    assert len(EXACT) >= 40 and len(REFUSED) >= 20


@pytest.mark.parametrize("name", EXACT)
def test_kind_is_read_exactly(name, tmp_path):
    """In float32 nothing is rounded, so the divergence is that of one arithmetic from itself."""
    kind = KINDS[name]
    model = kind.model()
    made = read_gguf(kind.write(model, tmp_path))
    account = made.account()
    assert set(account.tensors) == set(made.file.tensors)
    assert set(made.file.metadata) == set(account.settings) | set(account.without_effect)
    tokens = text(TEXT)
    expected = log_probabilities(model, tokens)
    found = log_probabilities(made.load_model(torch.float32), tokens)
    assert agreement(expected, found) == 1
    assert abs(divergence(expected, found)) < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_kind_is_refused(name, tmp_path):
    kind = KINDS[name]
    path = kind.write(kind.model(), tmp_path)
    with pytest.raises(SourceError) as caught:
        read_gguf(path).load_model(torch.float32)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and kind.refused in message and "\n" not in message


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_those_that_gguf_decodes(name, tmp_path):
    kind = QUANTIZED[name]
    model = kind.model()
    made = kind.content(model)
    assert any(each == name for each in made.kinds.values())
    packed = read_gguf(write(made, tmp_path / "packed.gguf")).load_model(torch.float32)
    plain = read_gguf(write(decoded(kind, model), tmp_path / "plain.gguf")).load_model(torch.float32)
    expected = dict(plain.named_parameters())
    for parameter, value in packed.named_parameters():
        assert torch.equal(value, expected[parameter]), parameter
