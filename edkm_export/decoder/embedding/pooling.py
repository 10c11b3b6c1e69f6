"""One vector of many, as a product with weights of the tokens: nothing is gathered, so any batch and padding will do."""

from __future__ import annotations

from torch import Tensor

from edkm_export.embedding_settings import Pooling

__all__ = ["pool"]

_BEYOND = 1 << 20  # more than there are positions


def pool(
    kind: Pooling, vectors: Tensor, mask: Tensor, positions: Tensor, prompt_length: Tensor | None = None
) -> Tensor:
    """Pool token vectors.

    Args:
        kind: of pooling.
        vectors: float [batch, tokens, hidden].
        mask: int [batch, tokens], 1 for a token, 0 for padding on either side.
        positions: int [1, tokens], 0, 1, 2, ...
        prompt_length: int [1], tokens at the beginning of each text that are left out; None: none are.

    Returns:
        float [batch, 1, hidden]; zeros for a text without tokens.
    """
    falling = positions * -1 + _BEYOND
    if prompt_length is not None:
        begin = (mask * falling).amax(-1, keepdim=True) * -1 + _BEYOND
        mask = mask * (positions + 1 > begin + prompt_length).to(mask.dtype)
    if kind == "mean":
        # Weights first, not a sum and then a division: a sum of many tokens could leave the range of float16.
        weights = mask.float() / mask.sum(-1, keepdim=True).clamp(min=1).float()
    else:
        places = falling if kind == "cls" else positions + 1
        chosen = (mask * places).amax(-1, keepdim=True)
        weights = (mask * places.eq(chosen).to(mask.dtype)).float()
    return weights.unsqueeze(1) @ vectors
