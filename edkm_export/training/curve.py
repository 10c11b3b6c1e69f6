"""The curve of a run as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edkm_export.atomic import atomic_file
from edkm_export.training.run_log import records as read_records

__all__ = ["draw"]


def draw(log: str | Path, output: str | Path) -> None:
    """Draw training loss and perplexities over tokens from log.jsonl, one above the other.

    Raises:
        ImportError: matplotlib is not installed (pip install 'edkm-export[train]').
    """
    log, output = Path(log), Path(output)
    from matplotlib.figure import Figure  # no window system is touched

    records = read_records(log)
    losses = [
        record for record in records if record.get("loss") is not None and record.get("tokens") is not None
    ]
    evaluations = [record for record in records if record.get("perplexity") is not None and "text" in record]
    texts = sorted({record["text"] for record in evaluations})
    step_tokens = losses[-1]["tokens"] / max(1, losses[-1]["step"]) if losses else 0
    figure = Figure(figsize=(8, 7 if texts else 4), layout="constrained")
    panels = figure.subplots(2 if texts else 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(
        [record["tokens"] for record in losses], [record["loss"] for record in losses], color="black"
    )
    distilled = bool(losses) and "kl" in losses[-1]
    panels[0].set_ylabel("training KL to the original (nats)" if distilled else "training loss (nats)")
    if texts:
        _draw_perplexities(panels[1], evaluations, texts, step_tokens)
    for axes in panels:
        _plain_scale(axes)
    panels[-1].set_xlabel("tokens")
    with atomic_file(output, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_perplexities(
    axes: Any, records: list[dict[str, Any]], texts: list[str], step_tokens: float
) -> None:
    for text in texts:
        of_text = [record for record in records if record.get("text") == text]
        found = [record for record in of_text if record["stage"] != "original"]
        original = [record["perplexity"] for record in of_text if record["stage"] == "original"]
        places = [record["step"] * step_tokens for record in found]
        (line,) = axes.plot(places, [record["perplexity"] for record in found], "o-", label=text)
        if original:
            axes.axhline(
                original[-1], color=line.get_color(), linestyle="--", linewidth=1, label=f"{text}, original"
            )
    axes.set_ylabel("perplexity")
    axes.legend(loc="upper right")


def _plain_scale(axes: Any) -> None:
    """Logarithmic, with ordinary numbers at the ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.grid(alpha=0.3, which="both")
    low, _ = axes.get_ylim()
    if low <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axes.yaxis.set_major_formatter(formatter)
    # Within one decade the major ticks alone may be too few to read.
    bottom, top = axes.get_ylim()
    axes.yaxis.set_minor_formatter(formatter if top / bottom < 5 else NullFormatter())
