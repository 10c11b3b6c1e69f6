"""`edkm-export palettize` for every family, from a folder with a tokenizer and with a calibration text."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import torch

from edkm_export import checkpoint
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.odd_families import CASES, EXPORTED, build
from tests.helpers.odd_models import build_tokenizer
from tests.helpers.sampling import sampled

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 8


@pytest.mark.parametrize("case", sampled(EXPORTED, 4))
def test_family_is_palettized_with_calibration(case, edkm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, arguments = CASES[case]
    monkeypatch.setitem(CASES, case, (kind, {**arguments, "vocab_size": 300}))
    model = build(case)
    model.half().save_pretrained("model")
    build_tokenizer(300).save_pretrained("model")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("edkm_export.cli.palettize._CONTEXT", 48)  # GPT-2 has learned 64 positions
    result = edkm("palettize", "model", "--calibration", "text.txt", "--calibration-tokens", 192, "--bits", 6)
    assert result.status == 0, result.err
    made = checkpoint.load(Path("model.pt"))
    assert made.recipe["name"] == "6bitg16"
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert made.palettized[embedding].n_bits == 8
    skipped = [rule["match"] for rule in made.recipe["rules"] if rule["skip"]]
    for name, tensor in made.dense.items():
        left = any(fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in skipped)
        assert tensor.dim() == 1 or left, name
    tokens = torch.randint(3, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_hard_model(made)(tokens).logits
        found = WholeSequence(build_decoder(made), made.config, 32)(tokens)
        original = model.float()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 on both sides
    assert (expected - original).std() < 0.2 * original.std()  # 6 bits; 0.03 to 0.08 as measured
