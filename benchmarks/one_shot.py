r"""One-shot palettization: weighted k-means, layers that make up for their errors, and layers that are fitted.

    python -m benchmarks.one_shot MODEL --calibration TEXT --text cfi.txt:0.3 --text devil.txt --bits 4 --bits 3.25
    python -m benchmarks.one_shot MODEL --calibration TEXT --text cfi.txt:0.3 --bits 4.1 --effort high \
        --device cuda --seed 0 --seed 1 --json one-shot.json

Perplexity, KL to the original and top-1 agreement on each text, in windows of 512. Bits that are not whole are mixed
up to that average over the decoder, LUTs included, by Fisher information, as the presets of `train` do. A text
FILE:0.3 starts at 30% of the file's characters; it must not be the calibration text. With `--target-bits` rows
follow whose bits are chosen over all weights, embedding and output head among them, as `palettize --target-bits` does.

With --effort high layers are fitted as `palettize --effort high` does; each --vary changes that in one point, such as
`--vary weighs=none --vary norms=false --vary steps=200 --vary tokens=16384`, in a row of its own beside the unchanged
one. --self-generated adds text that the original writes itself to the calibration text.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.accuracy import split
from edkm_export.api.bit_choice import choose_bits
from edkm_export.api.effort import Effort
from edkm_export.calibration import input_energy
from edkm_export.palettization import PalettizedModel, palettizable_shapes, palettize_model
from edkm_export.recipe import Recipe, uniform_recipe
from edkm_export.reference.conv1d import as_linear, held_weight
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.text import read_text, token_windows
from edkm_export.training.bit_budget import LEAST_BITS, BitTarget
from edkm_export.training.block_fit import FitSettings
from edkm_export.training.evaluation import Evaluation, evaluate
from edkm_export.training.reconstruction import Reconstruction, windows_in_streams
from edkm_export.training.self_generated import first_token, generate
from edkm_export.training.sensitivity import (
    Sensitivity,
    allocate_bits,
    fisher_factors,
    mixed_recipe,
    wider_rules,
)
from edkm_export.training.tokens import Tokens

CONTEXT = 512
ONE_SHOT_TOKENS = 4096

Palettize = Callable[[Any, Recipe], PalettizedModel]


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


def plain_methods(windows: Tensor) -> dict[str, Palettize]:
    return {
        "weighted k-means": lambda model, recipe: palettize_model(
            model, recipe, energy=input_energy(model, windows)
        ),
        "errors made up for": lambda model, recipe: palettize_model(model, recipe, windows=windows),
    }


def fitted(windows: Tensor, settings: FitSettings, device: str, tokens: int) -> Palettize:
    """Layers fitted on the first of the windows; they are drawn from all of the text, in a fixed order."""

    def palettize(model: Any, recipe: Recipe) -> PalettizedModel:
        some = windows_in_streams(model, windows[: max(2, tokens // CONTEXT)])
        rules = recipe.plan(palettizable_shapes(model), "model")
        made = Reconstruction(model, rules, settings, device=device, consume=True)
        made.run(some)
        return palettize_model(model, recipe, begun=made)

    return palettize


def fitted_methods(
    windows: Tensor,
    settings: FitSettings,
    device: str,
    tokens: int,
    seeds: tuple[int, ...],
    changes: tuple[str, ...],
) -> dict[str, Palettize]:
    """{name: method}: as it is, with each seed, and with one thing changed, with the first seed."""
    found = {}
    for seed in seeds:
        found[f"fitted, seed {seed}"] = fitted(windows, replace(settings, seed=seed), device, tokens)
    for change in changes:
        name, _, value = change.partition("=")
        settled = {name: yaml.safe_load(value)}
        count = settled.pop("tokens", tokens)
        own = replace(settings, seed=seeds[0], **settled)
        found[f"fitted, {change}"] = fitted(windows, own, device, count)
    return found


def calibration_windows(
    text: str, tokenizer: Any, original: Any, *, tokens: int, own_tokens: int, device: str, source: str
) -> Tensor:
    """Windows of a text, and of what the original writes itself, mixed."""
    windows = token_windows(text, tokenizer, tokens=tokens, context=CONTEXT, source=source)
    if not own_tokens:
        return windows
    data = Tokens(windows.flatten())
    made = generate(
        original.to(device), data, tokens=own_tokens, context=CONTEXT, start=first_token(tokenizer), seed=0
    )
    original.cpu()
    both = torch.cat([windows, made.ids.long().view(-1, CONTEXT)])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(0))]


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
@click.option(
    "--calibration-from", default=0.0, help="Share of the calibration text that is left out at its start."
)
@click.option("--calibration-tokens", type=int, help="[default: 4096; with --effort high as `palettize`]")
@click.option(
    "--self-generated", default=0, help="Tokens that the original writes itself, added to the text."
)
@click.option("--text", "texts", required=True, multiple=True)
@click.option("--eval-tokens", default=4096, show_default=True)
@click.option("--bits", "sizes", default=[4.0, 3.0], multiple=True, type=float, show_default=True)
@click.option("--target-bits", "targets", multiple=True, type=float, help="Over all weights.")
@click.option("--method", "chosen", multiple=True, help="Only these.")
@click.option("--effort", default="normal", type=click.Choice(["normal", "high"]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Of --effort high.")
@click.option("--steps", type=int, help="Of --effort high.")
@click.option("--seed", "seeds", default=[0], multiple=True, help="Of --effort high.")
@click.option("--vary", multiple=True, help="NAME=VALUE: a row with one thing of --effort high changed.")
@click.option(
    "--json", "rows_file", type=click.Path(path_type=Path), help="Where rows are written as they come."
)
def main(
    model: str,
    calibration: Path,
    calibration_from: float,
    calibration_tokens: int | None,
    self_generated: int,
    texts: tuple[str, ...],
    eval_tokens: int,
    sizes: tuple[float, ...],
    targets: tuple[float, ...],
    chosen: tuple[str, ...],
    effort: str,
    device: str | None,
    steps: int | None,
    seeds: tuple[int, ...],
    vary: tuple[str, ...],
    rows_file: Path | None,
) -> None:
    source = Source.parse(model).locate()
    tokenizer, original = load_tokenizer(source), load_model(source).float()
    level = Effort.of(effort, device=device, steps=steps)
    place = "cpu" if level is None else level.device
    tokens = calibration_tokens or (ONE_SHOT_TOKENS if level is None else level.tokens)
    text = read_text(calibration)
    windows = calibration_windows(
        text[int(len(text) * calibration_from) :],
        tokenizer,
        original,
        tokens=max(tokens - self_generated, CONTEXT),
        own_tokens=self_generated,
        device=place,
        source=str(calibration),
    )
    evaluation = {}
    for name in texts:
        path, start = split(name)
        whole = read_text(path)
        evaluation[name] = token_windows(
            whole[int(len(whole) * start) :], tokenizer, tokens=eval_tokens, context=CONTEXT, source=name
        )
    judge = copy.deepcopy(original).to(place)
    few = windows[: ONE_SHOT_TOKENS // CONTEXT]
    table = Table("bits", "of all weights", "method", "seconds", *(Path(text).name for text in texts))
    floats = [evaluate(judge, each) for each in evaluation.values()]
    table.add_row("float", "16", "", "", *(cell(each) for each in floats))
    rows: list[dict[str, Any]] = []

    def row(bits: float | None, name: str, palettize: Callable[[Any], PalettizedModel]) -> None:
        twin = load_model(source)
        began = time.monotonic()
        parts = palettize(twin)
        seconds, average = time.monotonic() - began, all_bits(parts)
        found = [evaluate(changed(original, parts, place), each, judge) for each in evaluation.values()]
        cells, first = [cell(each) for each in found], "" if bits is None else f"{bits:g}"
        table.add_row(first, f"{average:.2f}", name, f"{seconds:.0f}", *cells)
        line = f"{first} ({average:.2f}) {name} {seconds:.0f} s: {'; '.join(cells)}"
        Console().print(line, highlight=False)
        rows.append(
            {
                "bits": bits,
                "bits_of_all_weights": average,
                "method": name,
                "seconds": seconds,
                "tokens": windows.numel(),
                "texts": {text: asdict(each) for text, each in zip(texts, found, strict=True)},
            }
        )
        if rows_file is not None:
            rows_file.write_text(json.dumps(rows, indent=1))

    methods = plain_methods(few)
    if level is not None:
        if not chosen:
            methods.pop("weighted k-means")
        methods |= fitted_methods(windows, level.settings, level.device, tokens, seeds, vary)
    for bits in sizes:
        recipe = recipe_of(copy.deepcopy(judge), few.to(place), bits)
        for name, palettize in methods.items():
            if not chosen or name in chosen:
                row(bits, name, functools.partial(palettize, recipe=recipe))
    for bits in targets:
        row(None, f"--target-bits {bits:g}", functools.partial(to_target, windows=few, bits=bits))
    Console(width=160).print(table)


def changed(original: Any, parts: PalettizedModel, device: str) -> Any:
    """The float32 model with palettized weights, and with norms as they became."""
    state = {name: tensor.decode().float() for name, tensor in parts.palettized.items()}
    state |= {name: tensor.float() for name, tensor in parts.dense.items()}
    twin = copy.deepcopy(original)
    own = dict(twin.named_parameters())
    for name, values in as_linear(twin, state).items():
        if name in own:
            own[name].data = values
    return twin.to(device)


if __name__ == "__main__":
    main()
