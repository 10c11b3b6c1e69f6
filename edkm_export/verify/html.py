"""report.html: one file without a network, for people."""

from __future__ import annotations

import json
import math
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edkm_export._version import __version__
from edkm_export.verify import charts
from edkm_export.verify.quoting import quoted
from edkm_export.verify.ranking import decibels, ranked, ranking_words
from edkm_export.verify.report import Report, Rung, Size, TensorReport, Verdict
from edkm_export.verify.time_budget import WINDOW
from edkm_export.verify.verdicts import budget_words, faithful_words, memory_words, quality_words, tally
from edkm_export.verify.words import GLOSSARY, LADDER, executed_words, readable

__all__ = ["notebook_view", "page", "report_page"]


def report_page(report: Report) -> str:
    """The whole page; verdicts first, then what was not run, then the evidence."""
    rows = ranked(report.tensors)
    by_output = any(row.output_snr_db is not None for row in rows)
    return page(
        "report.html.jinja",
        report=report,
        date=_date(report),
        tally=tally(report),
        faithful=faithful_words(report),
        quality=quality_words(report),
        tiles=_tiles(report),
        glossary=GLOSSARY,
        ladder=LADDER,
        not_run=[rung for rung in report.rungs if rung.verdict is Verdict.NOT_RUN],
        budget=None if report.time_budget is None else budget_words(report.time_budget),
        memory=None if report.memory is None else memory_words(report.memory),
        window=WINDOW,
        executed={one.prompt: executed_words(report, one.prompt) for one in report.continuations},
        read=_read(report),
        kl_plots=[plot for rung in report.rungs if (plot := _kl_plot(rung))],
        layer_plot=Markup(charts.layer_lines(report.layer_errors)) if report.layer_errors else None,
        weight_plots=[
            {**plot.model_dump(), "svg": Markup(charts.weight_histogram(plot))}
            for plot in report.weight_plots
        ],
        tensors=[_Row(**row.model_dump(), numel=math.prod(row.shape)) for row in rows],
        by_output=by_output,
        by_weight=any(row.weight_snr_db is not None for row in rows),
        ranked_by=ranking_words(rows),
        facts=_facts(report.provenance),
        provenance=json.dumps(report.provenance, indent=2, sort_keys=True, default=str),
    )


def notebook_view(report: Report) -> str:
    """One line, and the page below it in a frame, so that its styles stay its own."""
    return str(
        Markup(
            "<div>{}</div><details><summary>report</summary>"
            '<iframe srcdoc="{}" style="width:100%;height:40em;border:1px solid #888" title="report"></iframe>'
            "</details>"
        ).format(repr(report), report_page(report))
    )


def page(template: str, **values: Any) -> str:
    """Fill a template of this package; everything in `values` is escaped unless it is Markup."""
    return _templates().get_template(template).render(version=__version__, **values)


class _Row(TensorReport):
    """A weight with the number by which its shape sorts."""

    numel: int


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(
        bytes=_bytes,
        decibels=decibels,
        quoted=quoted,
        readable=readable,
        difference=_difference,
        megabytes=_megabytes,
        sortable=_sortable,
    )
    return environment


def _date(report: Report) -> str:
    """The date for people: "2026-11-30 09:12 UTC"."""
    if report.date is None:
        return ""
    day, _, time = report.date.partition("T")
    return f"{day} {time[:5]} UTC".strip()


def _tiles(report: Report) -> list[dict[str, str]]:
    float16 = report.parameters * 2
    tiles = []
    if report.top1_agreement is not None and report.perplexity_ratio is not None:
        before, after = report.perplexities.get("original"), report.perplexities.get("hard PyTorch")
        found = f": {before.value:.2f} → {after.value:.2f}" if before and after else ""
        limit = "no limit" if report.perplexity_limit is None else f"limit ×{report.perplexity_limit:g}"
        tiles = [
            {
                "value": f"{report.top1_agreement:.1%}",
                "words": "top-1 agreement: positions with the original's most likely token",
            },
            {
                "value": f"×{report.perplexity_ratio:.3g}",
                "words": f"perplexity against the original's ({limit}){found}",
            },
        ]
    tiles += [
        {
            "value": f"{report.bit_exact_tensors} of {len(report.tensors)}",
            "words": "palettized weights bit-exact on disk",
        },
        {"value": f"{report.bits_per_weight:.2f}", "words": "bits a weight, everything included"},
        {
            "value": _megabytes(report.size_bytes),
            "words": f"on disk; float16 would be {_megabytes(float16)}",
        },
    ]
    for rung in report.rungs:
        if rung.id.startswith("execution-") and "top1_agreement" in rung.measures:
            share = float(rung.measures["top1_agreement"])
            words = f"of tokens as the palettized model in PyTorch, when run in {rung.candidate}"
            tiles.append({"value": f"{share:.2%}", "words": words})
            break
    return tiles


def _read(report: Report) -> str:
    """How many tokens each figure is of: those of the two kinds differ."""
    used = _dict(report.provenance.get("evaluation"))
    if not used:
        return ""
    return (
        f"{used.get('tokens', 0):,} tokens ({used.get('text')}) were read, in windows of {used.get('context', 0):,}. "
        "Perplexity counts the tokens that have one before them in their window; KL and top-1 agreement are of "
        "every position. "
        "The error is one standard error, tokens taken as independent."
    )


def _kl_plot(rung: Rung) -> dict[str, Any] | None:
    counts = rung.measures.get("kl_histogram")
    if not counts:
        return None
    threshold = rung.measures.get("allowed_median_kl")
    svg = charts.kl_histogram(rung.candidate, counts, float(rung.measures["kl_median"]), threshold)
    return {
        "title": rung.candidate,
        "reference": rung.reference,
        "threshold": threshold,
        "svg": Markup(svg),
    }


def _facts(provenance: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a reader asks first: what was verified, how, with which versions."""
    how = _dict(provenance.get("verification"))
    evaluation, base = _dict(provenance.get("evaluation")), _dict(provenance.get("base_model"))
    made = provenance.get("command")
    tokens = f"{evaluation.get('tokens', 0):,} tokens in windows of {evaluation.get('context', 0):,}"
    found: list[tuple[str, Any, bool]] = [
        ("verified by", how.get("command"), True),
        ("palettized by", shlex.join(map(str, made)) if isinstance(made, list) else made, True),
        ("original", base.get("reference"), True),
        (
            "evaluation text",
            f"{evaluation.get('text')}, {tokens}" if evaluation else "",
            False,
        ),
        ("seed", "none was drawn" if provenance.get("seed") is None else provenance["seed"], False),
        ("versions", _pairs(how.get("versions")), False),
        ("versions when palettized", _pairs(provenance.get("versions")), False),
        ("platform", how.get("platform"), False),
    ]
    found += [(f"sha256 of {name}", digest, True) for name, digest in _dict(how.get("artifact")).items()]
    found += [
        (f"sha256 of {name} in the checkpoint", digest, True)
        for name, digest in _dict(provenance.get("sha256")).items()
    ]
    found += [
        (f"sha256 of {name} of the original", digest, True)
        for name, digest in _dict(base.get("sha256")).items()
    ]
    return [(name, {"text": str(value), "code": code}) for name, value, code in found if value]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _pairs(value: object) -> str:
    return ", ".join(f"{name} {version}" for name, version in _dict(value).items())


def _bytes(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def _difference(size: Size) -> str:
    if size.predicted_bytes is None or size.actual_bytes is None:
        return ""
    if size.predicted_bytes == size.actual_bytes:
        return "none"
    return f"{size.actual_bytes / size.predicted_bytes - 1:+.2%}" if size.predicted_bytes else "more"


def _sortable(value: float | None) -> str:
    if value is None:
        return ""
    return f"{min(max(value, -1e9), 1e9):.6g}"
