"""One vector of many, as a product with weights of the tokens: nothing is gathered, any batch and padding will do."""

from __future__ import annotations

from torch import Tensor

from edkm_export.embedding_settings import Pooling

__all__ = ["pool"]

_BEYOND = 1 << 20  # more than there are positions


def pool(kind: Pooling, vectors: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Pool token vectors.

    Args:
        kind: of pooling.
        vectors: float [batch, tokens, hidden].
        mask: int [batch, tokens], 1 for a token that counts, 0 for others.
        positions: int [1, tokens], 0, 1, 2, ...

    Returns:
        float [batch, 1, hidden]; zeros where no token counts.
    """
    if kind == "mean":
        # Weights first, not a sum and then a division: a sum of many tokens could leave the range of float16.
        weights = mask.float() / mask.sum(-1, keepdim=True).clamp(min=1).float()
    else:
        places = positions * -1 + _BEYOND if kind == "cls" else positions + 1
        chosen = (mask * places).amax(-1, keepdim=True)
        weights = (mask * places.eq(chosen).to(mask.dtype)).float()
    return weights.to(vectors.dtype).unsqueeze(1) @ vectors
