"""Measures of how far apart two embedding models are on a set of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Closeness", "compare_embeddings"]


@dataclass(frozen=True)
class Closeness:
    """Distance of a candidate's embeddings from a reference's.

    Attributes:
        texts: that were compared.
        cosine_mean, cosine_min: similarity of the two embeddings of a text.
        length_error: largest relative difference of their lengths.
        pairs: of documents whose order to a query was compared.
        rank_agreement: share of them that come in the same order.
        near_ties: pairs in another order, whose similarities the reference holds equal within the tie.
        same_nearest: share of queries with the same nearest document.
    """

    texts: int
    cosine_mean: float
    cosine_min: float
    length_error: float
    pairs: int
    rank_agreement: float
    near_ties: int
    same_nearest: float

    @property
    def settled_agreement(self) -> float:
        """Rank agreement, near ties counted as agreeing."""
        return self.rank_agreement + self.near_ties / self.pairs

    def measures(self) -> dict[str, Any]:
        """By name, for a report."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def compare_embeddings(
    reference: Tensor, candidate: Tensor, queries: list[int], documents: list[int], *, tie: float
) -> Closeness:
    """Compare embeddings of the same texts.

    Args:
        reference: float [texts, dimension].
        candidate: likewise. One that is not finite counts as infinitely far.
        queries: texts whose order of the documents is compared.
        documents: texts that are ordered; a query among them is left out of its own order.
        tie: difference of two similarities, in the reference, below which either order will do.
    """
    reference, candidate = reference.double(), candidate.double()
    finite = torch.isfinite(candidate).all(-1)
    candidate = torch.where(finite[:, None], candidate, torch.zeros_like(candidate))
    cosines = torch.where(finite, F.cosine_similarity(reference, candidate, dim=-1, eps=1e-30), -torch.inf)
    lengths = candidate.norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30) - 1
    lengths = torch.where(finite, lengths.abs(), torch.inf)
    alike = ties = pairs = nearest = 0
    scores = [F.normalize(each, dim=-1) for each in (reference, candidate)]
    for query in queries:
        others = torch.tensor([each for each in documents if each != query])
        ours, theirs = (each[others] @ each[query] for each in scores)
        first, second = torch.triu_indices(len(others), len(others), 1)
        gaps, found = ours[first] - ours[second], theirs[first] - theirs[second]
        same = (gaps * found > 0) | ((gaps == 0) & (found == 0))
        usable = bool(finite[query]) & finite[others[first]] & finite[others[second]]
        same = same & usable
        alike += int(same.sum())
        ties += int((~same & usable & (gaps.abs() <= tie)).sum())
        pairs += len(gaps)
        nearest += bool(ours.argmax() == theirs.argmax()) and bool(finite.all())
    return Closeness(
        texts=len(reference),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        length_error=float(lengths.max()),
        pairs=pairs,
        rank_agreement=alike / pairs,
        near_ties=ties,
        same_nearest=nearest / len(queries),
    )
