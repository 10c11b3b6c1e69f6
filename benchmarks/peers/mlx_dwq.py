"""mlx-lm's DWQ (distilled weight quantization): scales and biases of groups of 64, trained against the float model."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import torch
from mlx_lm.utils import load
from task import Task, inner_layers

GROUP = 64


def main() -> None:
    task = Task.read()
    data, made = task.output / "data", task.output / "mlx"
    data.mkdir()
    texts = task.tokenizer().batch_decode(task.windows.tolist())
    held = max(1, len(texts) // 16)
    for name, some in (("train", texts[:-held]), ("valid", texts[-held:])):
        (data / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in some))
    words = [
        sys.executable, "-m", "mlx_lm.quant.dwq", "--model", str(task.model), "--mlx-path", str(made),
        "--bits", str(task.bits), "--group-size", str(GROUP), "--data-path", str(data),
        "--num-samples", str(len(texts)), "--max-seq-length", str(task.windows.shape[1] + 1), "--seed", str(task.seed),
    ]  # fmt: skip
    subprocess.run(words, check=True)
    model, _ = load(str(made))
    layers = dict(model.named_modules())
    weights, bits = {}, {}
    for name, layer in inner_layers(task.load()).items():
        found = layers[name]
        dense = mx.dequantize(found.weight, found.scales, found.biases, found.group_size, found.bits)
        key = f"{name}.weight"
        weights[key] = torch.tensor(dense.astype(mx.float32).tolist())
        rows, columns = layer.weight.shape
        bits[key] = rows * columns * found.bits + rows * columns / found.group_size * 32
    task.finish(weights, bits, f"groups of {GROUP}, its defaults, {len(texts)} windows", "mlx", "mlx-lm")


if __name__ == "__main__":
    main()
