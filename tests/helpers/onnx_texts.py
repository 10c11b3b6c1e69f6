"""A batch of texts through an exported decoder and its cache, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converters.onnx.read.graph import Graph
from converters.onnx.read.interface import empty_cache, past_of

__all__ = ["assert_same_logits"]

Arrays = dict[str, NDArray[Any]]

# Float32 on both sides, sums in another order; logits are of size one. A wrong position or mask moves them by 1e-2.
TOLERANCE = 1e-4
LENGTH, PADDING = 20, 3


def assert_same_logits(graph: Graph, run: Callable[[Mapping[str, Any]], Arrays], model: Any) -> None:
    """A padded and a whole text in one batch, in three parts, the last one a single token.

    Args:
        graph: of the decoder.
        run: executes it, inputs by name to outputs by name.
        model: of transformers.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=generator)
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :PADDING] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    parts, past = [], empty_cache(graph, batch=2)
    for first, last in ((0, 11), (11, LENGTH - 1), (LENGTH - 1, LENGTH)):
        feeds = {
            "input_ids": tokens[:, first:last].numpy(),
            "attention_mask": mask[:, :last],
            "position_ids": positions[:, first:last],
        }
        results = run({**feeds, **past})
        parts.append(results["logits"])
        past = past_of(results)
    found = torch.from_numpy(np.concatenate(parts, 1))
    with torch.no_grad():
        whole = model(tokens[:1], use_cache=False).logits[0]
        shorter = model(tokens[1:, PADDING:], use_cache=False).logits[0]
    torch.testing.assert_close(found[0], whole, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found[1, PADDING:], shorter, atol=TOLERANCE, rtol=TOLERANCE)
