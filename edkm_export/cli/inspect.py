"""edkm-export inspect: what is inside a package or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # importing it takes torch, which `--help` must not wait for
    from edkm_export.palette import PalettizedTensor

__all__ = ["command"]


@click.command("inspect", short_help="Show what is inside a package or a checkpoint.")
@click.argument("path", metavar="PACKAGE|MODEL.PT", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(path: Path, as_json: bool) -> None:
    """Show functions, inputs, states, op counts and every palettized weight.

    PACKAGE is an .mlpackage or the folder that `edkm-export coreml` made. Everything is read from the bytes on disk.
    """
    from edkm_export.errors import InputError

    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    description = _describe_package(path) if path.is_dir() else _describe_checkpoint(path)
    if as_json:
        click.echo(json.dumps(description, indent=2))
    else:
        _print(description)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from edkm_export.checkpoint import load

    checkpoint = load(path)
    return {
        "path": str(path),
        "kind": "checkpoint",
        "model_type": checkpoint.config.get("model_type"),
        "recipe": checkpoint.recipe.get("name"),
        "parameters": checkpoint.numel,
        "size_bytes": path.stat().st_size,
        "bits_per_weight": checkpoint.bits_per_weight,
        "tied": checkpoint.tied,
        "functions": [],
        "palettized": [_describe_tensor(tensor) for tensor in checkpoint.palettized.values()],
        "dense": {name: list(tensor.shape) for name, tensor in checkpoint.dense.items()},
    }


def _describe_package(path: Path) -> dict[str, Any]:
    from converters.coreml import load_package
    from converters.coreml.bundle import find_package

    package = load_package(find_package(path))
    palettized: dict[str, PalettizedTensor] = {}
    dense: dict[str, Any] = {}
    functions = []
    for name, function in package.functions.items():
        palettized |= package.palettized(name)
        dense |= package.dense(name)
        functions.append(
            {
                "name": name,
                "opset": function.opset,
                "inputs": {key: str(value.type) for key, value in function.inputs.items()},
                "outputs": {key: str(value) for key, value in function.outputs.items()},
                "states": {key: str(value.type) for key, value in function.states.items()},
                "op_counts": package.op_counts(name),
            }
        )
    return {
        "path": str(package.path),
        "kind": "Core ML package",
        "size_bytes": package.size_bytes,
        "functions": functions,
        "palettized": [_describe_tensor(tensor) for tensor in palettized.values()],
        "dense": {name: list(tensor.shape) for name, tensor in dense.items()},
    }


def _describe_tensor(tensor: PalettizedTensor) -> dict[str, Any]:
    groups_out, groups_in = tensor.groups
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "n_bits": tensor.n_bits,
        "groups": [groups_out, groups_in],
        "group_size": tensor.group_size,
        "dim": tensor.dim,
        "lut_dtype": "float16" if tensor.lut_scale is None else "int8",
        "used_centroids": int(tensor.used_centroids.sum()),
        "centroids": groups_out * groups_in << tensor.n_bits,
        "size_bytes": tensor.size_bytes,
        "bits_per_weight": tensor.bits_per_weight,
    }


def _print(description: Mapping[str, Any]) -> None:
    from rich.table import Table

    from edkm_export.cli.console import megabytes, out, print_wide

    out.print(
        f"{description['path']}: {description['kind']}, {megabytes(description['size_bytes'])}",
        soft_wrap=True,
    )
    if description["kind"] == "checkpoint":
        out.print(
            f"{description['model_type']}, {description['parameters']:,} parameters, recipe {description['recipe']}, "
            f"{description['bits_per_weight']:.2f} bits a weight",
            soft_wrap=True,
        )
    for function in description["functions"]:
        out.print(f"\nfunction {function['name']} ({function['opset']})")
        for kind in ("inputs", "outputs", "states"):
            for name, form in function[kind].items():
                out.print(f"  {kind.removesuffix('s')} {name}: {form}", markup=False)
        counts = ", ".join(f"{name} {count}" for name, count in function["op_counts"].items())
        out.print(f"  ops: {counts}", soft_wrap=True)
    rows = description["palettized"]
    dense = description["dense"]
    if rows:
        out.print(f"\n{len(rows)} palettized weights")
        table = Table(box=None, pad_edge=False)
        table.add_column("weight", no_wrap=True)
        for column in ("shape", "bits", "LUTs", "LUT dtype", "used centroids", "bytes", "bits a weight"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["name"],
                "x".join(map(str, row["shape"])),
                str(row["n_bits"]),
                f"{row['groups'][0]}x{row['groups'][1]}" + (f" dim {row['dim']}" if row["dim"] > 1 else ""),
                row["lut_dtype"],
                f"{row['used_centroids']} of {row['centroids']}",
                f"{row['size_bytes']:,}",
                f"{row['bits_per_weight']:.3f}",
            )
        print_wide(table)
    out.print(f"{len(dense)} tensors are not palettized" + ("; --json lists them" if dense else ""))
