"""The two verdicts of a report, and the sentences that all forms of it share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edkm_export.verify.report import MemoryUse, Report, Rung, TimeBudget, Verdict

__all__ = [
    "budget_words",
    "faithful_export",
    "faithful_words",
    "memory_words",
    "one_line",
    "quality",
    "quality_words",
    "tally",
]


def faithful_export(rungs: Sequence[Rung]) -> Verdict:
    """Does the artifact compute what was trained?

    FAIL when any rung failed. PASS when none did, the bytes are right, and some execution passed: right bytes that were
    never run prove nothing of what is computed.
    """
    passed = {rung.id for rung in rungs if rung.verdict is Verdict.PASS}
    if any(rung.verdict is Verdict.FAIL for rung in rungs):
        return Verdict.FAIL
    executed = any(name.startswith("execution-") for name in passed)
    return Verdict.PASS if "bytes" in passed and executed else Verdict.NOT_RUN


def quality(rungs: Sequence[Rung]) -> Verdict:
    """How far did palettization move the model from the original? The verdict of that rung.

    BEYOND, too, when keys and values of int8 cost more than they may, or when it loses more of a task than it may.
    """
    found = {rung.id: rung.verdict for rung in rungs if rung.id in ("palettization", "kv-cache", "tasks")}
    if Verdict.BEYOND in found.values():
        return Verdict.BEYOND
    return found.get("palettization", Verdict.NOT_RUN)


def tally(report: Report) -> str:
    """How many rungs there are, and what came of them; the parts add up."""
    words = (
        ("passed", lambda verdict: verdict.is_good),
        ("failed", lambda verdict: verdict.is_bad),
        ("reported without a threshold", lambda verdict: verdict is Verdict.REPORTED),
        ("not run", lambda verdict: verdict is Verdict.NOT_RUN),
    )
    counts = [(sum(holds(rung.verdict) for rung in report.rungs), word) for word, holds in words]
    parts = ", ".join(f"{count} {word}" for count, word in counts if count)
    return f"{len(report.rungs)} rungs: {parts}" if parts else "no rungs"


def faithful_words(report: Report) -> str:
    """What the first verdict means here, in a sentence."""
    failed = [rung.candidate for rung in report.rungs if rung.verdict is Verdict.FAIL]
    if failed:
        return f"The artifact does not compute the model that was palettized or trained. Failed: {'; '.join(failed)}."
    if report.faithful_export is Verdict.PASS:
        return (
            "The artifact computes the model that was palettized or trained: its weights bit for bit, its "
            f"{'embeddings' if report.embeds else 'logits'} within rounding."
        )
    return "Nothing failed, but the artifact was not executed, so it is not known what it computes."


def quality_words(report: Report) -> str:
    """What the second verdict means here, in a sentence."""
    if (nearness := report.nearness) is not None:
        return _nearness_words(report, nearness)
    ratio, limit, source = report.perplexity_ratio, report.perplexity_limit, report.perplexity_limit_source
    if ratio is None:
        missing = (
            "The original was not compared with, so it is not known how far palettization moved the model."
        )
        return missing + _cache_words(report)
    found = f"Perplexity is {ratio:.3g} times the original's"
    by = f" ({source})" if source else ""
    more = _cache_words(report) + _task_words(report)
    if limit is None:
        return f"{found}; no limit is set for it{by}.{more}"
    rung = next((rung.verdict for rung in report.rungs if rung.id == "palettization"), report.quality)
    place = {Verdict.WITHIN: "within", Verdict.BEYOND: "beyond"}.get(rung, "against")
    return f"{found}, {place} the limit of {limit:g}{by}.{more}"


def _cache_words(report: Report) -> str:
    """What keys and values of int8 cost beside it; nothing where they are floats."""
    rung = next((rung for rung in report.rungs if rung.id == "kv-cache"), None)
    if rung is None:
        return ""
    place = {
        Verdict.WITHIN: ", within its limit of {:g}",
        Verdict.BEYOND: ", beyond its limit of {:g}: use --kv-cache float",
    }.get(rung.verdict, "")
    limit = rung.measures.get("perplexity_limit") or 0.0
    return f" Keys and values of int8 multiply it by {rung.measures['perplexity_ratio']:.4g}{place.format(limit)}."


def _task_words(report: Report) -> str:
    """Right answers in all, and the tasks that lost more than they may; empty without tasks."""
    known = [one for one in report.tasks if one.original is not None]
    if not known:
        return ""
    items, before = sum(one.items for one in known), sum(one.original or 0 for one in known)
    rung = next((rung for rung in report.rungs if rung.id == "tasks"), None)
    beyond = " More than the limit is lost." if rung is not None and rung.verdict is Verdict.BEYOND else ""
    now = sum(one.palettized for one in known)
    return (
        f" Of {items} items of tasks the original answers {before} right, the palettized model {now}.{beyond}"
    )


def _nearness_words(report: Report, found: Mapping[str, Any]) -> str:
    text = f"The mean cosine with the original's embeddings is {found['cosine_mean']:.4f}"
    limit, source = found["cosine_limit"], found["cosine_limit_source"]
    if limit is None:
        return f"{text}; no limit is set for it ({source})."
    place = {Verdict.WITHIN: "within", Verdict.BEYOND: "beyond"}.get(report.quality, "against")
    return f"{text}, {place} the limit of {limit:g} ({source})."


def budget_words(budget: TimeBudget) -> str:
    """What the limit of the time left out, in a sentence."""
    given = f"{budget.minutes:g} minute{'' if budget.minutes == 1 else 's'} (--minutes)"
    return f"{given}; cut: {'; '.join(budget.cut)}" if budget.cut else f"{given}; nothing was left out"


def memory_words(memory: MemoryUse) -> str:
    """How models were run that the memory does not hold whole, in a sentence."""
    return "; ".join([memory.budget, *(f"{name} was run {how}" for name, how in memory.models.items())])


def one_line(report: Report) -> str:
    """Both verdicts, the artifact, and what failed or what was proved, in one line."""
    failed = [f"{rung.candidate}: {rung.detail}" for rung in report.rungs if rung.verdict.is_bad]
    parts = [f"{report.bit_exact_tensors} of {len(report.tensors)} tensors bit-exact", tally(report)]
    if report.perplexity_ratio is not None and report.top1_agreement is not None:
        parts.insert(
            0,
            f"perplexity x{report.perplexity_ratio:.3g}, top-1 {report.top1_agreement:.1%} against the original",
        )
    if (nearness := report.nearness) is not None:
        parts.insert(
            0,
            f"cosine {nearness['cosine_mean']:.4f}, same order {nearness['rank_agreement']:.1%} against the original",
        )
    words = (
        f"faithful export {report.faithful_export.value}, quality {report.quality.value}: {report.artifact}: "
        + "; ".join(failed or parts)
    )
    return " ".join(words.split())
