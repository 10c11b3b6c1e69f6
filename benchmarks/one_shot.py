r"""One-shot palettization of a model: k-means weighted by activations, and layers that make up for their errors.

    python -m benchmarks.one_shot MODEL --calibration TEXT --text cfi.txt:0.3 --text devil.txt --bits 4 --bits 3.25

Perplexity, KL to the original and top-1 agreement on each text, in windows of 512. Bits that are not whole are mixed
up to that average over the decoder, LUTs included, by Fisher information, as the presets of `train` do. A text
FILE:0.3 starts at 30% of the file's characters; it must not be the calibration text. With `--target-bits` rows
follow whose bits are chosen over all weights, embedding and output head among them, as `palettize --target-bits` does.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.accuracy import split
from edkm_export.api.bit_choice import choose_bits
from edkm_export.calibration import input_energy
from edkm_export.palettization import PalettizedModel, palettizable_shapes, palettize_model
from edkm_export.recipe import Recipe, uniform_recipe
from edkm_export.reference.conv1d import as_linear, held_weight
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.text import read_text, token_windows
from edkm_export.training.bit_budget import LEAST_BITS, BitTarget
from edkm_export.training.evaluation import Evaluation, evaluate
from edkm_export.training.sensitivity import (
    Sensitivity,
    allocate_bits,
    fisher_factors,
    mixed_recipe,
    wider_rules,
)

CONTEXT = 512


def recipe_of(model: Any, windows: Tensor, bits: float) -> Recipe:
    """Of so many bits in groups of 16 rows, mixed where they are not whole."""
    base = uniform_recipe(int(bits), fit_groups=True)
    if bits == int(bits):
        return base
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    rules = base.plan(palettizable_shapes(model), "model")
    plan = {name: rule for name, rule in rules.items() if model.get_submodule(name) not in outer}
    weights = {name: held_weight(model.get_submodule(name)) for name in plan}
    choices = {name: wider_rules(rule) for name, rule in plan.items()}
    found = Sensitivity(weights, choices, fisher_factors(model, windows))
    budget = int(bits * sum(weight.numel() for weight in weights.values()))
    chosen = allocate_bits(found.sizes, found.loss, budget)
    return mixed_recipe(base, {name: choices[name][size] for name, size in chosen.items()}, plan)


def methods(windows: Tensor) -> dict[str, Callable[[Any, Recipe], PalettizedModel]]:
    return {
        "weighted k-means": lambda model, recipe: palettize_model(
            model, recipe, energy=input_energy(model, windows)
        ),
        "errors made up for": lambda model, recipe: palettize_model(model, recipe, windows=windows),
    }


def to_target(model: Any, windows: Tensor, bits: float) -> PalettizedModel:
    """At so many bits over all weights."""
    base, target = uniform_recipe(LEAST_BITS, fit_groups=True), BitTarget(bits, whole=True)
    shapes = palettizable_shapes(model)
    plan, vocabulary = choose_bits(model, shapes, base, target, windows, source="model")
    Console().print(plan.words())
    return palettize_model(model, plan.recipe, windows=windows, vocabulary=vocabulary)


def all_bits(parts: PalettizedModel) -> float:
    """Bits over all weights, what stays dense in float16."""
    dense = sum(tensor.numel() for tensor in parts.dense.values())
    size = sum(tensor.size_bytes for tensor in parts.palettized.values()) + 2 * dense
    return size * 8 / (dense + sum(tensor.numel for tensor in parts.palettized.values()))


def cell(found: Evaluation) -> str:
    return f"{found.perplexity:.2f} / {found.kl or 0:.3f} / {found.top1 or 1:.1%}"


@click.command(help=__doc__)
@click.argument("model")
@click.option("--calibration", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--calibration-tokens", default=4096, show_default=True)
@click.option("--text", "texts", required=True, multiple=True)
@click.option("--eval-tokens", default=4096, show_default=True)
@click.option("--bits", "sizes", default=[4.0, 3.0], multiple=True, type=float, show_default=True)
@click.option("--target-bits", "targets", multiple=True, type=float, help="Over all weights.")
@click.option("--method", "chosen", multiple=True, help="Only these.")
def main(
    model: str,
    calibration: Path,
    calibration_tokens: int,
    texts: tuple[str, ...],
    eval_tokens: int,
    sizes: tuple[float, ...],
    targets: tuple[float, ...],
    chosen: tuple[str, ...],
) -> None:
    source = Source.parse(model).locate()
    tokenizer, original = load_tokenizer(source), load_model(source).float()
    windows = token_windows(
        read_text(calibration), tokenizer, tokens=calibration_tokens, context=CONTEXT, source=str(calibration)
    )
    evaluation = {}
    for text in texts:
        path, start = split(text)
        whole = read_text(path)
        evaluation[text] = token_windows(
            whole[int(len(whole) * start) :], tokenizer, tokens=eval_tokens, context=CONTEXT, source=text
        )
    table = Table("bits", "of all weights", "method", "seconds", *(Path(text).name for text in texts))
    floats = [cell(evaluate(original, each)) for each in evaluation.values()]
    table.add_row("float", "16", "", "", *floats)

    def row(bits: str, name: str, palettize: Callable[[Any], PalettizedModel]) -> None:
        twin = load_model(source)
        began = time.monotonic()
        parts = palettize(twin)
        seconds = time.monotonic() - began
        state = {name: tensor.decode().float() for name, tensor in parts.palettized.items()}
        twin = copy.deepcopy(original)
        for parameter, values in as_linear(twin, state).items():
            twin.get_parameter(parameter).data = values
        cells = [cell(evaluate(twin, each, original)) for each in evaluation.values()]
        average = f"{all_bits(parts):.2f}"
        table.add_row(bits, average, name, f"{seconds:.0f}", *cells)
        Console().print(f"{bits} ({average}) {name} {seconds:.0f} s: {'; '.join(cells)}")

    for bits in sizes:
        recipe = recipe_of(copy.deepcopy(original), windows, bits)
        for name, palettize in methods(windows).items():
            if not chosen or name in chosen:
                row(f"{bits:g}", name, functools.partial(palettize, recipe=recipe))
    for bits in targets:
        row("", f"--target-bits {bits:g}", functools.partial(to_target, windows=windows, bits=bits))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
