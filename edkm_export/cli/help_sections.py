"""How the help of a command is arranged: options under headings, with units where a bare number says little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

__all__ = ["SECTIONS", "UNITS", "arrange"]

_VERIFICATION = (
    "no_verify", "text", "tokens", "minutes", "memory_bytes", "prompts", "original", "run",
    "max_perplexity_ratio", "tasks", "max_task_loss", "localize",
)  # fmt: skip
_TALK = ("quiet", "verbose", "log_file", "help")

SECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "palettize": {
        "Model and calibration": ("adapter", "calibration", "calibration_tokens"),
        "Bits": ("recipe", "bits", "target_bits", "target_decoder_bits", "group_size", "lut_dtype"),
        "Effort": ("effort", "steps", "device"),
    },
    "train": {
        "Model and data": (
            "data", "adapter", "self_generated", "answers_only", "chat",
        ),
        "Bits": (
            "preset", "recipe", "bits", "target_bits", "target_decoder_bits", "group_size", "lut_dtype", "importance",
            "fold_scales", "train_embedding",
        ),
        "How long": ("steps", "tokens", "minutes"),
        "Batches": ("context", "batch_size", "accumulate"),
        "Optimization": (
            "objective", "temperature", "backward", "weight_rate", "lut_rate", "norm_rate", "warmup", "decay",
            "refit_every",
        ),
        "Device and memory": ("device", "bf16", "gradient_checkpointing", "record_steps"),
        "Evaluation": ("eval_text", "eval_tokens", "eval_every"),
        "Run": ("output", "config_file", "seed", "save_every", "log_every", "resume", "overwrite"),
    },
    "coreml": {
        "Package": ("interface", "target", "sequence_length", "prefill", "chunks"),
        "Output": ("output", "overwrite", "dry_run"),
        "Verification": _VERIFICATION,
    },
    "onnx": {
        "Graph": ("runtime", "dtype", "opset", "context_length", "standard_ops"),
        "Output": ("output", "overwrite", "dry_run"),
        "Verification": _VERIFICATION,
    },
    "generate": {
        "Text": ("prompt", "chat", "max_new_tokens", "stops"),
        "Choice of tokens": ("temperature", "top_p", "seed"),
    },
}  # fmt: skip
"""{command: {heading: names of its options}}; options that are not named come under a heading of their own."""

UNITS: Mapping[str, str] = {
    "accumulate": "MICRO-BATCHES",
    "batch_size": "WINDOWS",
    "bits": "1|2|3|4|6|8",
    "calibration": "FILE",
    "calibration_tokens": "TOKENS",
    "config_file": "FILE",
    "context": "TOKENS",
    "context_length": "TOKENS",
    "data": "FILE",
    "eval_every": "STEPS",
    "eval_text": "FILE",
    "eval_tokens": "TOKENS",
    "group_size": "ROWS",
    "junit_file": "FILE",
    "log_every": "STEPS",
    "lut_rate": "SHARE",
    "max_perplexity_ratio": "RATIO",
    "max_task_loss": "SHARE",
    "memory_bytes": "SIZE",
    "minutes": "MINUTES",
    "norm_rate": "SHARE",
    "prefill": "TOKENS",
    "prompt": "TEXT",
    "prompts": "TEXT",
    "recipe": "FILE|PRESET",
    "refit_every": "STEPS",
    "report_folder": "FOLDER",
    "run": "FOLDER",
    "save_every": "STEPS",
    "self_generated": "TOKENS",
    "sequence_length": "TOKENS",
    "steps": "STEPS",
    "target_bits": "BITS",
    "target_decoder_bits": "BITS",
    "tasks": "FILE|builtin",
    "text": "FILE",
    "tokens": "TOKENS",
    "warmup": "SHARE",
    "weight_rate": "SHARE",
}
"""What the number or text of an option is, by its name."""


def arrange(command: click.Command, context: click.Context) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings, and the lines of the help below each of them."""
    records = {
        "help" if "--help" in option.opts else option.name or "": record
        for option in command.get_params(context)
        if isinstance(option, click.Option) and (record := option.get_help_record(context)) is not None
    }
    wanted = SECTIONS.get(command.name or "", {})
    named = {name for names in wanted.values() for name in names}
    others = [name for name in records if name not in named and name not in _TALK]
    headings = {**wanted, ("Other options" if wanted else "Options"): others, "Messages": _TALK}
    return [
        (heading, found)
        for heading, names in headings.items()
        if (found := [records[name] for name in names if name in records])
    ]
