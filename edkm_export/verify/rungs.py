"""The rungs of the ladder: each turns what was measured into a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edkm_export.artifact.execution import DAMAGED, Execution
from edkm_export.artifact.metrics import Divergence, Perplexity
from edkm_export.artifact.thresholds import (
    CONTINUATION,
    CONTINUATION_WHY,
    DECODE_KL,
    DECODE_WHY,
    KV_CACHE_RATIO,
    KV_CACHE_WHY,
    RATIO_WHY,
    SIZE_TOLERANCE,
    SOFT_WHY,
    QualityLimit,
    held_tolerance,
)
from edkm_export.kv_cache import LARGEST_CODE
from edkm_export.reference.int8_cache import Misfit
from edkm_export.verify.report import Rung, Verdict

if TYPE_CHECKING:
    from edkm_export.verify.continuation import Continuation

__all__ = [
    "HARD",
    "READING",
    "continuation_rung",
    "decode_rung",
    "execution_rung",
    "kv_cache_rung",
    "palettization_rung",
    "size_rung",
    "soft_rungs",
]

HARD, READING = "hard PyTorch", "hard PyTorch that reads the artifact's int8 keys and values"
"""What an execution is compared with, by how the artifact holds keys and values."""


def soft_rungs(
    missing: str,
    how: str,
    from_original: Divergence | None,
    to_hard: Divergence | None,
    perplexities: dict[str, Perplexity],
) -> list[Rung]:
    """The trained soft model between the original and hard PyTorch.

    Args:
        missing: why one of the two distances, or both, could not be measured.
        how: where the soft weights are from.
        from_original: distance of the soft model from the original.
        to_hard: distance of hard PyTorch from the soft model; None: there is no soft model.
        perplexities: of what was run.
    """
    names: dict[str, Any] = {"threshold": "none", "why": SOFT_WHY}
    first = {**names, "id": "soft", "reference": "original float model", "candidate": "trained soft model"}
    second = {
        **names,
        "id": "hardening",
        "reference": "trained soft model",
        "candidate": "hard PyTorch, each weight rounded to its LUT entry",
    }
    rungs = []
    if from_original is None:
        rungs.append(Rung(**first, verdict=Verdict.NOT_RUN, detail=missing))
    else:
        rungs.append(_reported(first, "original", "trained soft model", from_original, perplexities, how))
    if to_hard is not None:
        rungs.append(_reported(second, "trained soft model", "hard PyTorch", to_hard, perplexities))
    return rungs


def _reported(
    names: dict[str, Any],
    reference: str,
    candidate: str,
    found: Divergence,
    perplexities: dict[str, Perplexity],
    how: str = "",
) -> Rung:
    before, after = perplexities[reference], perplexities[candidate]
    ratio = after.value / before.value
    detail = (
        f"perplexity {before.value:.2f} -> {after.value:.2f} (x{ratio:.2f}), "
        f"top-1 agreement {found.top1_agreement:.1%}, median KL {found.kl_median:.2g}"
    )
    return Rung(
        **names,
        verdict=Verdict.REPORTED,
        detail=f"{detail}; {how}" if how else detail,
        measures={"perplexity_ratio": ratio, **found.model_dump()},
    )


def palettization_rung(
    limit: QualityLimit, missing: str, distance: Divergence | None, perplexities: dict[str, Perplexity]
) -> Rung:
    """Hard PyTorch against the original; `distance` is None, and `missing` says why, when there is no original."""
    names: dict[str, Any] = {
        "id": "palettization",
        "reference": "original float model",
        "candidate": "hard PyTorch",
        "threshold": f"perplexity at most {limit.ratio:g} times the original's ({limit.source})"
        if limit.ratio is not None
        else f"none ({limit.source})",
        "why": RATIO_WHY,
    }
    if distance is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"no original to compare with: {missing}")
    before, after = perplexities["original"], perplexities["hard PyTorch"]
    found = after.value / before.value
    verdict = Verdict.REPORTED
    if limit.ratio is not None:
        verdict = Verdict.WITHIN if found <= limit.ratio else Verdict.BEYOND
    return Rung(
        **names,
        verdict=verdict,
        detail=f"perplexity {before.value:.2f} -> {after.value:.2f} (x{found:.3g}), "
        f"top-1 agreement {distance.top1_agreement:.1%}, median KL {distance.kl_median:.2g} over {distance.tokens:,} "
        "tokens",
        measures={
            "perplexity_ratio": found,
            "perplexity_limit": limit.ratio,
            "perplexity_limit_source": limit.source,
            **distance.model_dump(),
        },
    )


def kv_cache_rung(
    found: Divergence, perplexities: dict[str, Perplexity], candidate: str, *, limited: bool
) -> Rung:
    """What keys and values of int8 cost hard PyTorch.

    Args:
        found: distance from hard PyTorch with float ones.
        perplexities: of both.
        candidate: hard PyTorch with such a cache, in words.
        limited: the quality has a limit.
    """
    before, after = perplexities[HARD], perplexities[candidate]
    ratio = after.value / before.value
    within = Verdict.WITHIN if ratio <= KV_CACHE_RATIO else Verdict.BEYOND
    return Rung(
        id="kv-cache",
        reference=HARD,
        candidate=candidate,
        threshold=f"perplexity at most {KV_CACHE_RATIO:g} times that with a float cache"
        if limited
        else "none",
        why=KV_CACHE_WHY,
        verdict=within if limited else Verdict.REPORTED,
        detail=f"perplexity {before.value:.4g} -> {after.value:.4g} (x{ratio:.4f}), top-1 agreement "
        f"{found.top1_agreement:.1%}, KL mean {found.kl_mean:.2g}, median {found.kl_median:.2g}, 99.9% "
        f"{found.kl_p999:.2g} over {found.tokens:,} tokens",
        measures={
            "perplexity_ratio": ratio,
            "perplexity_limit": KV_CACHE_RATIO if limited else None,
            **found.model_dump(),
        },
    )


def size_rung(actual: int | None, predicted: int | None) -> Rung:
    """Bytes of the weights on disk against the prediction; None: not known."""
    names: dict[str, Any] = {
        "id": "size",
        "reference": "recipe",
        "candidate": "size of the weights on disk",
        "threshold": f"weights within {SIZE_TOLERANCE:.0%} of what the recipe predicts",
        "why": "a weight that was left dense, or stored twice, shows in the size",
    }
    if actual is None or predicted is None:
        detail = DAMAGED if actual is None else "no prediction: the interface of the artifact is not known"
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=detail)
    off = actual / predicted - 1
    return Rung(
        **names,
        verdict=Verdict.PASS if abs(off) <= SIZE_TOLERANCE else Verdict.FAIL,
        detail=f"{actual:,} bytes, predicted {predicted:,} ({off:+.2%})",
        measures={"actual_bytes": actual, "predicted_bytes": predicted},
    )


def execution_rung(
    execution: Execution,
    found: Divergence | str | None,
    missing: str = "",
    reference: str = HARD,
    misfit: Misfit | None = None,
) -> Rung:
    """The executed artifact against hard PyTorch.

    Args:
        execution: how it was executed.
        found: the fault in words when it could not be; None: it was not tried, for the reason `missing`.
        missing: why not.
        reference: hard PyTorch, and whose keys and values it reads.
        misfit: how far those of the artifact are from hard PyTorch's; None: they are floats.
    """
    threshold, tolerance = execution.threshold, held_tolerance(execution.threshold)
    demand = str(threshold)
    if execution.held is not None:
        demand += (
            f"; codes at most {0.5 + LARGEST_CODE * tolerance:.3g} steps off, scales at most {tolerance:g}"
        )
    names: dict[str, Any] = {
        "id": execution.id,
        "reference": reference,
        "candidate": execution.words,
        "threshold": demand,
        "why": threshold.why,
    }
    if found is None or execution.execute is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=execution.missing or missing)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    ok = found.settled_agreement >= threshold.top1 and found.kl_median <= threshold.median_kl
    codes, measures = "", {}
    if misfit is not None:
        ok &= misfit.scale <= tolerance and misfit.steps <= 0.5 + LARGEST_CODE * tolerance
        codes = f"; {misfit.codes:,} codes, at most {misfit.steps:.3g} steps off, scales at most {misfit.scale:.2g}"
        measures = {"code_error_steps": misfit.steps, "scale_error": misfit.scale, "codes": misfit.codes}
    ties = f" ({found.near_ties} near tie{'s' if found.near_ties > 1 else ''})" if found.near_ties else ""
    return Rung(
        **names,
        verdict=Verdict.PASS if ok else Verdict.FAIL,
        detail=f"top-1 agreement {found.top1_agreement:.2%}{ties}, KL median {found.kl_median:.2g}, "
        f"mean {found.kl_mean:.2g}, 99.9% {found.kl_p999:.2g} over {found.tokens:,} tokens{codes}",
        measures={**found.model_dump(), "allowed_median_kl": threshold.median_kl, **measures},
    )


def decode_rung(
    found: Divergence | str | None,
    missing: str,
    largest: float = DECODE_KL,
    executor: str = "executed artifact",
    reference: str = "",
) -> Rung:
    """Decoding against prefill; `found` is the fault in words, or None for the reason `missing`.

    `reference`: of an artifact that holds int8, what reads its keys and values of the whole text.
    """
    names: dict[str, Any] = {
        "id": "prefill-decode",
        "reference": f"{reference or executor}, the whole text at once",
        "candidate": f"{executor}, token by token",
        "threshold": f"largest KL at most {largest:g}",
        "why": DECODE_WHY,
    }
    if found is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=missing)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    return Rung(
        **names,
        verdict=Verdict.PASS if found.kl_max <= largest else Verdict.FAIL,
        detail=f"KL median {found.kl_median:.2g}, largest {found.kl_max:.2g} over {found.tokens} tokens",
        measures=found.model_dump(),
    )


def continuation_rung(
    found: Sequence[Continuation] | str | None,
    missing: str,
    *,
    rounded: bool = False,
    executor: str = "executed artifact",
    reference: str = HARD,
) -> Rung:
    """Greedy continuations against those of hard PyTorch; `found` as in `decode_rung`, `reference` as in
    `execution_rung`.

    `rounded`: the artifact ran rounded to float16 after each op.
    """
    names: dict[str, Any] = {
        "id": "continuation-rounded" if rounded else "continuation",
        "reference": reference,
        "candidate": f"greedy continuation: {executor}",
        "threshold": CONTINUATION,
        "why": CONTINUATION_WHY,
    }
    if found is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=missing)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    whole = sum(one.difference is None for one in found)
    equal, wanted = sum(one.equal for one in found), sum(one.wanted for one in found)
    parts = [
        f"{whole} of {len(found)} prompts continued alike, {equal} of {wanted} tokens before any parting"
    ]
    parts += [str(one) for one in found if one.difference is not None]
    return Rung(
        **names,
        verdict=Verdict.PASS if all(one.ok for one in found) else Verdict.FAIL,
        detail="; ".join(parts),
        measures={"continuations": [one.measures() for one in found]},
    )
