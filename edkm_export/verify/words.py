"""Words of the report that are not everybody's, and what they mean. docs/report.md explains the same ones at length."""

from __future__ import annotations

from edkm_export.verify.quoting import quoted
from edkm_export.verify.report import Report, TaskResult

__all__ = ["FIRST_WORDS", "GLOSSARY", "LADDER", "counts_words", "executed_words", "readable"]

LADDER = (
    "Each rung is one comparison: a candidate with what comes before it on the way from the source files to the "
    "executed artifact, so that the loss of palettization and a fault of the export are never mixed up."
)

GLOSSARY = {
    "palettized": "each weight is stored as an index into a small lookup table (LUT) of values",
    "rung": "one comparison of the ladder, with its threshold",
    "original": "the float model that was palettized, run by transformers in float32",
    "hard PyTorch": "the palettized model in transformers, in float32: each weight is exactly one entry of its LUT",
    "trained soft model": "the same while it trained, when a weight could lie between LUT entries; it does not ship",
    "artifact": "the exported files, as they lie on disk",
    "rounded": "computed in float32, and each result rounded to float16, as a phone's arithmetic does at least",
    "perplexity": "how surprised a model is by a text: as if it chose each token among so many; lower is better",
    "KL": "Kullback-Leibler divergence between two predictions of the next token, in nats; 0: the same",
    "top-1 agreement": "share of positions at which both models have the same most likely token",
    "cosine": "similarity of two embeddings: 1 for the same direction",
    "rank agreement": "share of pairs of texts that come in the same order when a query is looked up in both models",
    "near tie": "two tokens that the reference holds equally likely within 1%; which one comes first is chance",
    "prefill, decode": "reading a text at once, and token by token with the cache; both must give the same",
    "SNR": "signal to noise ratio in decibels: 20 dB is 1% error power, 30 dB 0.1%; higher is better",
    "dead": "an entry of a LUT that no index selects",
}

FIRST_WORDS = "; ".join(f"{word}: {GLOSSARY[word]}" for word in ("rung", "hard PyTorch", "rounded"))
"""What a reader of the ladder needs at once."""


def counts_words(found: TaskResult) -> str:
    """Right answers of each model to a task, as counts."""
    models = {"original": found.original, "palettized": found.palettized, "artifact": found.artifact}
    parts = [f"{name} {count}" for name, count in models.items() if count is not None]
    left = f" ({found.left_out} left out)" if found.left_out else ""
    return f"{', '.join(parts)} of {found.items} right{left}"


def readable(model: str) -> str:
    """The name of a model in `Report.perplexities`, for who has not read the glossary."""
    return "hard PyTorch (the palettized model in transformers)" if model == "hard PyTorch" else model


def executed_words(report: Report, prompt: str) -> list[str]:
    """What each execution of the artifact wrote after a prompt, against hard PyTorch, a line each."""
    lines = []
    for rung in report.rungs:
        for one in rung.measures.get("continuations", []):
            if one["prompt"] != prompt:
                continue
            executor = rung.candidate.removeprefix("greedy continuation: ")
            alike = f"{executor}: {one['equal_tokens']} of {one['tokens']} tokens as the palettized model"
            parted = one["parted"]
            if parted:
                near = ", a near tie" if parted["near_tie"] else ""
                alike += f", then {quoted(parted['found'])} where that has {quoted(parted['expected'])}{near}"
            lines.append(alike)
    return lines
