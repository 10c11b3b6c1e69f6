"""Embedding folders in the programs that people have: transformers.js, and optimum, which sentence-transformers uses.

EDKM_OPTIMUM_PYTHON=venv/bin/python        pytest -m optimum         # pip install optimum-onnx[onnxruntime]
EDKM_TRANSFORMERSJS=folder/with/node_modules  pytest -m transformersjs  # npm install @huggingface/transformers
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.onnx.write.bundle import write_bundle
from converters.onnx.write.export_plan import plan_onnx
from edkm_export.reference.hard_model import load_hard_embedding_model
from tests.helpers.embedding_models import CASES, SENTENCES, palettized, texts_of, write_folder

TRANSFORMERS_JS = """
import { env, pipeline } from '@huggingface/transformers';
import path from 'node:path';
const [folder, texts, pooling] = [process.argv[2], JSON.parse(process.argv[3]), process.argv[4]];
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const extractor = await pipeline('feature-extraction', path.basename(folder));
const pooled = await extractor(texts, { pooling, normalize: true });
const inputs = extractor.tokenizer(texts, { padding: true, truncation: true });
const { sentence_embedding } = await extractor.model(inputs);
console.log(JSON.stringify({ pooled: pooled.tolist(), whole: sentence_embedding.tolist() }));
"""

OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = ORTModelForFeatureExtraction.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
mask = batch["attention_mask"][..., None]
vectors = model(**batch).last_hidden_state * mask
print(json.dumps((vectors.sum(1) / mask.sum(1)).tolist()))
"""

# transformers.js cuts a text that is too long with its last special token, so none is too long here
TEXTS = [text for text in SENTENCES if len(text) < 30]
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}


def place(variable: str) -> str:
    if not (found := os.environ.get(variable)):
        pytest.fail(f"{variable} does not say where it is installed")
    return found


def last_line(command: list[str]):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def exported(case: str, place: Path):
    """The folder, its settings, and the embeddings of hard PyTorch."""
    folder = write_folder(CASES[case], place / "model")
    checkpoint = palettized(folder)
    (place / "out").mkdir()
    write_bundle(checkpoint, plan_onnx(checkpoint), place / "out")
    model = load_hard_embedding_model(checkpoint)
    with torch.no_grad():
        texts = texts_of(folder, model, None)
        rows = [model(text.ids[None], torch.ones_like(text.ids[None])) for text in texts]
        rows = [row for row, text in zip(rows, SENTENCES, strict=True) if text in TEXTS]
    return place / "out", checkpoint.embedding, torch.cat(rows).numpy()


@pytest.mark.transformersjs
@pytest.mark.parametrize("case", ["minilm", "bge", "qwen3", "modernbert", "embeddinggemma", "dense tanh"])
def test_transformers_js(tmp_path, case):
    """The pipeline pools as the model does; with dense layers `sentence_embedding` alone is the model's."""
    folder, settings, expected = exported(case, tmp_path)
    (tmp_path / "node_modules").symlink_to((Path(place("EDKM_TRANSFORMERSJS")) / "node_modules").resolve())
    script = tmp_path / "run.mjs"
    script.write_text(TRANSFORMERS_JS)
    pooling = POOLINGS[settings.pooling]
    found = last_line(["node", str(script), str(folder), json.dumps(TEXTS), pooling])
    np.testing.assert_allclose(found["whole"], expected, atol=1e-4)
    if not settings.dense:
        np.testing.assert_allclose(found["pooled"], expected, atol=1e-4)


@pytest.mark.optimum
def test_optimum(tmp_path):
    folder, _, expected = exported("minilm", tmp_path)
    found = np.array(last_line([place("EDKM_OPTIMUM_PYTHON"), "-c", OPTIMUM, str(folder), json.dumps(TEXTS)]))
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), expected, atol=1e-4)
