"""edkm-export import: palettes that another tool learned become a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edkm_export.cli.parameter_types import FILE, find_source
from edkm_export.errors import InputError

__all__ = ["command"]


@click.command("import", short_help="Make a checkpoint of a model that another tool palettized.")
@click.argument("file", metavar="FILE", type=FILE)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The model.pt to write.")
@click.option(
    "--model",
    help="The model that was palettized: its configuration and tokenizer are used.  [default: the folder of FILE]",
)
@click.option(
    "--group-size",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Output rows that share a LUT, where the file does not say it; 0: one LUT a weight.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(file: Path, output: Path, model: str | None, group_size: int, overwrite: bool) -> None:
    """Read FILE, the state dict of a palettized model, and write a model.pt with the same palettes.

    FILE is what `torch.save(model.state_dict(), FILE)` wrote, or safetensors: of a model that coremltools or
    coreai-opt has finalized, or of one whose weights take few values each. LUTs are rounded to float16, as every
    export holds them.
    """
    folder = Path(model or file.parent)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: holds a LoRA adapter, and a palettized model has no weights left to merge it into; give the "
            "folder of the merged model."
        )
    source = find_source(str(folder))

    from edkm_export import checkpoint
    from edkm_export.atomic import check_output
    from edkm_export.cli.console import err, out
    from edkm_export.command_line import command_line
    from edkm_export.importing import as_checkpoint, import_state, read_state

    check_output(output, overwrite=overwrite)
    with err.status(f"reading {file}"):
        imported = import_state(read_state(file), str(file), group_size)
        made = as_checkpoint(imported, source, file, ["edkm-export", *sys.argv[1:]])
    with err.status(f"writing {output}"):
        checkpoint.save(made, output, overwrite=overwrite)
    out.print(
        f"{output}: {len(made.palettized)} palettized weights imported, {len(made.dense)} others; "
        f"{made.bits_per_weight:.2f} bits a weight",
        soft_wrap=True,
    )
    out.print_command("next:", command_line("coreml", output))
