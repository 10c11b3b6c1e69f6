"""torchao's quantization-aware training: fake-quantized weights in groups of 32, cross-entropy on the text."""

from __future__ import annotations

import time

import torch
from task import Task, affine_bits, inner_layers
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

GROUP = 32
RATE = 2e-5


def main() -> None:
    task = Task.read()
    model = task.load()
    shapes = {name: tuple(layer.weight.shape) for name, layer in inner_layers(model).items()}
    dtype = getattr(torch, f"int{task.bits}")
    weights = IntxFakeQuantizeConfig(dtype, group_size=GROUP, is_symmetric=True)
    head = model.get_output_embeddings()
    quantize_(
        model,
        QATConfig(weight_config=weights, step="prepare"),
        filter_fn=lambda module, _name: isinstance(module, torch.nn.Linear) and module is not head,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(task.seed)
    began, steps = time.monotonic(), 0
    model.train()
    while time.monotonic() - began < task.minutes * 60:
        rows = torch.randint(len(task.windows), (4,), generator=generator)
        ids = task.windows[rows].to(task.device)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    model.eval()
    found = {}
    with torch.no_grad():
        for name in shapes:
            layer = model.get_submodule(name)
            found[f"{name}.weight"] = layer.weight_fake_quantizer(layer.weight)
        for (
            name,
            parameter,
        ) in model.named_parameters():  # embedding and norms are trained, too, and stay in 16 bits
            if not any(name.startswith(f"{each}.") for each in shapes):
                found[name] = parameter
    bits = {
        f"{name}.weight": affine_bits(shape, task.bits, GROUP, zero_point=False)
        for name, shape in shapes.items()
    }
    bits |= {name: 16.0 * tensor.numel() for name, tensor in found.items() if name not in bits}
    words = f"groups of {GROUP}, symmetric, AdamW at {RATE:g}, {steps} steps of 4 windows in {task.minutes:g} minutes"
    task.finish(found, bits, words, "torchao")


if __name__ == "__main__":
    main()
