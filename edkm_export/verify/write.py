"""report.json, report.md and report.html."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edkm_export.atomic import atomic_files
from edkm_export.escaping import for_markdown, for_markdown_sentence
from edkm_export.verify.html import report_page
from edkm_export.verify.quoting import quoted
from edkm_export.verify.ranking import decibels, ranked, ranking_words
from edkm_export.verify.report import Report, Verdict
from edkm_export.verify.verdicts import budget_words, faithful_words, memory_words, quality_words, tally
from edkm_export.verify.words import FIRST_WORDS, GLOSSARY, LADDER, executed_words, readable

__all__ = ["markdown", "quality", "write_report"]

_WORST = 10


def write_report(report: Report, folder: str | Path) -> None:
    """Write `report.json` (schema in docs/report.md), `report.md` and `report.html` into an existing folder.

    Raises:
        DiskFullError: there is no space for them; none is written then.
    """
    with atomic_files(Path(folder), "report") as temporary:
        for name, content in (
            ("report.json", report.model_dump_json(indent=2) + "\n"),
            ("report.md", markdown(report)),
            ("report.html", report_page(report)),
        ):
            (temporary / name).write_text(content, encoding="utf-8")


def markdown(report: Report) -> str:
    """The report for people: verdicts first, then what was not run, then the evidence."""
    lines = [
        f"# Verification of {for_markdown(report.artifact)}",
        "",
        f"**Faithful export: {report.faithful_export.value}.** {_said(faithful_words(report))}",
        "",
        f"**Quality: {report.quality.value}.** {_said(quality_words(report))}",
        "",
    ]
    if report.top1_agreement is not None:
        lines.append(
            f"- top-1 agreement with the original: {report.top1_agreement:.1%} of positions have the same most likely "
            "token"
        )
    if (nearness := report.nearness) is not None:
        lines.append(
            f"- rank agreement with the original: {nearness['rank_agreement']:.1%} of {nearness['pairs']:,} pairs of "
            f"documents come in the same order, {nearness['same_nearest']:.1%} of the queries have the same nearest one"
        )
    lines += [
        f"- {report.bit_exact_tensors} of {len(report.tensors)} palettized tensors bit-exact on disk",
        f"- {report.parameters:,} parameters at {report.bits_per_weight:.2f} bits a weight, LUTs and unpalettized "
        f"weights included; package {report.size_bytes / 1e6:.1f} MB (float16: {report.parameters * 2 / 1e6:.1f} MB)",
    ]
    lines += [
        f"- perplexity of {for_markdown(readable(name))}: {found.value:.2f} ± {found.standard_error:.2f} "
        f"({found.tokens:,} tokens predicted)"
        for name, found in report.perplexities.items()
    ]
    lines += [f"- {_said(tally(report))}"]
    lines += [f"- verified {_said(report.date)}"] if report.date else []
    if report.time_budget is not None:
        lines.append(f"- time budget: {_said(budget_words(report.time_budget))}")
    if report.memory is not None:
        lines.append(f"- memory: {_said(memory_words(report.memory))}")
    for fault in report.faults:
        module, operation = for_markdown(fault.module or ""), for_markdown(fault.op or "")
        where = f"**{module}**, operation {operation}" if module else "not found"
        lines += ["", f"First fault: {where}. {_said(fault.what[:1].upper() + fault.what[1:])}."]
    lines += ["", "## Not run", ""]
    lines += [f"- {_said(item)}" for item in report.not_run] or ["Everything was run."]
    lines += ["", "## Ladder", "", LADDER, f"Words: {FIRST_WORDS}.", ""]
    lines += ["| checked | against | verdict | threshold | found |", "|---|---|---|---|---|"]
    lines += [
        f"| {cell(rung.candidate)} | {cell(rung.reference)} | **{rung.verdict.value}** | {cell(rung.threshold)} | "
        f"{cell(rung.detail)} |"
        for rung in report.rungs
    ]
    lines += ["", "Why these thresholds:", ""]
    lines += [
        f"- {_said(f'{rung.candidate}: {rung.why}')}."
        for rung in report.rungs
        if rung.verdict is not Verdict.NOT_RUN
    ]
    if report.tasks:
        lines += _task_section(report)
    if report.continuations:
        lines += _text_section(report)
    if report.tensors:
        lines += _tensor_section(report)
    lines += ["", "## Words", ""]
    lines += [f"- *{word}*: {meaning}" for word, meaning in GLOSSARY.items()]
    lines += ["", "## Provenance", "", "```json", _provenance(report), "```", ""]
    return "\n".join(lines)


def quality(report: Report) -> str:
    """Both verdicts in short, in Markdown, for a model card."""
    lines = [
        f"Faithful export: **{report.faithful_export.value}**. {_said(faithful_words(report))}",
        "",
        f"Quality: **{report.quality.value}**. {_said(quality_words(report))}",
        "",
        "report.md has the details, and explains the words.",
    ]
    if report.perplexities:
        lines += ["", "| | perplexity |", "|---|---|"]
    lines += [
        f"| {for_markdown(readable(name))} | {found.value:.2f} ± {found.standard_error:.2f} |"
        for name, found in report.perplexities.items()
    ]
    lines += ["", "| checked | verdict |", "|---|---|"]
    lines += [f"| {cell(rung.candidate)} | {rung.verdict.value} |" for rung in report.rungs]
    return "\n".join(lines)


def _said(text: str) -> str:
    """A sentence of ours that may name what strangers named."""
    return for_markdown_sentence(text)


def cell(text: str) -> str:
    """A text in one line that cannot end the cell of a table."""
    return for_markdown_sentence(text)


def _text_section(report: Report) -> list[str]:
    lines = ["", "## Prompts, continued", ""]
    for number, one in enumerate(report.continuations):
        lines += [f"{number + 1}. prompt: {_inline(one.prompt)}"]
        original = "not run" if one.original is None else _inline(one.original)
        lines += [f"    - original: {original}", f"    - palettized: {_inline(one.palettized)}"]
        if one.shared_tokens is not None:
            lines.append(f"    - they begin with {one.shared_tokens} of {one.tokens} tokens alike")
        lines += [f"    - {_said(line)}" for line in executed_words(report, one.prompt)]
    return lines


def _task_section(report: Report) -> list[str]:
    lines = [
        "",
        "## Tasks",
        "",
        "| task | items | original | palettized | artifact |",
        "|---|---|---|---|---|",
    ]
    for one in report.tasks:
        counts = (
            "not run" if count is None else str(count)
            for count in (one.original, one.palettized, one.artifact)
        )
        left = f" ({one.left_out} left out)" if one.left_out else ""
        lines.append(f"| {cell(one.task)} | {one.items}{left} | {' | '.join(counts)} |")
    for one in report.tasks:
        for answers in one.answers:
            lines += ["", f"{cell(one.task)}, item {answers.item}: {_inline(answers.asked)}", ""]
            lines += [
                f"- {name}, {'right' if name in answers.right else 'wrong'}: {_inline(text)}"
                for name, text in (
                    ("original", answers.original),
                    ("palettized", answers.palettized),
                    ("artifact", answers.artifact),
                )
                if text is not None
            ]
    return lines


def _inline(text: str) -> str:
    """A text of a model as code in one line."""
    words = quoted(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    return f"{fence}{words}{fence}"


def _provenance(report: Report) -> str:
    return json.dumps(report.provenance, indent=2, sort_keys=True, default=str)


def _tensor_section(report: Report) -> list[str]:
    rows = ranked(report.tensors)[:_WORST]
    measured = any(tensor.weight_snr_db is not None for tensor in report.tensors)
    title = f"## The {len(rows)} worst weights" if measured else "## Palettized weights"
    lines = [
        "",
        title,
        "",
        ranking_words(report.tensors),
        "",
        "| weight | shape | bits | LUTs | used centroids | bits a weight | output dB | weight dB | bit-exact |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for tensor in rows:
        exact = {True: "yes", False: "**no**", None: "unknown"}[tensor.bit_exact]
        lines.append(
            f"| {for_markdown(tensor.name)} | {'x'.join(map(str, tensor.shape))} | {tensor.n_bits} | "
            f"{tensor.groups[0] * tensor.groups[1]} {tensor.lut_dtype} | "
            f"{tensor.used_centroids} of {tensor.centroids} | "
            f"{tensor.bits_per_weight:.2f} | {decibels(tensor.output_snr_db)} | {decibels(tensor.weight_snr_db)} | "
            f"{exact} |"
        )
    if len(report.tensors) > len(rows):
        lines += ["", f"All {len(report.tensors)} are in report.json."]
    return lines
