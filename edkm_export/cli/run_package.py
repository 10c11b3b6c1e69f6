"""edkm-export run: run a Core ML package on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from converters.coreml.read.program import Function

__all__ = ["command"]


@click.command("run", short_help="Run any Core ML package on arrays or images.")
@click.argument("package", metavar="PACKAGE", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    metavar="NAME=FILE",
    multiple=True,
    help="An input: a .npy file, or an image where the package takes one. Once for each input.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The .npz file to write."
)
@click.option("--function", help="Function of the package; its default one if left out.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "rounded", "float16"]),
    default="float32",
    show_default=True,
    help="float32 throughout, float32 rounded to float16 after each op, or float16 arithmetic.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the ops that draw random numbers."
)
@click.option("--overwrite", is_flag=True, help="Replace the output file.")
def command(
    package: Path,
    inputs: tuple[str, ...],
    output: Path,
    function: str | None,
    precision: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Run PACKAGE, an .mlpackage with an ML program, in the interpreter of Core ML programs.

    No Mac is needed, and nothing of Core ML takes part: see docs/interpreter.md for what that means. Outputs are
    written by name. States start at zero. Without --input, an error lists the inputs.
    """
    import numpy as np

    from converters.coreml import load_package
    from edkm_export.atomic import atomic_file, check_output
    from edkm_export.cli.console import err, out
    from edkm_export.errors import InputError

    if output.suffix != ".npz":
        raise InputError(f"{output}: outputs are written as .npz.")
    check_output(output, overwrite=overwrite)
    with err.status(f"reading {package}"):
        loaded = load_package(package)
        name = function or loaded.default_function
        if name not in loaded.functions:
            raise InputError(f"{package}: no function {name!r}; it has {', '.join(loaded.functions)}.")
        chosen = loaded.functions[name]
        given = dict(_read(text, chosen) for text in inputs)
    state = loaded.new_state(name) if chosen.states else None
    with err.status(f"running {name}"):
        results = loaded.run(given, function=name, state=state, precision=precision, seed=seed)
    with atomic_file(output, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        np.savez(file, **_arrays(results))
    for key, value in results.items():
        out.print(f"{key}: {_words(value)}", soft_wrap=True, markup=False)
    if loaded.draws_random_numbers(name):
        out.print(
            f"The program draws random numbers, here with seed {seed}; a device draws others.", soft_wrap=True
        )
    out.print(f"written to {output}", soft_wrap=True, markup=False)


def _read(text: str, function: Function) -> tuple[str, Tensor]:
    """One --input."""
    import numpy as np
    import torch

    from converters.coreml.read.images import read_image
    from edkm_export.errors import InputError
    from edkm_export.regular_file import require_regular

    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise InputError(f"--input {text!r}: expected NAME=FILE.")
    path = Path(file)
    try:
        require_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from error
    if name not in function.inputs:
        known = ", ".join(f"{key} ({spec.type})" for key, spec in function.inputs.items()) or "none"
        raise InputError(f"function {function.name} has no input {name!r}; its inputs are {known}.")
    if path.suffix != ".npy":
        if name not in function.images:
            raise InputError(f"{path}: input {name!r} is no image; give it as .npy.")
        return name, read_image(path, function.inputs[name], function.images[name])
    try:
        array = np.load(path, allow_pickle=False)
        return name, torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except (ValueError, TypeError, EOFError, MemoryError) as error:
        raise InputError(f"{path}: not an array that can be used ({error}).") from error


def _arrays(results: dict[str, Any]) -> dict[str, Any]:
    """Outputs as arrays; a dictionary of probabilities becomes two, its labels and its values."""
    import numpy as np
    from torch import Tensor

    arrays: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Tensor):
            arrays[key] = value.numpy()
        elif isinstance(value, dict):
            arrays[f"{key}.labels"] = np.array(list(value))
            arrays[key] = np.array(list(value.values()))
        else:
            arrays[key] = np.array(value)
    return arrays


def _words(value: Any) -> str:
    from torch import Tensor

    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {list(value.shape)}"
    if isinstance(value, dict):
        best = sorted(value.items(), key=lambda item: -item[1])[:5]
        return ", ".join(f"{label} {score:.4g}" for label, score in best) + (
            ", ..." if len(value) > 5 else ""
        )
    return str(value)
