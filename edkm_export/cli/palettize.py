"""edkm-export palettize: one-shot palettization of a float model."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edkm_export.cli.parameter_types import RECIPE, find_source, memory_option
from edkm_export.lut_dtypes import LUT_DTYPE_NAMES

if TYPE_CHECKING:  # importing it takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.loss_estimate import LossEstimate
    from edkm_export.lut_dtypes import LutDtype
    from edkm_export.recipe import Recipe
    from edkm_export.training.bit_budget import BitTarget

__all__ = ["command"]

_CONTEXT = 512


@click.command("palettize", short_help="Cluster a model's weights into lookup tables, in one shot.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("model.pt"),
    show_default=True,
    help="The checkpoint to write.",
)
@click.option("--bits", type=int, help="Bits of an index: 1, 2, 3, 4, 6 or 8.  [default: 4]")
@click.option(
    "--target-bits",
    type=click.FloatRange(min=0, min_open=True, max=16),
    help="Average bits a weight over all weights, embedding and LUTs included: sensitive weights get more than others, "
    "--bits at least (then 2 by default). Needs --calibration.",
)
@click.option(
    "--target-decoder-bits",
    type=click.FloatRange(min=0, min_open=True, max=16),
    help="Likewise over the weights of the decoder alone; embedding and output head keep 8 bits.",
)
@click.option(
    "--group-size",
    type=int,
    help="Output rows that share a lookup table (LUT); 0: one for the weight.  [default: 16]",
)
@click.option(
    "--lut-dtype",
    type=click.Choice(LUT_DTYPE_NAMES),
    help="Type of the LUT entries; int4, 16 even levels, for up to 3 bits.  [default: float16]",
)
@click.option(
    "--recipe",
    type=RECIPE,
    help="YAML file or preset (8bit, 6bit, 4bit, 3bit, 2bit, 4bit-per-tensor, 4bit-int8, 3bit-int8, 3bit-int4, "
    "2bit-int4, dense).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text on which layers make up for their errors. Recommended: it is worth more than a bit.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=2),
    help="Tokens of the calibration text to use.  [default: 4096; --effort high: 65536 on CUDA, 32768 on CPU]",
)
@click.option(
    "--effort",
    type=click.Choice(["normal", "high"]),
    default="normal",
    show_default=True,
    help="high: fit indices, LUTs and norms of each layer to what the float layer makes of the calibration text. "
    "Minutes on a GPU, many on a CPU.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where --effort high fits layers, one at a time.  [default: cuda, if there is one]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps of each layer with --effort high.  [default: 100 on CUDA, 48 on the CPU]",
)
@click.option(
    "--estimate/--no-estimate",
    default=True,
    show_default=True,
    help="End with an estimate of the loss, on text that calibration did not see; takes seconds.",
)
@click.option("--adapter", help="Folder of a LoRA adapter that is merged into MODEL first; needs peft.")
@memory_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    model: str,
    output: Path,
    bits: int | None,
    target_bits: float | None,
    target_decoder_bits: float | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
    recipe: str | None,
    calibration: Path | None,
    calibration_tokens: int | None,
    effort: str,
    device: str | None,
    steps: int | None,
    estimate: bool,
    adapter: str | None,
    memory_bytes: int | None,
    overwrite: bool,
) -> None:
    """Cluster the weights of MODEL into lookup tables and write a checkpoint.

    MODEL is a Hugging Face folder, a hub id or a GGUF file; `edkm-export inspect MODEL` says what is used of it. A
    folder of sentence-transformers (modules.json) is an embedding model; it gets no estimate, `verify` measures it.
    Without a recipe, linear layers get --bits, with one LUT for every --group-size rows, embedding and output head 8
    bits with one LUT each. With --target-bits the text says which weights, embedding and output head among them, need
    more bits than others.
    """
    from edkm_export.atomic import check_output
    from edkm_export.text import check_text, read_text, token_ids

    source = find_source(model, adapter)
    check_output(output, overwrite=overwrite)
    check_text(calibration)
    if target_bits is not None and target_decoder_bits is not None:
        raise click.UsageError(
            "--target-bits is over all weights and --target-decoder-bits over the decoder; give one of them."
        )
    target = _target(target_bits, target_decoder_bits)
    plan = _recipe(recipe, bits, group_size, lut_dtype, default_bits=4 if target is None else 2)

    text = None if calibration is None else read_text(calibration)

    from edkm_export import checkpoint
    from edkm_export.api.calibration_data import CalibrationInput
    from edkm_export.api.effort import Effort
    from edkm_export.api.one_shot import palettize_language_model
    from edkm_export.api.subjects import SourceSubject
    from edkm_export.cli.console import err, megabytes, out
    from edkm_export.command_line import command_line
    from edkm_export.memory_budget import MemoryBudget

    done = palettize_language_model(
        SourceSubject(source),
        plan,
        calibration=None if text is None else CalibrationInput(str(calibration), text=text),
        calibration_tokens=calibration_tokens,
        estimate=estimate,
        command=["edkm-export", *sys.argv[1:]],
        target=target,
        tell=lambda line: err.print(line, markup=False, soft_wrap=True),
        memory=MemoryBudget.of(memory_bytes),
        effort=Effort.of(effort, device=device, steps=steps),
    )
    finished, found = done.checkpoint, done.estimate
    with err.status(f"writing {output}"):
        checkpoint.save(finished, output, overwrite=overwrite)

    weights = sum(tensor.numel for tensor in finished.palettized.values())
    out.print(
        f"{output}: {len(finished.palettized)} weights palettized with recipe {finished.recipe['name']}, "
        f"{weights:,} of {finished.numel:,} parameters",
        soft_wrap=True,
    )
    for remark in done.remarks:
        out.print(f"{model}: {remark}", soft_wrap=True)
    out.print(
        f"{megabytes(finished.size_bytes)}, {finished.bits_per_weight:.2f} bits a weight "
        f"(float16: {megabytes(finished.numel * 2)})"
    )
    if text is None and finished.palettized:
        out.print(
            "No calibration text was given. With --calibration FILE, any ordinary text, clustering keeps the weights "
            "that matter: at 4 bits and below this makes the difference between usable and not.",
            soft_wrap=True,
        )
    if found is not None:
        on = "the built-in sample" if calibration is None else f"held-out tokens of {calibration.name}"
        out.print(_describe(found, on), soft_wrap=True, markup=False)
        if not found.is_tolerable:
            tokens = 0 if text is None else len(token_ids(text, done.tokenizer, _CONTEXT))
            _print_remedy(finished, model, adapter, calibration, tokens)
    elif finished.embedding is not None:
        out.print(f"embedding model: {finished.embedding.words()}", soft_wrap=True, markup=False)
    elif estimate and calibration is not None and finished.palettized:
        out.print(
            f"No estimate of the loss: {calibration} has too few tokens to hold some out.",
            soft_wrap=True,
            markup=False,
        )
    out.print_command("next:", command_line("coreml", output))


def _describe(found: LossEstimate, on: str) -> str:
    return (
        f"estimated loss, on {found.tokens} {'tokens of ' if on.startswith('the') else ''}{on}: perplexity "
        f"{found.perplexity_original:.2f} -> {found.perplexity_palettized:.2f} (x{found.ratio:.2f}), "
        f"KL to the original {found.kl:.3f} nats a token, same top token {found.top1:.1%}"
    )


def _print_remedy(
    made: Checkpoint, model: str, adapter: str | None, calibration: Path | None, tokens: int
) -> None:
    """Say what to do about a loss that is too large."""
    from edkm_export.cli.console import out
    from edkm_export.command_line import command_line
    from edkm_export.loss_estimate import TOLERABLE_RATIO

    bits = min(tensor.n_bits for tensor in made.palettized.values())
    out.print(f"Above x{TOLERABLE_RATIO:g} the model is much worse than the original.")
    if calibration is None:
        out.print("First give a --calibration text.")
    if bits >= 4:
        out.print(f"More bits help (--bits {8 if bits > 4 else 6}), and so does training:")
    else:
        out.print("Below 4 bits use train, which wins most of it back:")
    preset = {1: "2bit", 2: "2bit", 3: "3bit"}.get(bits, "4bit")
    words = ["train", model, "--data", str(calibration or "TEXT"), "--preset", preset]
    if bits == 1:
        words += ["--bits", "1"]
    if adapter is not None:
        words += ["--adapter", adapter]
    if calibration is not None and tokens < _CONTEXT:
        words += ["--context", str(tokens)]
    name = Path(model).stem.lower() if Path(model).is_file() else Path(model).name
    out.print_command("", command_line(*words, "-o", _free(f"{name}-{preset}")))
    if calibration is None:
        out.print("(TEXT is any ordinary text of some thousand words.)")


def _free(name: str) -> str:
    """A name that nothing has yet."""
    numbers = itertools.count(2)
    found = name
    while Path(found).exists():
        found = f"{name}-{next(numbers)}"
    return found


def _target(whole: float | None, decoder: float | None) -> BitTarget | None:
    if whole is None and decoder is None:
        return None
    from edkm_export.training.bit_budget import BitTarget

    if whole is not None:
        return BitTarget(whole, whole=True)
    assert decoder is not None
    return BitTarget(decoder, whole=False)


def _recipe(
    reference: str | None,
    bits: int | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
    *,
    default_bits: int,
) -> Recipe:
    from edkm_export.recipe import load_recipe, uniform_recipe

    if reference is None:
        return uniform_recipe(
            default_bits if bits is None else bits,
            16 if group_size is None else group_size,
            lut_dtype or "float16",
            fit_groups=group_size is None,
        )
    if bits is not None or group_size is not None or lut_dtype is not None:
        raise click.UsageError(
            "--recipe decides bits, groups and LUT dtype; leave --bits, --group-size and --lut-dtype out."
        )
    return load_recipe(reference)
