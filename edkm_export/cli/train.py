"""edkm-export train: fine-tune a model while its weights are clustered."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.cli.parameter_types import FILE, RECIPE, find_source
from edkm_export.lut_dtypes import LUT_DTYPE_NAMES

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.reference.source import Source
    from edkm_export.training.train_config import TrainConfig

__all__ = ["command"]

_PRESETS = ("4bit", "3bit", "2bit", "paper")


@click.command("train", short_help="Fine-tune a model while its weights are clustered (eDKM).")
@click.argument("model")
@click.option(
    "--data", multiple=True, required=True, type=click.Path(path_type=Path),
    help="Text, or JSONL with Alpaca fields or chat messages. May be given several times.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option(
    "--preset",
    type=click.Choice(_PRESETS),
    default="4bit",
    show_default=True,
    help="Where settings start from; any other option changes one of them.",
)
@click.option("--config", "config_file", type=FILE, help="YAML with any of the settings.")
@click.option("--recipe", type=RECIPE, help="YAML file or preset: bits, groups and LUT dtype by layer.")
@click.option("--bits", type=int, help="Bits of an index: 1, 2, 3, 4, 6 or 8.")
@click.option(
    "--target-bits",
    type=float,
    help="Average bits a weight over all weights, embedding and LUTs included; sensitive weights get more. An "
    "embedding that gets less than 6 bits is trained.",
)
@click.option(
    "--target-decoder-bits",
    type=float,
    help="Average bits a weight of the decoder alone, LUTs included; embedding and output head keep 8.",
)
@click.option(
    "--group-size", type=int, help="Output rows that share a lookup table (LUT); 0: one for the weight."
)
@click.option(
    "--lut-dtype",
    type=click.Choice(LUT_DTYPE_NAMES),
    help="Grid of the LUT entries; int4, 16 even levels, for up to 3 bits (layers of more get int8).",
)
@click.option(
    "--backward",
    type=click.Choice(["straight-through", "soft", "dkm"]),
    help="How gradients pass the clustering: past it, to weights and LUTs (straight-through), through soft "
    "assignments (soft), or through the differentiable k-means of the DKM paper (dkm).",
)
@click.option(
    "--objective",
    type=click.Choice(["distillation", "cross-entropy"]),
    help="Loss: repeat the original's predictions, or the text.",
)
@click.option(
    "--temperature", type=float, help="Of the distillation: above 1, less likely tokens count more."
)
@click.option(
    "--importance",
    type=click.Choice(["fisher", "energy", "none"]),
    help="What decides which weights matter when they are clustered first: gradients and activations (fisher), "
    "activations (energy), or nothing.",
)
@click.option("--fold-scales/--no-fold-scales", default=None, help="Fold activation outliers into the norms.")
@click.option(
    "--train-embedding/--freeze-embedding",
    default=None,
    help="Train embedding and output head too.  [default: those of less than 6 bits]",
)
@click.option("--self-generated", type=int, help="Tokens that the original writes itself, added to the data.")
@click.option(
    "--answers-only/--all-tokens", default=None, help="Learn only answers of instructions and chats."
)
@click.option(
    "--chat/--alpaca", default=None, help="Instructions in the model's chat template, or in Alpaca's words."
)
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--tokens", type=int, help="Tokens to train on.")
@click.option("--minutes", type=float, help="Time to train.")
@click.option("--context", type=int, help="Tokens of a window.")
@click.option("--batch-size", type=int, help="Windows of a micro-batch.")
@click.option("--accumulate", type=int, help="Micro-batches of a step.")
@click.option(
    "--weight-rate",
    type=float,
    help="Learning rate of weights: change a step, as a share of their typical size.",
)
@click.option("--lut-rate", type=float, help="Learning rate of LUT entries, likewise.")
@click.option("--norm-rate", type=float, help="Learning rate of norms and biases, likewise.")
@click.option("--warmup", type=float, help="Share of the run in which the rates rise.")
@click.option("--decay", type=click.Choice(["linear", "cosine", "none"]), help="How the rates fall.")
@click.option(
    "--refit-every",
    type=int,
    help="Steps between moves of LUT entries to the mean of their weights; 0: never.",
)
@click.option(
    "--bf16/--float32",
    default=None,
    help="Matrix products in bfloat16 or float32.  [default: bfloat16 on CUDA]",
)
@click.option(
    "--moments",
    type=click.Choice(["float32", "bfloat16", "8bit"]),
    help="What Adam's two moments of each weight take; the narrow ones need torchao.  [default: float32]",
)
@click.option(
    "--masters",
    type=click.Choice(["float32", "bfloat16"]),
    help="Master weights and their gradients; bfloat16 ones are rounded stochastically, on one GPU, and need torchao."
    "  [default: float32]",
)
@click.option(
    "--gradient-checkpointing/--keep-activations",
    default=None,
    help="Compute activations again in the backward pass: less memory, about a third slower.",
)
@click.option(
    "--record-steps/--launch-steps",
    default=None,
    help="On CUDA, run steps as a recorded CUDA graph.  [default: record, where the model allows it]",
)
@click.option("--seed", type=int, help="Of the order of the data, and of sampling.  [default: 0]")
@click.option(
    "--eval-text",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text to measure perplexity and the KL divergence from the original on; may be given several times.",
)
@click.option("--eval-tokens", type=int, help="Tokens of each text.")
@click.option("--eval-every", type=int, help="Steps between evaluations; 0: first and last only.")
@click.option("--save-every", type=int, help="Steps between checkpoints; 0: none.")
@click.option("--log-every", type=int, help="Steps between lines of the log.")
@click.option("--adapter", help="Folder of a LoRA adapter that is merged into MODEL first; needs peft.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where to train.  [default: cuda, if there is one]"
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
def command(
    model: str,
    data: tuple[Path, ...],
    output: Path,
    preset: str,
    config_file: Path | None,
    recipe: str | None,
    eval_text: tuple[Path, ...],
    adapter: str | None,
    device: str | None,
    resume: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train MODEL with its weights in lookup tables, and write OUTPUT/model.pt.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. What the forward pass of training sees is bit for bit
    what `edkm-export coreml OUTPUT/model.pt` ships. By default the model learns to repeat the original's
    predictions on the data; data in the style of the later use is best, and a few megabytes are enough.

    `torchrun --nproc-per-node N -m edkm_export train ...` trains on N GPUs, each with its share of the weights.
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run and --overwrite replaces it; give one of them.")
    if recipe is not None and any(settings[name] is not None for name in ("bits", "group_size", "lut_dtype")):
        raise click.UsageError(
            "--recipe decides bits, groups and LUT dtype; leave --bits, --group-size and --lut-dtype out."
        )

    from edkm_export.atomic import check_output
    from edkm_export.claims import refuse_claimed
    from edkm_export.text import check_text

    source = find_source(model, adapter)
    if _is_first():
        folder = output.resolve() if output.is_symlink() else output
        refuse_claimed(folder)
        check_output(folder, overwrite=overwrite or resume, folder=True, in_place=resume)
    for path in data:
        if path.suffix != ".tokens":  # text that is tokenized already
            check_text(path, least_characters=1)
    for path in eval_text:
        check_text(path)

    import torch

    from edkm_export.errors import InputError
    from edkm_export.recipe import load_recipe
    from edkm_export.reference.source import account, require_language_model
    from edkm_export.training.run import Run
    from edkm_export.training.train_config import PRESETS, load_config_file
    from edkm_export.versions import library_versions

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here.")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    changes: dict[str, Any] = {"bf16": chosen == "cuda"}
    if config_file is not None:
        changes |= load_config_file(config_file)
    changes |= {name: value for name, value in settings.items() if value is not None}
    if recipe is not None or "bits" in changes:
        changes.setdefault("target_decoder_bits", None)  # the preset's own belongs to its bits
    config = PRESETS[preset].updated(changes)
    if config.target is not None and config.strict_target and "bits" not in changes and recipe is None:
        config = _fitting(source, config)
    rules = None if recipe is None else load_recipe(recipe)
    require_language_model(source, "train")
    accounted = account(source)
    accounted.require_understood()
    provenance = {
        "versions": library_versions(),
        "command": ["edkm-export", *sys.argv[1:]],
        "data": _digests(data),
        "source": accounted.provenance(),
    }
    with _shown(output, config.save_every, resume=resume) as (announce, tell, advance):
        run = Run(
            source,
            data,
            output,
            config,
            recipe=rules,
            eval_texts=eval_text,
            provenance=provenance,
            announce=announce,
            tell=tell,
            advance=advance,
        )
        outcome = run.complete(device=chosen, resume=resume, overwrite=overwrite)
    if _is_first():
        _print(outcome)


def _is_first() -> bool:
    """Whether this process talks to the user; torchrun may have started several."""
    return os.environ.get("RANK", "0") == "0"


def _fitting(source: Source, config: TrainConfig) -> TrainConfig:
    """The settings with the bits that their target begins with."""
    from edkm_export.reference.outline import outline
    from edkm_export.training.preparation import fitting_bits

    assert config.target is not None
    bits = fitting_bits(
        outline(source),
        config.target,
        config.group_size,
        config.lut_dtype,
        fit_groups=not config.strict_groups,
        source=source.reference,
    )
    return config.model_copy(update={"bits": bits})


@contextlib.contextmanager
def _shown(
    output: Path, save_every: int, *, resume: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[str], None], Callable[[float], None]]]:
    """Show what is done meanwhile: give it the name of each stage, lines to keep, and shares of the training."""
    from edkm_export.activity import activity
    from edkm_export.cli.console import err

    stepped = resume

    def tell(line: str) -> None:
        if _is_first():
            err.print(line, markup=False, soft_wrap=True)

    def advance(_share: float) -> None:
        nonlocal stepped
        stepped = True

    with activity("starting") as stage:
        try:
            yield stage.rename, tell, advance
        except KeyboardInterrupt as error:
            tell(_stopped(output, save_every) if stepped else _NO_STEP)
            raise click.exceptions.Exit(130) from error


_NO_STEP = "stopped before the first step; nothing was left behind"


def _stopped(output: Path, save_every: int) -> str:
    """What an interrupted run left, and what can be done with it."""
    from edkm_export.training import run_checkpoints
    from edkm_export.training.run_folder import RunFolder

    last = run_checkpoints.last_complete(RunFolder(output).checkpoints)
    if last is not None:
        step = run_checkpoints.step(last)
        return f"stopped; the same command with --resume goes on from step {step} ({last})"
    if not RunFolder(output).log.exists():
        return _NO_STEP
    often = f"one is saved every {save_every} steps" if save_every else "--save-every 0 saves none"
    return (
        f"stopped before the first checkpoint ({often}), so that there is nothing to go on from; "
        f"to start again, add --overwrite"
    )


def _print(outcome: Any) -> None:
    from rich.table import Table

    from edkm_export.cli.console import out, print_wide
    from edkm_export.command_line import command_line

    if outcome.evaluations:
        table = Table("text", "model", "perplexity", "KL to the original", "same top token")
        for text, stages in outcome.evaluations.items():
            for stage in ("original", "one-shot", "trained"):
                found = stages[stage]
                kl = "" if found.kl is None else f"{found.kl:.4f}"
                top1 = "" if found.top1 is None else f"{found.top1:.1%}"
                table.add_row(text, stage, f"{found.perplexity:.2f} ± {found.standard_error:.2f}", kl, top1)
        print_wide(table)
    minutes = outcome.seconds / 60
    out.print(
        f"{outcome.path}: {outcome.steps:,} steps, {outcome.tokens:,} tokens, {minutes:.1f} minutes; "
        f"{outcome.average_bits:.2f} bits a weight of the decoder, LUTs included, and {outcome.all_bits:.2f} over all "
        "weights",
        soft_wrap=True,
    )
    out.print_command("next:", command_line("coreml", outcome.path))


def _digests(data: tuple[Path, ...]) -> dict[str, str]:
    """sha256 of the data files; what is missing is reported when it is used."""
    from edkm_export.digest import file_sha256

    return {str(path): file_sha256(path) for path in data if path.is_file()}
