"""Inputs and outputs of a decoder with cache, named as optimum names them.

input_ids, attention_mask, position_ids, past_key_values.{i}.key|value -> logits, present.{i}.key|value
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.format import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    PRESENT_PREFIX,
)
from converters.onnx.read.graph import Graph
from edkm_export.errors import PackageError

__all__ = ["batch_feeds", "check_interface", "empty_cache", "past_of"]

T = TypeVar("T")

_MAX_CACHE_ROW = 1 << 20  # kv_heads * head_dim; real models have a few thousand


def check_interface(graph: Graph) -> int:
    """Refuse a graph that is not a decoder with cache.

    Returns:
        Size of its vocabulary.

    Raises:
        PackageError: an input or output is missing, unknown, or of a shape that no decoder has.
    """
    integers = {name for name in graph.inputs if not name.startswith(CACHE_PREFIX)}
    past = sorted(graph.inputs.keys() - integers)
    present = sorted(name.replace(CACHE_PREFIX, PRESENT_PREFIX, 1) for name in past)
    if (
        INPUT_IDS not in integers
        or integers - {INPUT_IDS, ATTENTION_MASK, POSITION_IDS}
        or sorted(graph.outputs) != sorted([LOGITS, *present])
    ):
        raise PackageError(
            f"{graph.path}: takes {_some(graph.inputs)} and gives {_some(graph.outputs)}; expected a decoder with "
            "input_ids, attention_mask, position_ids, past_key_values.*, logits and present.*."
        )
    for name in integers:
        if graph.inputs[name].dtype != np.int64 or len(graph.inputs[name].shape) != 2:
            raise PackageError(
                f"{graph.path}: {name} is {graph.inputs[name]}, expected int64 [batch, length]."
            )
    for name in past:
        shape, dtype = graph.inputs[name].shape, graph.inputs[name].dtype
        if (
            dtype.kind != "f"
            or len(shape) != 4
            or not (isinstance(shape[1], int) and isinstance(shape[3], int))
            or not 0 < shape[1] * shape[3] <= _MAX_CACHE_ROW
        ):
            raise PackageError(
                f"{graph.path}: {name} is {graph.inputs[name]}, expected a float [batch, kv_heads, past, head_dim]."
            )
    logits = graph.outputs[LOGITS]
    vocab_size = logits.shape[-1] if len(logits.shape) == 3 else None
    if logits.dtype.kind != "f" or not isinstance(vocab_size, int) or vocab_size < 1:
        raise PackageError(
            f"{graph.path}: logits are {logits}, expected a float [batch, length, size of the vocabulary]."
        )
    return vocab_size


def empty_cache(graph: Graph, *, batch: int) -> dict[str, NDArray[Any]]:
    """Keys and values of no positions, [batch, kv_heads, 0, head_dim] each, by the name of their input."""
    return {
        name: np.zeros((batch, int(value.shape[1]), 0, int(value.shape[3])), value.dtype)
        for name, value in graph.inputs.items()
        if name.startswith(CACHE_PREFIX)
    }


def batch_feeds(graph: Graph, texts: Sequence[Tensor], length: int) -> dict[str, NDArray[Any]]:
    """Inputs for several texts without a past, padded on the left.

    Args:
        graph: the decoder.
        texts: int64 [tokens] each, at most `length`.
        length: of all after padding.
    """
    ids = np.zeros((len(texts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, length - len(text) :] = text.numpy()
        mask[row, length - len(text) :] = 1
    feeds = {
        INPUT_IDS: ids,
        ATTENTION_MASK: mask,
        POSITION_IDS: (mask.cumsum(1) - 1).clip(0),
        **empty_cache(graph, batch=len(texts)),
    }
    return {name: value for name, value in feeds.items() if name in graph.inputs}


def past_of(results: Mapping[str, T]) -> dict[str, T]:
    """What the next call takes as the past, out of the results of a call."""
    return {
        name.replace(PRESENT_PREFIX, CACHE_PREFIX, 1): value
        for name, value in results.items()
        if name != LOGITS
    }


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
