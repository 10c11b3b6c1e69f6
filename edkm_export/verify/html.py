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
from edkm_export.verify.report import Report, Rung, Size, TensorReport, Verdict

__all__ = ["notebook_view", "page", "report_page"]


def report_page(report: Report) -> str:
    """The whole page; verdict first, then what was not run, then the evidence."""
    ranked = sorted(report.tensors, key=_badness)
    by_output = any(row.output_snr_db is not None for row in ranked)
    by_weight = any(row.weight_snr_db is not None for row in ranked)
    return page(
        "report.html.jinja",
        report=report,
        summary=_summary(report),
        tiles=_tiles(report),
        not_run=[rung for rung in report.rungs if rung.verdict is Verdict.NOT_RUN],
        continuations=[
            one
            for rung in report.rungs
            if rung.id.startswith("continuation")
            for one in rung.measures.get("continuations", [])
        ],
        kl_plots=[plot for rung in report.rungs if (plot := _kl_plot(rung))],
        layer_plot=Markup(charts.layer_lines(report.layer_errors)) if report.layer_errors else None,
        weight_plots=[
            {**plot.model_dump(), "svg": Markup(charts.weight_histogram(plot))}
            for plot in report.weight_plots
        ],
        tensors=[_Row(**row.model_dump(), numel=math.prod(row.shape)) for row in ranked],
        by_output=by_output,
        by_weight=by_weight,
        ranked_by=_ranked_by(by_output, by_weight),
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
        bytes=_bytes, decibels=_decibels, difference=_difference, megabytes=_megabytes, sortable=_sortable
    )
    return environment


def _badness(row: TensorReport) -> tuple[bool, float]:
    """Rank of a weight: one that is not bit-exact first, then by its signal to noise ratio."""
    found = row.weight_snr_db if row.output_snr_db is None else row.output_snr_db
    return row.bit_exact is not False, math.inf if found is None else found


def _ranked_by(by_output: bool, by_weight: bool) -> str:
    if by_output:
        return (
            "Ranked by the output SNR: what the layer computes with the decoded weight from the original's own "
            "activations, against what it computes with the original weight."
        )
    if by_weight:
        return "Ranked by the SNR of the weight itself, since no layer outputs were measured."
    return "In the order of the model: without the original there is nothing to rank them by."


def _summary(report: Report) -> str:
    failed = [rung.candidate for rung in report.rungs if rung.verdict is Verdict.FAIL]
    if failed:
        return f"Failed: {', '.join(failed)}."
    asked = [rung for rung in report.rungs if rung.verdict is not Verdict.REPORTED]
    run = sum(rung.verdict is Verdict.PASS for rung in asked)
    return f"{run} of {len(asked)} rungs with a threshold were run, and all of them passed."


def _tiles(report: Report) -> list[dict[str, str]]:
    float16 = report.parameters * 2
    tiles = [
        {
            "value": f"{report.bit_exact_tensors} of {len(report.tensors)}",
            "words": "palettized weights bit-exact on disk",
        },
        {"value": f"{report.bits_per_weight:.2f}", "words": "bits a weight, everything included"},
        {
            "value": f"{report.size_bytes / 1e6:,.1f} MB",
            "words": f"on disk; float16 would be {float16 / 1e6:,.1f} MB",
        },
    ]
    known = report.perplexities
    if "hard PyTorch" in known:
        after, before = known["hard PyTorch"], known.get("original")
        words = "perplexity" if before is None else f"perplexity; the original has {before.value:.2f}"
        tiles.append({"value": f"{after.value:.2f} ± {after.standard_error:.2f}", "words": words})
    for rung in report.rungs:
        if rung.id.startswith("execution-") and "top1_agreement" in rung.measures:
            share = float(rung.measures["top1_agreement"])
            tiles.append(
                {"value": f"{share:.2%}", "words": "of tokens as in hard PyTorch when executed in float32"}
                if rung.id == "execution-float32"
                else {"value": f"{share:.2%}", "words": f"of tokens as in hard PyTorch, {rung.candidate}"}
            )
            break
    return tiles


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
    found: list[tuple[str, Any, bool]] = [
        ("verified by", how.get("command"), True),
        ("palettized by", shlex.join(map(str, made)) if isinstance(made, list) else made, True),
        ("original", base.get("reference"), True),
        (
            "evaluation text",
            f"{evaluation.get('text')}, {evaluation.get('tokens')} tokens in windows of {evaluation.get('context')}",
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


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"


def _sortable(value: float | None) -> str:
    if value is None:
        return ""
    return f"{min(max(value, -1e9), 1e9):.6g}"
