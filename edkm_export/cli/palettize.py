"""edkm-export palettize: one-shot palettization of a float model."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.lut_dtypes import LUT_DTYPE_NAMES

if TYPE_CHECKING:  # importing it takes torch, which `--help` must not wait for
    from edkm_export.lut_dtypes import LutDtype
    from edkm_export.recipe import Recipe

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
    help="YAML file or preset (8bit, 6bit, 4bit, 3bit, 2bit, 4bit-per-tensor, 4bit-int8, 3bit-int8, 3bit-int4, "
    "2bit-int4, dense).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text whose activations weigh the clustering. Recommended: it is worth about a bit.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens of the calibration text to use.",
)
@click.option("--adapter", help="Folder of a LoRA adapter that is merged into MODEL first; needs peft.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    model: str,
    output: Path,
    bits: int | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
    recipe: str | None,
    calibration: Path | None,
    calibration_tokens: int,
    adapter: str | None,
    overwrite: bool,
) -> None:
    """Cluster the weights of MODEL into lookup tables and write a checkpoint.

    MODEL is a Hugging Face folder, a hub id or a GGUF file; `edkm-export inspect MODEL` says what is used of it.
    Linear layers get --bits in groups of --group-size rows, the embedding and the output head 8 bits with one LUT
    each; a --recipe decides otherwise.
    """
    from edkm_export.atomic import check_output
    from edkm_export.reference import source as sources

    source = sources.Source.parse(model, adapter)
    check_output(output, overwrite=overwrite)
    plan = _recipe(recipe, bits, group_size, lut_dtype)

    from edkm_export import checkpoint
    from edkm_export.cli.console import bar, err, megabytes, out
    from edkm_export.command_line import command_line
    from edkm_export.decoder.build import decoder_config
    from edkm_export.palettization import palettizable_shapes, palettize_model
    from edkm_export.text import read_text, token_windows
    from edkm_export.versions import library_versions

    text = read_text(calibration) if calibration is not None else None
    with err.status(f"loading {model}"):
        # refuses a family that could not be exported
        decoder_config(sources.load_config(source).to_dict(), model)
        account = sources.account(source)
        account.require_understood()
        tokenizer = sources.load_tokenizer(source)
        count = sources.value_count(source)
        loaded = sources.load_model(source) if count is None else None
    if count is not None:
        with bar(f"reading {Path(model).name}", count) as advance:
            loaded = sources.load_model(source, advance=advance)
    assert loaded is not None
    rules = plan.plan(palettizable_shapes(loaded), model)

    energy = None
    provenance: dict[str, Any] = {
        "versions": library_versions(),
        "command": ["edkm-export", *sys.argv[1:]],
        "seed": None,
        "base_model": source.provenance(),
        "source": account.provenance(),
    }
    if text is not None:
        from edkm_export.calibration import input_energy

        windows = token_windows(
            text, tokenizer, tokens=calibration_tokens, context=_CONTEXT, source=str(calibration)
        )
        with bar("calibrating", len(windows)) as advance:
            energy = input_energy(loaded, windows, advance=lambda: advance(1))
        provenance["calibration"] = {
            "text": str(calibration),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": windows.numel(),
        }

    shapes = palettizable_shapes(loaded)
    files, config = sources.tokenizer_files(tokenizer, loaded), loaded.config.to_dict()
    total = sum(shapes[name][0] * shapes[name][1] for name in rules)
    with bar("palettizing", total) as advance:
        parts = palettize_model(
            loaded, plan, energy=energy, source=model, advance=lambda _name, count: advance(count)
        )
    finished = checkpoint.Checkpoint(
        config=config,
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        tokenizer=files,
        recipe=plan.model_dump(mode="json"),
        provenance=provenance,
    )
    with err.status(f"writing {output}"):
        checkpoint.save(finished, output, overwrite=overwrite)

    weights = sum(tensor.numel for tensor in finished.palettized.values())
    out.print(
        f"{output}: {len(finished.palettized)} weights palettized with recipe {plan.name}, "
        f"{weights:,} of {finished.numel:,} parameters",
        soft_wrap=True,
    )
    for remark in account.remarks:
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
    out.print_command("next:", command_line("coreml", output))


def _recipe(
    reference: str | None,
    bits: int | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
) -> Recipe:
    from edkm_export.recipe import load_recipe, uniform_recipe

    if reference is None:
        return uniform_recipe(
            4 if bits is None else bits, 16 if group_size is None else group_size, lut_dtype or "float16"
        )
    if bits is not None or group_size is not None or lut_dtype is not None:
        raise click.UsageError(
            "--recipe decides bits, groups and LUT dtype; leave --bits, --group-size and --lut-dtype out."
        )
    return load_recipe(reference)
