"""Embeddings and output heads of few bits in groups of rows, through every interface of the three formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edkm_export
from edkm_export.api.artifacts import find_artifact, open_artifact
from edkm_export.checkpoint import Checkpoint, load
from edkm_export.errors import EdkmExportError
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.report import Verdict
from tests.helpers.exports import palettized_folder
from tests.helpers.odd_models import build, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

INTERFACES: list[tuple[str, dict[str, Any]]] = [
    ("onnx", {"runtime": "exact"}),
    ("coreml", {"interface": "logits", "sequence_length": 16}),
    ("coreai", {"interface": "dynamic"}),
    ("onnx", {"runtime": "low-memory"}),
    ("coreml", {"interface": "neural-engine", "sequence_length": 32, "prefill": 8}),
    ("coreai", {"interface": "neural-engine"}),
    ("onnx", {"runtime": "fast"}),
    ("coreml", {"interface": "swift-transformers", "sequence_length": 32}),
]
# Bits of the embedding, of a head that is a weight of its own (None: it is the embedding), and rows that share a LUT.
VOCABULARIES = [(3, None, 16), (2, 4, 8), (4, None, 5), (6, 3, 32)]


def checkpoint(folder: Path, bits: int, head: int | None, group_size: int, lut_dtype: Any) -> Checkpoint:
    model = build("plain" if head is None else "untied").half()
    model.config.max_position_embeddings = 256  # as many as Core AI's static engine needs
    rules = [Rule(match="*embed_tokens", bits=bits, group_size=group_size, lut_dtype=lut_dtype)]
    if head is not None:
        rules.append(Rule(match="lm_head", bits=head, group_size=group_size, lut_dtype=lut_dtype))
    rules.append(Rule(bits=4, group_size=8, lut_dtype=lut_dtype))
    recipe = Recipe(rules=tuple(rules))
    return palettized_folder(save(model, folder / "model"), recipe, folder / "model.pt")


CASES = [(kind, options, *each) for each in VOCABULARIES for kind, options in INTERFACES]
QUICK = (0, 12, 18)  # one of each format, the splitting neural-engine interface of Core ML among them


@pytest.mark.parametrize(
    ("kind", "options", "bits", "head", "group_size"),
    [
        case if number in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_groups_of_a_vocabulary_are_exact(
    kind: str, options: dict[str, Any], bits: int, head: int | None, group_size: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Read back bit for bit, looked up and multiplied: logits of all tokens of the vocabulary."""
    if kind == "coreml":
        pytest.importorskip("coremltools")
        from converters.coreml.write import vocabulary

        monkeypatch.setattr(vocabulary, "LARGEST_DIMENSION", 130)  # so that 320 rows are cut, between groups
    elif kind == "coreai":
        pytest.importorskip("coreai")
    lut_dtype = "int8" if options.get("runtime") == "fast" else "float16"
    made = checkpoint(tmp_path, bits, head, group_size, lut_dtype)
    try:
        exported = edkm_export.export(made, tmp_path / "out", kind, **options)
    except EdkmExportError as error:
        pytest.fail(f"{kind} {options}: {error}")
    artifact = open_artifact(find_artifact(exported.path))
    rung, exact = compare_bytes(made, artifact)
    assert rung.verdict is Verdict.PASS, rung.detail
    assert exact[EMBEDDING] and (head is None or exact[HEAD])

    execute = next(one.execute for one in artifact.executions if one.execute is not None)
    model = load_hard_model(made)
    ids = torch.randperm(320, generator=torch.Generator().manual_seed(0))
    for text in ids[: 16 * 2].view(2, 16):  # of all parts and groups
        with torch.no_grad():
            expected = model(text[None]).logits[0].log_softmax(-1)
        found = execute(text).float().log_softmax(-1)
        # "fast" rounds activations to int8, as its execution is allowed to
        assert (found - expected).abs().max() < (0.5 if lut_dtype == "int8" else 0.02)


def test_a_target_that_cannot_hold_groups_refuses_the_embedding_by_name(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    made = checkpoint(tmp_path, 3, None, 16, "float16")
    with pytest.raises(EdkmExportError, match="iOS18"):
        edkm_export.export(load(made.path), tmp_path / "out", "coreml", target="iOS17", sequence_length=16)
    assert not (tmp_path / "out").exists()
