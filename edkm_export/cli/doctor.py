"""edkm-export doctor: what this machine can do, and what a model would take on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.cli.parameter_types import find_source

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.forecast import ModelSize, Step
    from edkm_export.machine import Library, Machine

__all__ = ["command"]

_GB = 1e9


@click.command("doctor", short_help="Show what this machine can do, and what a model would take on it.")
@click.argument("model", required=False)
@click.option("--adapter", help="With MODEL: folder of a LoRA adapter that would be merged into it.")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens of the verification that is estimated.",
)
def command(model: str | None, adapter: str | None, tokens: int) -> None:
    """Show back ends, device, free memory and disk, and what can be done with them.

    With MODEL, a Hugging Face folder, a hub id or a GGUF file, also its size at each preset, and time and peak memory
    of each command. Only headers are read: no weight is loaded.
    """
    from edkm_export._version import __version__
    from edkm_export.machine import Machine, find_libraries

    source = None if model is None else find_source(model, adapter)
    if adapter is not None and source is None:
        raise click.UsageError("--adapter goes with a MODEL.")

    from edkm_export.cli.console import err, out

    with err.status("looking around"):
        machine, libraries = Machine.look(Path.cwd()), find_libraries()
    out.print(f"edkm-export {__version__} on {machine.system}", soft_wrap=True)
    _print_rows(("back end", "version", "for"), [_library_row(each) for each in libraries])
    _print_rows(("this machine", "what there is"), list(_machine_rows(machine)))
    _print_rows(("what it can do", "", "how, or why not"), list(_abilities(machine, libraries)))
    if source is None:
        return

    from edkm_export.forecast import ModelSize
    from edkm_export.reference.outline import outline

    with err.status(f"reading {model}"):
        size = ModelSize.of(outline(source))
    _print_model(source.reference, size, machine, tokens)


def _library_row(library: Library) -> tuple[str, str, str]:
    back_end = library.back_end
    if library.version is None:
        return back_end.package, "missing", f"{back_end.purpose}: {back_end.install}"
    return back_end.package, library.version, back_end.purpose


def _machine_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.gpu is None:
        yield "device", f"CPU, {machine.cores} cores; torch finds no CUDA device"
    else:
        count = "" if machine.gpu_count == 1 else f", {machine.gpu_count} of them"
        free = f"{machine.gpu_free_bytes / _GB:.1f} GB free"
        yield "device", f"CUDA: {machine.gpu}{count}, {free}; CPU, {machine.cores} cores"
    yield "memory", f"{machine.memory_bytes / _GB:.1f} GB, {machine.free_memory_bytes / _GB:.1f} GB free"
    yield "disk", f"{machine.free_disk_bytes / _GB:.1f} GB free in {Path.cwd()}"


def _abilities(machine: Machine, libraries: Sequence[Library]) -> Iterator[tuple[str, str, str]]:
    """What can be done, yes or no, and why or how."""
    from converters.coreai.backend import missing_backend

    missing = {each.back_end.package: each.back_end.install for each in libraries if each.version is None}

    def needing(ability: str, packages: Sequence[str], how: str = "") -> tuple[str, str, str]:
        lacking = [package for package in packages if package in missing]
        if lacking:
            return ability, "no", f"{', '.join(lacking)} missing: {missing[lacking[0]]}"
        return ability, "yes", how

    yield needing("palettize, inspect", ["torch", "transformers"])
    if machine.gpu is None:
        yield needing(
            "train", ["torch", "transformers"], "on the CPU, which is for small models and short runs"
        )
    elif machine.gpu_count > 1:
        several = f"torchrun --nproc-per-node {machine.gpu_count} -m edkm_export train ..."
        yield needing("train", ["torch", "transformers"], f"on the GPU; on all of them: {several}")
    else:
        yield needing("train", ["torch", "transformers"], "on the GPU")
    yield needing(
        "coreml, verify of Core ML", ["coremltools"], "run by our own interpreter of Core ML programs"
    )
    if machine.is_mac:
        yield needing("Apple's Core ML runtime", ["coremltools"], "verify runs packages in it too")
    else:
        yield "Apple's Core ML runtime", "no", "needs macOS; verify says NOT RUN"
    yield needing("onnx", ["onnx", "onnxruntime"])
    yield needing("verify of ONNX", ["onnx", "onnxruntime"], "run by onnxruntime")
    reason = missing_backend()  # Apple publishes its packages for few platforms
    yield "coreai, verify of Core AI", "no" if reason else "yes", reason or "run by Apple's Core AI runtime"
    yield needing("GGUF files as MODEL", ["gguf"])
    yield needing("--adapter", ["peft"])


def _print_model(reference: str, size: ModelSize, machine: Machine, tokens: int) -> None:
    from edkm_export.cli.console import megabytes, out
    from edkm_export.forecast import BASIS, GPU_BASIS, forecast_steps
    from edkm_export.recipe import PRESETS

    out.print()
    out.print(
        f"{reference}: {size.parameters:,} parameters, {size.layers} layers, vocabulary of {size.vocabulary:,}; "
        f"{megabytes(size.float16_bytes)} in float16",
        soft_wrap=True,
        markup=False,
    )
    _print_rows(("preset", "bits a decoder weight", "size", "of float16"), list(_size_rows(size, reference)))
    on_gpu = machine.gpu is not None
    made = size.footprint(PRESETS["4bit"], reference).size_bytes
    steps = forecast_steps(size, made, tokens=tokens, gpu=on_gpu)
    rows = [
        (
            f"edkm-export {step.command}",
            f"about {_time(step.seconds)}" + (f" for {step.per}" if step.per else ""),
            f"{step.memory_bytes / _GB:.1f} GB" + (" of the GPU" if step.on_gpu else ""),
            _size(step.disk_bytes) if step.disk_bytes else "-",
        )
        for step in steps
    ]
    _print_rows(("command, at 4 bits", "time", "peak memory", "writes"), rows)
    basis = f"{BASIS}; training: {GPU_BASIS}" if on_gpu else BASIS
    out.print(
        f"Times and memory are estimates, good to about a factor of two: lines through figures of {basis}. This "
        f"machine has {machine.cores} cores.",
        soft_wrap=True,
    )
    for line in _warnings(steps, machine):
        out.print(f"warning: {line}", soft_wrap=True, markup=False)


def _size_rows(size: ModelSize, reference: str) -> Iterator[tuple[str, str, str, str]]:
    from edkm_export.cli.console import megabytes
    from edkm_export.recipe import PRESETS
    from edkm_export.training.preparation import base_recipe
    from edkm_export.training.train_config import PRESETS as TRAINING

    recipes: list[tuple[str, Any, float | None]] = [
        (f"palettize --recipe {name}", recipe, None) for name, recipe in PRESETS.items()
    ]
    recipes += [
        (f"train --preset {name}", base_recipe(config), config.target_decoder_bits)
        for name, config in TRAINING.items()
    ]
    for name, recipe, target in recipes:
        found = size.footprint(recipe, reference, target_decoder_bits=target)
        bits = "-" if found.decoder_bits is None else f"{found.decoder_bits:.2f}"
        yield name, bits, megabytes(found.size_bytes), f"{found.size_bytes / size.float16_bytes:.0%}"


def _size(size_bytes: float) -> str:
    from edkm_export.cli.console import megabytes

    return f"{size_bytes / _GB:.1f} GB" if size_bytes >= _GB else megabytes(size_bytes)


def _time(seconds: float) -> str:
    if seconds < 0.95:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_RELIEF = {
    "train": "use --batch-size 1 --accumulate 4, a smaller --context, or --gradient-checkpointing",
    "verify": "what does not fit is run layer by layer, which takes longer; use fewer --tokens",
}


def _warnings(steps: Sequence[Step], machine: Machine) -> Iterator[str]:
    """What does not suffice, and the way out."""
    for step in steps:
        free = machine.gpu_free_bytes if step.on_gpu else machine.free_memory_bytes
        if step.memory_bytes > free:
            name = step.command.split()[0].rstrip(",")
            relief = _RELIEF.get(name, "close other programs, or use a machine with more memory")
            yield (
                f"{name} takes about {step.memory_bytes / _GB:.1f} GB of memory, and {free / _GB:.1f} GB are free; "
                f"{relief}."
            )
    needed = sum(step.disk_bytes for step in steps)
    if needed > machine.free_disk_bytes:
        yield (
            f"all of them write about {needed / _GB:.1f} GB, and {machine.free_disk_bytes / _GB:.1f} GB are free on "
            "the disk; free some, or work in another folder."
        )


def _print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from edkm_export.cli.console import out

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    out.print()
    out.print(table)
