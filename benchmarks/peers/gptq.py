"""GPTQ through llm-compressor: groups of 128, activation order, its own damping."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from task import Task, affine_bits, inner_layers

GROUP = 128


def main() -> None:
    task = Task.read()
    model = task.load()
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=task.bits, type="int", symmetric=True, strategy="group", group_size=GROUP
        ),
    )
    shapes = {name: tuple(layer.weight.shape) for name, layer in inner_layers(model).items()}
    odd = [name for name, shape in shapes.items() if shape[1] % GROUP]
    group = GROUP if not odd else 64  # llm-compressor refuses columns that a group does not divide
    scheme.weights.group_size = group
    data = Dataset.from_dict(
        {
            "input_ids": task.windows.tolist(),
            "attention_mask": [[1] * task.windows.shape[1]] * len(task.windows),
        }
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=task.windows.shape[1],
        num_calibration_samples=len(task.windows),
    )
    layers = inner_layers(model)
    weights = {}
    for name, layer in layers.items():
        scale = layer.weight_scale.float().repeat_interleave(group, 1)  # what it rounds to when it is loaded
        steps = (
            (layer.weight.float() / scale).round().clamp(-(2 ** (task.bits - 1)), 2 ** (task.bits - 1) - 1)
        )
        weights[f"{name}.weight"] = steps * scale
    bits = {
        f"{name}.weight": affine_bits(shape, task.bits, group, zero_point=False)
        for name, shape in shapes.items()
    }
    task.finish(weights, bits, f"groups of {group}, symmetric, {len(task.windows)} windows", "llmcompressor")


if __name__ == "__main__":
    main()
