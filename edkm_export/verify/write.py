"""report.json, report.md and report.html."""

from __future__ import annotations

from pathlib import Path

from edkm_export.verify.html import report_page
from edkm_export.verify.report import Report, Verdict

__all__ = ["markdown", "quality", "write_report"]

_WORST = 10


def write_report(report: Report, folder: str | Path) -> None:
    """Write `report.json` (schema in docs/report.md), `report.md` and `report.html` into an existing folder."""
    folder = Path(folder)
    for name, content in (
        ("report.json", report.model_dump_json(indent=2) + "\n"),
        ("report.md", markdown(report)),
        ("report.html", report_page(report)),
    ):
        temporary = folder / f".{name}.partial"
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def markdown(report: Report) -> str:
    """The report for people: verdict first, then what was not run, then the evidence."""
    lines = [
        f"# Palettization verification of {report.artifact}: {report.verdict.value}",
        "",
        f"- {report.bit_exact_tensors} of {len(report.tensors)} palettized tensors bit-exact on disk",
        f"- {report.parameters:,} parameters at {report.bits_per_weight:.2f} bits a weight, LUTs and unpalettized "
        f"weights included; package {report.size_bytes / 1e6:.1f} MB (float16: {report.parameters * 2 / 1e6:.1f} MB)",
    ]
    lines += [
        f"- perplexity of {name}: {found.value:.2f} ± {found.standard_error:.2f} ({found.tokens:,} tokens)"
        for name, found in report.perplexities.items()
    ]
    for fault in report.faults:
        where = f"**{fault.module}**, operation {fault.op}" if fault.module else "not found"
        lines += ["", f"First fault: {where}. {fault.what[:1].upper()}{fault.what[1:]}."]
    lines += ["", "## Not run", ""]
    lines += [f"- {item}" for item in report.not_run] or ["Everything was run."]
    lines += [
        "",
        "## Ladder",
        "",
        "| checked | against | verdict | threshold | found |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {rung.candidate} | {rung.reference} | **{rung.verdict.value}** | {rung.threshold} | {_cell(rung.detail)} |"
        for rung in report.rungs
    ]
    lines += ["", "Why these thresholds:", ""]
    lines += [
        f"- {rung.candidate}: {rung.why}." for rung in report.rungs if rung.verdict is not Verdict.NOT_RUN
    ]
    if report.tensors:
        lines += _tensor_section(report)
    lines += ["", "## Provenance", "", "```json", _provenance(report), "```", ""]
    return "\n".join(lines)


def quality(report: Report) -> str:
    """The verdict in short, in Markdown, for a model card."""
    lines = [
        f"Verdict: **{report.verdict.value}**. report.md has the details.",
        "",
        "| | perplexity |",
        "|---|---|",
    ]
    lines += [
        f"| {name} | {found.value:.2f} ± {found.standard_error:.2f} |"
        for name, found in report.perplexities.items()
    ]
    lines += ["", "| checked | verdict |", "|---|---|"]
    lines += [f"| {rung.candidate} | {rung.verdict.value} |" for rung in report.rungs]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _provenance(report: Report) -> str:
    import json

    return json.dumps(report.provenance, indent=2, sort_keys=True, default=str)


def _tensor_section(report: Report) -> list[str]:
    measured = [tensor for tensor in report.tensors if tensor.weight_snr_db is not None]
    if measured:
        title = f"## The {min(_WORST, len(measured))} weights furthest from the original"
        rows = sorted(measured, key=lambda tensor: tensor.weight_snr_db or 0.0)[:_WORST]
    else:
        title, rows = "## Palettized weights", report.tensors[:_WORST]
    lines = [
        "",
        title,
        "",
        "| weight | shape | bits | LUTs | used centroids | bits a weight | SNR dB | bit-exact |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for tensor in rows:
        snr = "" if tensor.weight_snr_db is None else f"{tensor.weight_snr_db:.1f}"
        exact = {True: "yes", False: "**no**", None: "unknown"}[tensor.bit_exact]
        lines.append(
            f"| {tensor.name} | {'x'.join(map(str, tensor.shape))} | {tensor.n_bits} | "
            f"{tensor.groups[0] * tensor.groups[1]} {tensor.lut_dtype} | "
            f"{tensor.used_centroids} of {tensor.centroids} | "
            f"{tensor.bits_per_weight:.2f} | {snr} | {exact} |"
        )
    if len(report.tensors) > len(rows):
        lines += ["", f"All {len(report.tensors)} are in report.json."]
    return lines
