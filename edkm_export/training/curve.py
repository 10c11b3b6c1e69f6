"""The curve of a run as a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(log: Path, output: Path) -> None:
    """Draw loss and perplexities over tokens from log.jsonl.

    Raises:
        ImportError: matplotlib is not installed (pip install 'edkm-export[train]').
    """
    from matplotlib.figure import Figure  # no window system is touched

    records: list[dict[str, Any]] = [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()
    ]
    losses = [record for record in records if "loss" in record]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [record["tokens"] for record in losses], [record["loss"] for record in losses], label="training loss"
    )
    axes.set_xlabel("tokens")
    axes.set_ylabel("KL to the original (nats)" if losses and "kl" in losses[-1] else "loss (nats)")
    if losses and min(record["loss"] for record in losses) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    step_tokens = losses[-1]["tokens"] / losses[-1]["step"] if losses else 0
    right = axes.twinx()
    texts = sorted({record["text"] for record in records if "text" in record})
    for text in texts:
        found = [record for record in records if record.get("text") == text and record["stage"] != "original"]
        places = [record["step"] * step_tokens for record in found]
        (line,) = right.plot(places, [record["perplexity"] for record in found], "o--", label=text)
        original = [
            record["perplexity"]
            for record in records
            if record.get("text") == text and record["stage"] == "original"
        ]
        if original:
            right.axhline(original[-1], color=line.get_color(), linewidth=0.8, alpha=0.6)
    if texts:
        right.set_yscale("log")
        right.set_ylabel("perplexity (thin: the original)")
        right.legend(loc="upper right")
    figure.savefig(output, dpi=120)
