"""Two real files: SmolLM2 135M (Q4_1) and Gemma 3 270M (Q4_K_M).

EDKM_SMOLLM2_GGUF and EDKM_GEMMA3_GGUF name them; `python -m benchmarks.fetch_smollm2 FOLDER` fetches the first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edkm_export.reference import llamacpp
from edkm_export.reference.gguf.gguf_model import GgufModel, read_gguf
from tests.helpers.gguf_models import agreement, log_probabilities
from tests.helpers.gguf_writer import content, write
from tests.helpers.paths import FIXTURES

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.skipif(llamacpp.available() is None, reason=f"llama.cpp is missing: {llamacpp.INSTALL}"),
]

VARIABLES = {"smollm2": "EDKM_SMOLLM2_GGUF", "gemma3": "EDKM_GEMMA3_GGUF"}
TOKENS = 1024
TEXTS = [
    "The history of the city begins with a river and 1,234 markets.",
    "  two  spaces   three\tand\ta tab\n\n\nnewlines \n \n",
    "naïve café — “quotes” 🙂🚀, ﬁ ½ ①, 数学は楽しい, नमस्ते",
    "for (i = 0; i < 10; i++) { print('it\\'s'); }  // I'LL we've",
    "1234567890 3.14 2**62",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn>model\n<end_of_turn>",
    " ",
    "\n",
]


@pytest.fixture(params=VARIABLES)
def model(request) -> GgufModel:
    named = os.environ.get(VARIABLES[request.param])
    if not named or not Path(named).is_file():
        pytest.skip(f"{VARIABLES[request.param]} names no file")
    return read_gguf(named)


def text_of(model: GgufModel) -> torch.Tensor:
    words = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")
    tokens = model.load_tokenizer()(words[: TOKENS * 8])["input_ids"][:TOKENS]
    assert len(tokens) == TOKENS
    return torch.tensor([tokens])


def mean_divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Over the positions of a text, some at a time: a vocabulary of 262,144 in float64 is large."""
    parts = zip(expected.split(64), found.split(64), strict=True)
    return sum(float((a.double().exp() * (a.double() - b.double())).sum()) for a, b in parts) / len(expected)


def test_tokens(model):
    tokenizer = model.load_tokenizer()
    expected = llamacpp.tokenize(model.file.path, TEXTS, special=True)
    for text, tokens in zip(TEXTS, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text
        assert tokenizer.decode(tokens) == text


def test_same_weights_in_float32(model, tmp_path, record_property):
    """No rounding of activations there, so this is the tight comparison."""
    tokens = text_of(model)
    ours = model.load_model(torch.float32)
    made = content(ours, vocabulary=False)
    held = model.file.metadata
    made.metadata |= {key: value for key, value in held.items() if key.startswith("tokenizer.")}
    path = write(made, tmp_path / "float32.gguf")
    expected = llamacpp.log_probabilities(path, tokens[0].tolist(), cache="F32", deadline_s=1800)
    found = log_probabilities(ours, tokens)
    mean, same = mean_divergence(expected, found), agreement(expected, found)
    record_property("mean divergence", mean)
    print(f"float32: mean KL {mean:.3g}, top-1 {same:.4f}")
    assert mean < 1e-5 and same >= 0.999


def test_packed_file_as_llamacpp_unpacks_it(model, record_property):
    """The file itself: llama.cpp reads and unpacks it, and then does not round activations."""
    tokens = text_of(model)
    found = log_probabilities(model.load_model(torch.float32), tokens)
    with llamacpp.unpacked(model.file.path, 4 * model.values) as path:
        assert path is not None
        expected = llamacpp.log_probabilities(path, tokens[0].tolist(), cache="F32", deadline_s=1800)
    mean, same = mean_divergence(expected, found), agreement(expected, found)
    record_property("mean divergence", mean)
    print(f"unpacked by llama.cpp: mean KL {mean:.3g}, top-1 {same:.4f}")
    assert mean < 1e-5 and same >= 0.999


def test_packed_weights(model, record_property):
    """llama.cpp rounds activations to 8 bits in front of packed weights, and keys and values to float16."""
    tokens = text_of(model)
    expected = llamacpp.log_probabilities(model.file.path, tokens[0].tolist(), deadline_s=1800)
    found = log_probabilities(model.load_model(torch.float32), tokens)
    mean, same = mean_divergence(expected, found), agreement(expected, found)
    record_property("mean divergence", mean)
    print(f"packed: mean KL {mean:.3g}, top-1 {same:.4f}")
    assert mean < 0.02 and same >= 0.9
