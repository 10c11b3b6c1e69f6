"""The rungs that an embedding model has of its own: nearness to the original, and the executed artifact."""

from __future__ import annotations

from typing import Any

from edkm_export.artifact.encodings import Encoding, cosine_limit
from edkm_export.checkpoint import Checkpoint
from edkm_export.verify.embedding_metrics import Closeness
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.report import Rung, Verdict

__all__ = ["encoding_rung", "nearness_rung"]

_WHY = (
    "a sound model of so few bits stays above it, and one whose clustering went wrong does not; both models embedded "
    "the same texts"
)


def nearness_rung(
    checkpoint: Checkpoint, evaluation: VerificationInputs, missing: str, found: Closeness | None
) -> Rung:
    """Hard PyTorch against the original; `found` is None, and `missing` says why, when there is no original."""
    bits = min((tensor.n_bits for tensor in checkpoint.palettized.values()), default=None)
    limit, source = cosine_limit(bits, str(checkpoint.recipe.get("name", "")))
    if evaluation.max_perplexity_ratio is None:
        limit, source = None, "--max-perplexity-ratio none"
    names: dict[str, Any] = {
        "id": "palettization",
        "reference": "original float model",
        "candidate": "hard PyTorch",
        "threshold": f"none ({source})" if limit is None else f"mean cosine at least {limit:g} ({source})",
        "why": _WHY,
    }
    if found is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"no original to compare with: {missing}")
    verdict = Verdict.REPORTED
    if limit is not None:
        verdict = Verdict.WITHIN if found.cosine_mean >= limit else Verdict.BEYOND
    measures = {**found.measures(), "cosine_limit": limit, "cosine_limit_source": source}
    return Rung(**names, verdict=verdict, detail=_words(found), measures=measures)


def encoding_rung(encoding: Encoding, found: Closeness | str | None, missing: str = "") -> Rung:
    """The executed artifact against hard PyTorch.

    Args:
        encoding: how it was executed.
        found: the fault in words when it could not be; None: it was not tried, for the reason `missing`.
        missing: why not.
    """
    threshold = encoding.threshold
    names: dict[str, Any] = {
        "id": encoding.id,
        "reference": "hard PyTorch",
        "candidate": encoding.words,
        "threshold": str(threshold),
        "why": threshold.why,
    }
    if found is None or encoding.encode is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=encoding.missing or missing)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    ok = (
        found.cosine_min >= threshold.cosine
        and found.length_error <= threshold.length
        and round(found.rank_agreement * found.pairs) + found.near_ties == found.pairs
    )
    return Rung(
        **names,
        verdict=Verdict.PASS if ok else Verdict.FAIL,
        detail=_words(found),
        measures={**found.measures(), "allowed_cosine": threshold.cosine},
    )


def _words(found: Closeness) -> str:
    ties = f" ({found.near_ties} near ties)" if found.near_ties else ""
    return (
        f"cosine mean {_cosine(found.cosine_mean)}, least {_cosine(found.cosine_min)}; {found.rank_agreement:.2%} of "
        f"{found.pairs:,} pairs of documents in the same order{ties}, {found.same_nearest:.1%} of the queries with the "
        f"same nearest one, over {found.texts} texts"
    )


def _cosine(value: float) -> str:
    """Close to one, what is missing tells more."""
    return f"1 - {1 - value:.1e}" if 0 < 1 - value < 1e-3 else f"{value:.4f}"
