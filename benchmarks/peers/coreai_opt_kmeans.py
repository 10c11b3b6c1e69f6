"""coreai-opt's k-means palettizer with sensitivities (squared gradients of the loss), groups of 16 rows."""

from __future__ import annotations

import re

import torch
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from task import Task, fitting_rows, inner_layers, lut_bits


def main() -> None:
    task = Task.read()
    model = task.load()
    model.config.use_cache = False
    shapes = {name: tuple(layer.weight.shape) for name, layer in inner_layers(model).items()}
    rows = {name: fitting_rows(shape[0]) for name, shape in shapes.items()}
    named = {}
    for name in shapes:
        groups = PerGroupedChannelGranularity(axis=0, group_size=rows[name])
        spec = PalettizationSpec(n_bits=task.bits, granularity=groups)
        named[re.escape(name)] = ModuleKMeansPalettizerConfig(module_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(
        model, KMeansPalettizerConfig(global_config=None, module_name_configs=named)
    )
    first = task.windows[:1].to(task.device)
    prepared = palettizer.prepare((first,))

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    with palettizer.calibration_mode(loss_fn=loss) as calibration:
        for window in task.windows:
            ids = window[None].to(task.device)
            calibration.step(prepared(ids).logits, ids)
    weights = {}
    for name in shapes:
        weight = prepared.get_submodule(name).weight.detach()
        group = weight[: rows[name]]
        assert len(group.unique()) <= 2**task.bits, f"{name} is not palettized"
        weights[f"{name}.weight"] = weight
    bits = {f"{name}.weight": lut_bits(shape, task.bits, rows[name]) for name, shape in shapes.items()}
    words = (
        f"sensitive k-means (squared gradients of the loss on {len(task.windows)} windows), groups of 16 rows"
    )
    task.finish(weights, bits, words, "coreai-opt")


if __name__ == "__main__":
    main()
