"""Where the new tokens of a forward pass stand, and what they may see."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from edkm_export.decoder.delta_rule import Triangle

__all__ = ["MASKED", "Context", "causal_mask", "padding_mask", "sliding_mask"]

# Additive mask of a forbidden position: exp underflows to zero, and adding a score does not overflow float16.
MASKED = -3e4


@dataclass(frozen=True)
class Context:
    """Positions, rotation and masks of the new tokens. Dictionaries have an entry for each kind of layer.

    Attributes:
        position_ids: int [batch, new].
        rotary: cos and sin, each float [batch, new, rotary_dim]; empty when positions are learned.
        masks: additive, float [batch, 1, new, total].
        real: float [batch, new, 1], one for a token and zero for padding; None: there is no padding. States that do not
            grow need it: a mask hides the keys of padding, but what has entered them stays.
        triangle: masks of chunks for linear attention; None: made by each layer.
        token_types: int [batch, new]; None: the model has none.
        layer_inputs: for each layer, float [batch, new, size]; empty: the model has no per-layer embedding.
        lent: {number of a layer: its keys and values of all positions}, of those that later layers use; filled by
            the layers of one forward pass.
    """

    position_ids: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    real: Tensor | None = None
    triangle: Triangle | None = None
    token_types: Tensor | None = None
    layer_inputs: tuple[Tensor, ...] = ()
    lent: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def causal_mask(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The mask that hides later positions.

    Args:
        query_positions: int [batch, new].
        key_positions: int [batch, total].

    Returns:
        float32 [batch, 1, new, total], 0 or MASKED.
    """
    later = key_positions[:, None, None, :] > query_positions[:, None, :, None]
    return later.float() * MASKED


def padding_mask(attention_mask: Tensor) -> Tensor:
    """The mask that hides padding: int [batch, total], 1 for a token -> float [batch, 1, 1, total], 0 or MASKED."""
    return (1 - attention_mask)[:, None, None, :].float() * MASKED


def sliding_mask(mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Hide also what lies before a sliding window.

    Args:
        mask: float [batch, 1, new, total], additive.
        query_positions: int [batch, new].
        key_positions: int [batch, total]; only differences to `query_positions` matter.
        window: positions that a token sees, its own included.

    Returns:
        float [batch, 1, new, total].
    """
    before = key_positions[:, None, None, :] <= query_positions[:, None, :, None] - window
    # The smaller one, not the sum, which could leave the range of float16.
    return mask.minimum(before.to(mask.dtype) * MASKED)
