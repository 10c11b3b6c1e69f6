"""Inputs and outputs of a decoder with cache, named as optimum names them.

input_ids, attention_mask, position_ids, past_key_values.{i}.key|value -> logits, present.{i}.key|value

Layers without attention keep past_conv.{i} [batch, channels, width] and past_recurrent.{i} [batch, heads, key_dim,
value_dim], as transformers.js names them, and give present_conv.{i} and present_recurrent.{i}. Keys and values of int8
have scales beside them, past_key_values.{i}.key_scale|value_scale [batch, kv_heads, past, 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.format import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    INPUT_IDS,
    KEY,
    KEY_SCALE,
    LOGITS,
    POSITION_IDS,
    VALUE,
    VALUE_SCALE,
    StateName,
    past_name,
    past_of_present,
)
from converters.onnx.read.graph import Graph
from edkm_export.errors import PackageError
from edkm_export.kv_cache import FLOAT, INT8, HeldCache, HeldLayer, KVCache

__all__ = ["batch_feeds", "check_interface", "empty_cache", "held_cache", "past_of"]

T = TypeVar("T")

_MAX_CACHE_ROW = 1 << 20  # kv_heads * head_dim, or channels * width; real models have a few thousand
_MAX_RECURRENCE = 1 << 26  # heads * key_dim * value_dim; real models have half a million
_STATE = re.compile(r"past_(?P<what>conv|recurrent)\.\d+")


def check_interface(graph: Graph, kv_cache: KVCache = FLOAT) -> int:
    """Refuse a graph that is not a decoder with cache.

    Args:
        graph: as read.
        kv_cache: how its metadata say that it holds keys and values.

    Returns:
        Size of its vocabulary.

    Raises:
        PackageError: an input or output is missing, unknown, or of a shape that no decoder has.
    """
    past = sorted(name for name in graph.inputs if name.startswith(CACHE_PREFIX))
    fixed = sorted(name for name in graph.inputs if _STATE.fullmatch(name))
    integers = graph.inputs.keys() - {*past, *fixed}
    present = {past_of_present(name) for name in graph.outputs if name != LOGITS}
    if (
        INPUT_IDS not in integers
        or integers - {INPUT_IDS, ATTENTION_MASK, POSITION_IDS}
        or LOGITS not in graph.outputs
        or present != {*past, *fixed}
        or len(graph.outputs) != 1 + len(past) + len(fixed)
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
    _check_past(graph, past, kv_cache)
    for name in fixed:
        _check_fixed(graph, name)
    logits = graph.outputs[LOGITS]
    vocab_size = logits.shape[-1] if len(logits.shape) == 3 else None
    if logits.dtype.kind != "f" or not isinstance(vocab_size, int) or vocab_size < 1:
        raise PackageError(
            f"{graph.path}: logits are {logits}, expected a float [batch, length, size of the vocabulary]."
        )
    return vocab_size


def _check_past(graph: Graph, past: Sequence[str], kv_cache: KVCache) -> None:
    """Keys and values, and the scales of each where they are int8."""
    scales = {name for name in past if name.endswith((f".{KEY_SCALE}", f".{VALUE_SCALE}"))}
    wanted = {f"{name}_scale" for name in past if name not in scales} if kv_cache == INT8 else set()
    if different := sorted(scales ^ wanted):
        state = "unknown" if different[0] in scales else "missing"
        raise PackageError(
            f"{graph.path}: its metadata say that keys and values are {kv_cache}, and {different[0]} is {state}; "
            "export it again."
        )
    for name in past:
        shape, dtype = graph.inputs[name].shape, graph.inputs[name].dtype
        coded = kv_cache == INT8 and name not in scales
        if (
            (dtype != np.int8 if coded else dtype.kind != "f")
            or len(shape) != 4
            or not (isinstance(shape[1], int) and isinstance(shape[3], int))
            or not 0 < shape[1] * shape[3] <= _MAX_CACHE_ROW
            or (name in scales and (shape[1], shape[3]) != (_heads(graph, name.removesuffix("_scale")), 1))
        ):
            last = "1" if name in scales else "head_dim"
            raise PackageError(
                f"{graph.path}: {name} is {graph.inputs[name]}, expected {'an int8' if coded else 'a float'} [batch, "
                f"kv_heads, past, {last}]."
            )


def _heads(graph: Graph, name: str) -> Any:
    return graph.inputs[name].shape[1] if len(graph.inputs[name].shape) == 4 else None


def _check_fixed(graph: Graph, name: str) -> None:
    """A state whose size does not depend on the text."""
    value = graph.inputs[name]
    rank, most = (3, _MAX_CACHE_ROW) if name.startswith("past_conv") else (4, _MAX_RECURRENCE)
    sizes = value.shape[1:]
    whole = len(value.shape) == rank and all(isinstance(size, int) and size > 0 for size in sizes)
    if (
        value.dtype.kind != "f"
        or not whole
        or math.prod(size for size in sizes if isinstance(size, int)) > most
    ):
        shape = "channels, width" if rank == 3 else "heads, key_dim, value_dim"
        raise PackageError(f"{graph.path}: {name} is {value}, expected a float [batch, {shape}].")


def empty_cache(graph: Graph, *, batch: int) -> dict[str, NDArray[Any]]:
    """The states before a text by the name of their input: no keys and values, zeros for the others."""
    return {
        name: np.zeros(
            (batch, *(0 if isinstance(size, str) else size for size in value.shape[1:])), value.dtype
        )
        for name, value in graph.inputs.items()
        if name.startswith(CACHE_PREFIX) or _STATE.fullmatch(name)
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
    return {past_of_present(name): value for name, value in results.items() if name != LOGITS}


def held_cache(past: Mapping[str, NDArray[Any]], tokens: int) -> HeldCache:
    """Keys and values of int8 as the first text of a batch has them.

    Args:
        past: by the names of the inputs.
        tokens: of the text, which are the last.
    """
    named = re.compile(rf"{re.escape(CACHE_PREFIX)}(\d+)\.{KEY}")
    layers = sorted(int(found[1]) for name in past if (found := named.fullmatch(name)))

    def part(layer: int, what: StateName) -> Tensor:
        array = past[past_name(layer, what)]
        return torch.from_numpy(array[0, :, array.shape[2] - tokens :])

    return [
        HeldLayer(*(part(layer, what) for what in (KEY, KEY_SCALE, VALUE, VALUE_SCALE))) for layer in layers
    ]


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
