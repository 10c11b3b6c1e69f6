"""Caches of transformers for keys and values of int8: what an artifact with such a cache is compared with.

They share no code with the decoder that is exported; `edkm_export.kv_cache` says what both compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import PackageError
from edkm_export.kv_cache import LARGEST_CODE, LEAST_SCALE, HeldCache

__all__ = ["Misfit", "held_cache", "int8_cache", "through_int8"]


def through_int8(x: Tensor) -> Tensor:
    """What is read of keys or values that are held as int8, one scale for each head and token.

    Args:
        x: float32 [batch, heads, tokens, head_dim].
    """
    scale = _scale(x)
    codes = torch.div(x, scale).round_().to(torch.int8)
    return torch.mul(codes, scale)


def _scale(x: Tensor) -> Tensor:
    """[batch, heads, tokens, 1]."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    return torch.maximum(largest / LARGEST_CODE, torch.full_like(largest, LEAST_SCALE))


def int8_cache(model: Any) -> Any:
    """Make an empty cache. What it gives back went through int8, the newest tokens too; other states stay as they are.

    Args:
        model: transformers.PreTrainedModel.

    Returns:
        transformers.DynamicCache. It holds what was read, not the codes: the same numbers in the memory of floats.
    """
    import transformers

    class Int8Cache(transformers.DynamicCache):  # type: ignore[misc]  # loading it takes seconds
        """The adapter."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            keys, values = through_int8(key_states), through_int8(value_states)
            return super().update(keys, values, layer_idx, *args, **kwargs)

    return Int8Cache(config=model.config)


@dataclass
class Misfit:
    """How far the int8 keys and values of an artifact are from the floats that a model computes in their place.

    Attributes:
        scale: largest error of a scale, as a share of what it should be.
        steps: largest distance of a code from its float, in steps of the scale that is held with it; 0.5 is rounding.
        codes: how many were compared.
    """

    scale: float = 0.0
    steps: float = 0.0
    codes: int = 0

    def add(self, x: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Compare floats [heads, tokens, head_dim] with codes of the same shape, and scales [heads, tokens, 1]."""
        wanted = _scale(x[None])[0]
        scale = float((scales / wanted - 1).abs().max())
        steps = float((x / scales - codes).abs().max())
        self.scale = max(self.scale, scale if scale == scale else float("inf"))
        self.steps = max(self.steps, steps if steps == steps else float("inf"))
        self.codes += codes.numel()


def held_cache(model: Any, held: HeldCache, misfit: Misfit) -> Any:
    """Make a cache from which a model reads an artifact's keys and values in place of its own.

    Rounding to int8 is not continuous: where two computations differ by a millionth, a few codes fall to the other
    side, and what follows from them moves others. A model that reads the artifact's codes rounds nothing, so that its
    logits must be the artifact's; and the codes must be those of the floats that it computes by itself.

    Args:
        model: transformers.PreTrainedModel; one text is fed, from its beginning.
        held: of the artifact.
        misfit: receives how far the codes are from the model's own floats.

    Returns:
        transformers.DynamicCache. Feeding it raises PackageError where the artifact holds other layers, heads or
        tokens.
    """
    import transformers

    places: dict[int, int] = {}  # of each layer among those that keep keys and values

    class ReadCache(transformers.DynamicCache):  # type: ignore[misc]  # as above
        """The adapter."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            place = places.setdefault(layer_idx, len(places))
            if place >= len(held):
                raise PackageError(f"the artifact holds no keys and values of layer {layer_idx}.")
            begin, layer, found = self.get_seq_length(layer_idx), held[place], []
            for own, codes, scales in (
                (key_states, layer.keys, layer.key_scales),
                (value_states, layer.values, layer.value_scales),
            ):
                heads, new, width = own.shape[1:]
                tokens = slice(begin, begin + new)
                # a state that other layers share is as large as their largest heads
                codes, scales = codes[:heads, tokens, :width], scales[:heads, tokens].float()
                if codes.shape != own.shape[1:] or scales.shape != (heads, new, 1):
                    raise PackageError(
                        f"layer {layer_idx}: the artifact holds codes {list(codes.shape)} with scales "
                        f"{list(scales.shape)}, the model {list(own.shape[1:])} [heads, tokens, head_dim]."
                    )
                misfit.add(own[0].float(), codes, scales)
                found.append((codes * scales)[None].to(own.dtype))
            return super().update(found[0], found[1], layer_idx, *args, **kwargs)

    return ReadCache(config=model.config)
