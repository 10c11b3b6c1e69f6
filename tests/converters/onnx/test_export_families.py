"""The graph of every family against transformers' own model."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from odd_families import CASES, EXPORTED, build, checkpoint_of
from onnx_models import export

from edkm_export.palettize import palettize_model
from edkm_export.recipe import uniform_recipe

# Float32 on both sides, sums in another order; logits are of size one. A wrong position or mask moves them by 1e-2.
TOLERANCE = 1e-4
LENGTH, PADDING = 20, 3


def open_session(folder) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), options)


def feed(session, tokens, mask, past=None):
    """tokens int64 [batch, new], mask int64 [batch, total] -> logits, past for the next call."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    if past is None:
        batch = len(tokens)
        past = {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32) for value in caches
        }
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past}
    logits, *present = session.run(None, inputs)
    names = [value.name.replace("present", "past_key_values") for value in session.get_outputs()[1:]]
    return logits, dict(zip(names, present, strict=True))


def assert_same_logits(session, model) -> None:
    """A padded and a whole text in one batch, in three parts, the last one a single token."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=generator)
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :PADDING] = 0
    parts, past = [], None
    for first, last in ((0, 11), (11, LENGTH - 1), (LENGTH - 1, LENGTH)):
        logits, past = feed(session, tokens[:, first:last].numpy(), mask[:, :last], past)
        parts.append(logits)
    found = torch.from_numpy(np.concatenate(parts, 1))
    with torch.no_grad():
        whole = model(tokens[:1], use_cache=False).logits[0]
        shorter = model(tokens[1:, PADDING:], use_cache=False).logits[0]
    torch.testing.assert_close(found[0], whole, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found[1, PADDING:], shorter, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_dense_decoder_is_transformers_own(case, tmp_path):
    model = build(case)
    made = checkpoint_of(model)
    context = 48 if "longrope" in case else None  # its tables change with the length of the text
    session = open_session(export(made, tmp_path / "out", context=context))
    assert_same_logits(session, model)


@pytest.mark.parametrize("case", EXPORTED)
@pytest.mark.parametrize(
    ("runtime", "opset"),
    [("exact", 23), ("low-memory", None), ("low-memory", 18), ("fast", None), ("fast", 18)],
)
def test_palettized_families(case, runtime, opset, tmp_path):
    """With int8 LUTs and without optimization MatMulNBits multiplies the very weights, in float32."""
    import dataclasses

    from edkm_export.models.hard import load_hard_model

    model = build(case)
    config = model.config.to_dict()
    parts = palettize_model(model, uniform_recipe(3, 16, "int8"))
    made = dataclasses.replace(
        checkpoint_of(build(case)), palettized=parts.palettized, dense=parts.dense, tied=parts.tied
    )
    assert made.config == config
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    folder = export(made, tmp_path / "out", runtime=runtime, opset=opset)
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), options)
    assert_same_logits(session, load_hard_model(made))
