"""edkm-export inspect: what is inside a source, a checkpoint or an exported model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.cli.parameter_types import find_source

if TYPE_CHECKING:  # importing it takes torch, which `--help` must not wait for
    from edkm_export.embedding_settings import EmbeddingSettings
    from edkm_export.palette import PalettizedTensor
    from edkm_export.reference.account import Account

__all__ = ["command"]

_WIDEST = 160  # characters of a setting; vocabularies have 260,000 entries


@click.command("inspect", short_help="Show what is inside a source, a checkpoint or an exported model.")
@click.argument("path", metavar="MODEL|MODEL.PT|OUT", type=click.Path(path_type=Path))
@click.option("--adapter", help="With a source: folder of a LoRA adapter that would be merged into it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(path: Path, adapter: str | None, as_json: bool) -> None:
    """Show what would be used of a source, or functions, inputs, states, op counts and every palettized weight.

    MODEL is a Hugging Face folder, a hub id, a GGUF file or a LoRA adapter: its account says which tensors and
    settings are used, which change no logit, and which are not understood, so that the model would be refused (exit
    status 2).
    OUT is the folder that `edkm-export coreml`, `onnx` or `coreai` made, or the model in it. Everything is read from
    the bytes on disk.
    """
    from converters.coreai.read.folder import is_coreai

    if not path.exists() or adapter is not None or _is_source(path):
        _show_source(path, adapter, as_json)
        return
    from converters.onnx.read.folder import is_onnx

    if is_onnx(path):
        description = _describe_onnx(path)
    elif is_coreai(path):
        description = _describe_coreai(path)
    else:
        description = _describe_package(path) if path.is_dir() else _describe_checkpoint(path)
    if as_json:
        click.echo(json.dumps(description, indent=2))
    else:
        _print(description)


def _is_source(path: Path) -> bool:
    """A model that could be palettized, not one that we made."""
    from edkm_export.atomic import MARKER

    if path.is_file():
        return path.suffix.lower() == ".gguf"
    named = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    return named and not (path / MARKER).is_file()


def _is_adapter(path: Path) -> bool:
    """A folder with nothing else."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _show_source(path: Path, adapter: str | None, as_json: bool) -> None:
    from edkm_export.errors import SourceError

    if adapter is None and _is_adapter(path):
        from edkm_export.reference.adapters import Adapter

        found = Adapter.open(str(path)).account()
    else:
        source = find_source(str(path), adapter)
        from edkm_export.reference.source import account

        found = account(source)
    if as_json:
        click.echo(json.dumps({"path": str(path), **asdict(found)}, indent=2, default=str))
    else:
        _print_account(found)
    if found.not_understood:
        name, why = next(iter(found.not_understood.items()))
        raise SourceError(f"{path}: {name}: {why}; it would be refused.")


def _print_account(found: Account) -> None:
    from rich.table import Table

    from edkm_export.cli.console import out, print_wide

    out.print(f"{found.source}: {found.kind}", soft_wrap=True)
    out.print(
        f"{len(found.tensors)} tensors and {len(found.settings)} settings are used, {len(found.without_effect)} are "
        f"without effect, {len(found.not_understood)} are not understood",
        soft_wrap=True,
    )
    if found.origin.license:
        named = found.origin.license_name or found.origin.license
        out.print(f"  licence: {named} ({found.origin.license_from})", soft_wrap=True, markup=False)
    if found.origin.base_models:
        bases = ", ".join(found.origin.base_models)
        out.print(f"  model on the hub: {bases} ({found.origin.base_from})", soft_wrap=True, markup=False)
    for remark in found.remarks:
        out.print(f"  {remark}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("setting or tensor", "what becomes of it", "value or reason"):
        table.add_column(column, no_wrap=True)
    for words, rows in (
        ("not understood", found.not_understood),
        ("used", found.settings),
        ("without effect", found.without_effect),
    ):
        for name, value in rows.items():
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            cut = shown if len(shown) <= _WIDEST else f"{shown[:_WIDEST]}... (--json has it all)"
            table.add_row(name, words, cut)
    stems = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in found.tensors)
    for stem, count in stems.items():  # layers that are alike are one line
        table.add_row(stem, "used", f"{count} tensor{'s' if count > 1 else ''}")
    print_wide(table)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from edkm_export.checkpoint import load

    checkpoint = load(path)
    return {
        "path": str(path),
        "kind": "checkpoint",
        "model_type": checkpoint.config.get("model_type"),
        "recipe": checkpoint.recipe.get("name"),
        "format_version": checkpoint.format_version,
        "weakness": checkpoint.weakness,
        "parameters": checkpoint.numel,
        "size_bytes": path.stat().st_size,
        "bits_per_weight": checkpoint.bits_per_weight,
        "tied": checkpoint.tied,
        "functions": [],
        **_describe_embedding(checkpoint.embedding),
        "palettized": [_describe_tensor(tensor) for tensor in checkpoint.palettized.values()],
        "dense": {name: list(tensor.shape) for name, tensor in checkpoint.dense.items()},
    }


def _describe_embedding(settings: EmbeddingSettings | None) -> dict[str, Any]:
    """What an embedding model does with its token vectors; nothing of a language model."""
    if settings is None:
        return {}
    return {"embedding": {"words": settings.words(), **settings.model_dump(mode="json")}}


def _describe_package(path: Path) -> dict[str, Any]:
    from converters.coreml import load_package
    from converters.coreml.read.folder import find_package

    package = load_package(find_package(path))
    palettized: dict[str, PalettizedTensor] = {}
    dense: dict[str, Any] = {}
    others: dict[str, str] = {}
    functions = []
    for name, function in package.functions.items():
        held, apart = package.palettes(name)
        palettized |= held
        others |= apart
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
        "other_palettes": others,
        "dense": {name: list(tensor.shape) for name, tensor in dense.items()},
    }


def _describe_onnx(path: Path) -> dict[str, Any]:
    from converters.onnx import load_graph

    found = load_graph(path)
    domains = (f"{domain or 'ai.onnx'} {version}" for domain, version in found.graph.opsets.items())
    function = {
        "name": "main",
        "opset": ", ".join(domains),
        "inputs": {key: str(value) for key, value in found.inputs.items()},
        "outputs": {key: str(value) for key, value in found.outputs.items()},
        "states": {},
        "op_counts": found.op_counts(),
    }
    parameters = found.description.dense
    return {
        "path": str(found.path),
        "kind": "ONNX folder",
        "profile": found.profile,
        **_describe_embedding(found.description.embedding),
        "context_length": found.description.context,
        "kv_cache": found.description.kv_cache,
        "size_bytes": found.size_bytes,
        "weights_size_bytes": found.weights_size_bytes,
        "tied": dict(found.description.tied),
        "functions": [function],
        "palettized": [_describe_tensor(tensor) for tensor in found.palettized().values()],
        "dense": {name: list(tensor.shape) for name, tensor in found.dense().items() if name in parameters},
    }


def _describe_coreai(path: Path) -> dict[str, Any]:
    from converters.coreai import load_asset

    found = load_asset(path)
    functions = [
        {
            "name": name,
            "opset": "aicode 5",
            "inputs": {key: str(value) for key, value in function.inputs.items()},
            "outputs": {key: str(value) for key, value in function.outputs.items()},
            "states": {key: str(value) for key, value in function.states.items()},
            "op_counts": function.op_counts(),
        }
        for name, function in found.program.public.items()
    ]
    described: dict[str, Any] = {
        "path": str(found.path),
        "kind": "Core AI model",
        "size_bytes": found.size_bytes,
        "weights_size_bytes": found.constants_size_bytes,
        "functions": functions,
    }
    if not found.is_ours:  # the format keeps no names of weights
        palettes = found.palettes()
        named = [
            palette.tensor(f"palette {place}", palette.dense_shape, palette.n_bits)
            for place, palette in enumerate(palettes)
        ]
        return {**described, "palettized": [_describe_tensor(tensor) for tensor in named], "dense": {}}
    told = found.description
    return {
        **described,
        "interface": told.interface,
        "context_length": told.context,
        "kv_cache": told.kv_cache,
        "tied": dict(told.tied),
        "palettized": [_describe_tensor(tensor) for tensor in found.palettized().values()],
        "dense": {name: list(tensor.shape) for name, tensor in found.dense().items()},
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
        "lut_dtype": tensor.lut_dtype,
        "used_centroids": int(tensor.used_centroids.sum()),
        "centroids": groups_out * groups_in << tensor.n_bits,
        "size_bytes": tensor.size_bytes,
        "bits_per_weight": tensor.bits_per_weight,
    }


def _by_layer(forms: Mapping[str, str]) -> dict[str, str]:
    """Put what differs in the number of a layer alone on one line: `present.0-29.key`."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name, form in forms.items():
        found = re.search(r"\.(\d+)\.", name)
        stem = name if found is None else f"{name[: found.start(1)]}#{name[found.end(1) :]}"
        numbers.setdefault((stem, form), []).append("" if found is None else found[1])
    return {
        stem.replace("#", layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"): form
        for (stem, form), layers in numbers.items()
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
        if description["weakness"]:
            out.print(f"- {description['weakness']}", soft_wrap=True, markup=False)
    if "embedding" in description:
        found = description["embedding"]
        prompts = ", ".join(found["prompts"]) or "none"
        out.print(
            f"embedding model: {found['words']}; texts of {found['max_tokens']:,} tokens, prompts: {prompts}",
            soft_wrap=True,
            markup=False,
        )
    if description["kind"] == "ONNX folder":
        out.print(
            f"runtime profile {description['profile']}, context of {description['context_length']:,} positions, "
            f"weights {megabytes(description['weights_size_bytes'])}",
            soft_wrap=True,
        )
    if "interface" in description:
        out.print(
            f"interface {description['interface']}, context of {description['context_length']:,} positions, "
            f"weights {megabytes(description['weights_size_bytes'])}",
            soft_wrap=True,
        )
    if description.get("kv_cache") == "int8":
        out.print("keys and values are int8, with a scale for each head and token", soft_wrap=True)
    for function in description["functions"]:
        out.print(f"\nfunction {function['name']} ({function['opset']})")
        for kind in ("inputs", "outputs", "states"):
            for name, form in _by_layer(function[kind]).items():
                out.print(f"  {kind.removesuffix('s')} {name}: {form}", soft_wrap=True)
        counts = ", ".join(f"{name} {count}" for name, count in function["op_counts"].items())
        out.print(f"  ops: {counts}", soft_wrap=True)
    rows = description["palettized"]
    dense = description["dense"]
    for reason in description.get("other_palettes", {}).values():
        out.print(
            f"a palette of another tool, which runs but is not listed: {reason}", soft_wrap=True, markup=False
        )
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
