"""AutoRound (PyPI auto-round), 200 iterations, groups of 128 (64 at 2 bits) as its documents advise."""

from __future__ import annotations

import json
from typing import Any

from auto_round import AutoRound
from task import Task, affine_bits, inner_layers


def main() -> None:
    task = Task.read()
    group = 64 if task.bits == 2 else 128
    tokenizer = task.tokenizer()
    context = task.windows.shape[1]
    texts = tokenizer.batch_decode(task.windows.tolist())
    # its loader drops rows that come out shorter than `seqlen` when they are tokenized again: two windows make one
    joined = ["".join(texts[place : place + 2]) for place in range(len(texts) - 1)]
    data = task.output / "calibration.json"
    data.write_text(json.dumps([{"text": text} for text in joined]))
    given: dict[str, Any] = {
        "bits": task.bits, "group_size": group, "sym": task.bits > 2, "iters": 200, "seqlen": context,
        "nsamples": min(128, len(joined)), "dataset": str(data), "seed": task.seed,
        "device_map": task.device, "enable_torch_compile": False,
    }  # fmt: skip
    rounding = AutoRound(task.load(), tokenizer, **given)
    model, _ = rounding.quantize()
    layers = inner_layers(model)
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    bits = {
        f"{name}.weight": affine_bits(
            tuple(layer.weight.shape), task.bits, group, zero_point=not given["sym"]
        )
        for name, layer in layers.items()
    }
    kind = "symmetric" if given["sym"] else "asymmetric"
    settings = f"groups of {group}, {kind}, 200 iterations, {given['nsamples']} windows"
    task.finish(weights, bits, settings, "auto-round")


if __name__ == "__main__":
    main()
