"""coremltools' palettizers: k-means (PostTrainingPalettizer) and sensitive k-means (SKMPalettizer), 16-row groups."""

from __future__ import annotations

import sys
from typing import Any

import torch
from task import Task, fitting_rows, inner_layers, lut_bits


def main() -> None:
    from coremltools.optimize.torch.palettization import (
        PostTrainingPalettizer,
        PostTrainingPalettizerConfig,
        SKMPalettizer,
        SKMPalettizerConfig,
    )

    task = Task.read()
    sensitive = task.extra.get("kind") == "sensitive"
    model = task.load()
    model.config.use_cache = False
    layers = inner_layers(model)
    rows = {name: fitting_rows(layer.weight.shape[0]) for name, layer in layers.items()}
    named: dict[str, Any] = {
        name: {"n_bits": task.bits, "granularity": "per_grouped_channel", "group_size": rows[name]}
        for name in layers
    }
    given = {"module_name_configs": named}
    if sensitive:
        windows = [window[None].to(task.device) for window in task.windows]

        def loss(module: Any, ids: torch.Tensor) -> torch.Tensor:
            return module(input_ids=ids, labels=ids).loss

        config = SKMPalettizerConfig.from_dict({**given, "calibration_nsamples": len(windows)})
        made = SKMPalettizer(model, config).compress(dataloader=windows, loss_fn=loss)
        words = (
            f"sensitive k-means (squared gradients of the loss on {len(windows)} windows), groups of 16 rows"
        )
    else:
        made = PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict(given)).compress()
        words = "k-means, groups of 16 rows, no calibration"
    found = {f"{name}.weight": made.get_submodule(name).weight for name in layers}
    bits = {
        f"{name}.weight": lut_bits(tuple(layers[name].weight.shape), task.bits, rows[name]) for name in layers
    }
    task.finish(found, bits, words, "coremltools")


if __name__ == "__main__":
    sys.exit(main())
