"""The rungs of the ladder: each turns what was measured into a verdict."""

from __future__ import annotations

from typing import Any

from edkm_export.verify.report import Divergence, Perplexity, Rung, Verdict
from edkm_export.verify.thresholds import EXECUTION, RATIO_WHY, SIZE_TOLERANCE, ExecutionThreshold

__all__ = [
    "DAMAGED",
    "apple_rung",
    "execution_rung",
    "not_run",
    "palettization_rung",
    "size_rung",
    "soft_rung",
]

DAMAGED = "the package cannot be read"


def soft_rung(trained: bool) -> Rung:
    """The trained soft model, which no checkpoint holds."""
    if trained:
        detail = (
            "training keeps no soft model; its log holds the loss, and the next rung compares what came of it"
        )
    else:
        detail = "the checkpoint was palettized in one shot: there is no soft model"
    return Rung(
        id="soft",
        reference="original float model",
        candidate="trained soft model",
        verdict=Verdict.NOT_RUN,
        threshold="none",
        why="training error is measured by the training run",
        detail=detail,
    )


def palettization_rung(
    ratio: float, missing: str, distance: Divergence | None, perplexities: dict[str, Perplexity]
) -> Rung:
    """Hard PyTorch against the original; `distance` is None, and `missing` says why, when there is no original."""
    names: dict[str, Any] = {
        "id": "palettization",
        "reference": "original float model",
        "candidate": "hard PyTorch",
        "threshold": f"perplexity at most {ratio:g} times the original's",
        "why": RATIO_WHY,
    }
    if distance is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"no original to compare with: {missing}")
    before, after = perplexities["original"], perplexities["hard PyTorch"]
    found = after.value / before.value
    return Rung(
        **names,
        verdict=Verdict.PASS if found <= ratio else Verdict.FAIL,
        detail=f"perplexity {before.value:.2f} -> {after.value:.2f} (x{found:.2f}), "
        f"top-1 agreement {distance.top1_agreement:.1%}, median KL {distance.kl_median:.2g}",
        measures={"perplexity_ratio": found, **distance.model_dump()},
    )


def size_rung(actual: int | None, predicted: int | None) -> Rung:
    """Bytes of the weights on disk against the prediction; None: not known."""
    names: dict[str, Any] = {
        "id": "size",
        "reference": "recipe",
        "candidate": "package size",
        "threshold": f"weights within {SIZE_TOLERANCE:.0%} of what the recipe predicts",
        "why": "a weight that was left dense, or stored twice, shows in the size",
    }
    if actual is None or predicted is None:
        detail = DAMAGED if actual is None else "no prediction: the interface of the package is not known"
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=detail)
    off = actual / predicted - 1
    return Rung(
        **names,
        verdict=Verdict.PASS if abs(off) <= SIZE_TOLERANCE else Verdict.FAIL,
        detail=f"{actual:,} bytes, predicted {predicted:,} ({off:+.2%})",
        measures={"actual_bytes": actual, "predicted_bytes": predicted},
    )


def execution_rung(precision: str, found: Divergence | str) -> Rung:
    """The executed artifact against hard PyTorch; `found` is the fault in words when it could not be executed."""
    threshold = EXECUTION[precision]
    return _executed(
        f"execution-{precision}", f"executed artifact, {threshold.words}", threshold, threshold.why, found
    )


def apple_rung(found: Divergence | str) -> Rung:
    """Apple's runtime against hard PyTorch; `found` is the fault in words when it refused the package."""
    why = "only Apple's own runtime shows what its compiler and compute units do"
    return _executed("execution-apple", "Apple runtime", EXECUTION["rounded"], why, found)


def not_run(rung: Rung, reason: str) -> Rung:
    """The same rung, as one that was not run."""
    return rung.model_copy(update={"verdict": Verdict.NOT_RUN, "detail": reason, "measures": {}})


def _executed(
    name: str, candidate: str, threshold: ExecutionThreshold, why: str, found: Divergence | str
) -> Rung:
    names: dict[str, Any] = {
        "id": name,
        "reference": "hard PyTorch",
        "candidate": candidate,
        "threshold": str(threshold),
        "why": why,
    }
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    ok = found.settled_agreement >= threshold.top1 and found.kl_median <= threshold.median_kl
    ties = f" ({found.near_ties} near ties)" if found.near_ties else ""
    return Rung(
        **names,
        verdict=Verdict.PASS if ok else Verdict.FAIL,
        detail=f"top-1 agreement {found.top1_agreement:.2%}{ties}, KL median {found.kl_median:.2g}, "
        f"mean {found.kl_mean:.2g}, 99.9% {found.kl_p999:.2g} over {found.tokens:,} tokens",
        measures=found.model_dump(),
    )
