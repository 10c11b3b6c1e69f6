"""Models of newer families with activations of the size that trained ones are known for.

A token's "massive activations" stand in few channels of the residual stream, a thousand times above the others and at
the same place from the first layers on (Sun et al., arXiv 2402.17762: 2,500 in Llama 2 7B, 1,200 in Llama 2 13B, 300 to
1,700 in Mistral and LLaMA-like models; Qwen2.5 has passed 10,000). The norms that read them carry small weights there,
and large ones elsewhere. Nothing of this is rare: a first token of a text has them in every text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.odd_families import build

__all__ = [
    "MASSIVE",
    "POST_NORMS",
    "PRE_NORMS",
    "stream",
    "with_loud_convolutions",
    "with_loud_recurrences",
    "with_massive_activations",
    "with_wide_stream",
]

MASSIVE = 12_000.0
"""Of the planted channels; their squares are two thousand times beyond float16."""
LOUD = 50.0
"""What gate and values of the planted inner activation are: their product is 2,500."""
CHANNELS, NEURON = (3, 17), 5
_SMALL = 0.02  # weight of these channels in norms that read the stream

PRE_NORMS = (
    "cohere2",
    "granite",
    "granitemoehybrid",
    "hunyuan_v1_dense",
    "lfm2",
    "ministral3",
    "qwen3_5",
    "smollm3",
    "stablelm",
    "starcoder2",
)
POST_NORMS = ("exaone4", "olmo2", "olmo3")


def _layers(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.model.layers
    return found


def _reads_the_stream(model: Any) -> Iterator[nn.Parameter]:
    """Weights of the norms behind the first layer, but for those of queries, keys and inner parts."""
    hidden = model.config.hidden_size
    own = [module for layer in _layers(model)[1:] for module in layer.children()]
    final = [module for name, module in model.model.named_children() if "norm" in name]
    for module in (*own, *final):
        if "Norm" in type(module).__name__ and module.weight.shape == (hidden,):
            yield module.weight


def _mlp_parts(model: Any, *names: str) -> list[nn.Linear]:
    parts = {name: part for name, part in _layers(model)[0].named_modules() if isinstance(part, nn.Linear)}
    return [part for name, part in parts.items() if name.endswith(names)]


def _mlp_inputs(model: Any) -> list[nn.Linear]:
    """What reads the stream for the first layer's MLP."""
    return _mlp_parts(model, "gate_proj", "up_proj", "c_fc", ".w1", ".w3", "input_linear")


def _mlp_output(model: Any) -> nn.Linear:
    """What writes it back."""
    return _mlp_parts(model, "down_proj", "mlp.c_proj", ".w2", "output_linear")[0]


@torch.no_grad()
def stream(model: Any, tokens: Tensor) -> Tensor:
    """In front of the last layer, in transformers' own model: [1, tokens, hidden]."""
    found: list[Tensor] = []
    hook = _layers(model)[-1].register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    model(tokens, use_cache=False)
    hook.remove()
    return found[0]


@torch.no_grad()
def with_massive_activations(case: str, tokens: Tensor) -> Any:
    """One inner activation of the first MLP is loud for the first token alone, and writes two channels of the stream.

    These have opposite signs, so that the mean that layer norms take away stays small, as it does in a wide stream.
    """
    model = build(case)
    readers, writer = _mlp_inputs(model), _mlp_output(model)
    inputs: list[Tensor] = []
    hook = readers[0].register_forward_pre_hook(lambda _module, args: inputs.append(args[0][0]))
    model(tokens, use_cache=False)
    hook.remove()
    row = torch.linalg.pinv(inputs[0].double())[:, 0].float()  # one for the first token, zero for the others
    for reader in readers:
        for first in range(0, len(reader.weight), writer.in_features):  # gate and up, in one or two
            reader.weight[first + NEURON] = LOUD * row
            if reader.bias is not None:  # which keeps it quiet for the others where there is no gate
                reader.bias[first + NEURON] = -8
    channels = list(CHANNELS)
    column = torch.tensor([1.0, -1.0])
    writer.weight[channels, NEURON] = column
    for _ in range(3):  # what else is in these channels, and what the layer's output is multiplied by
        found = stream(model, tokens)[0, 0, channels].abs().max()
        column *= MASSIVE / found
        writer.weight[channels, NEURON] = column
    offset = case == "qwen3_5"  # norms multiply by one plus their weight
    for norm in _reads_the_stream(model):
        norm[channels] = _SMALL - 1 if offset else _SMALL
    return model


@torch.no_grad()
def with_loud_convolutions(size: float) -> Any:
    """An LFM2 whose three projections in front of a convolution are of this size."""
    model = build("lfm2")
    for layer in _layers(model):
        if hasattr(layer, "conv"):
            layer.conv.in_proj.weight.mul_(size)
            layer.conv.conv.weight.div_(size)
            layer.conv.out_proj.weight.div_(size)
    return model


@torch.no_grad()
def with_loud_recurrences(size: float) -> Any:
    """A Qwen3.5 whose queries, keys and values of linear attention are of this size."""
    model = build("qwen3_5")
    for layer in _layers(model):
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.in_proj_qkv.weight.mul_(size)
    return model


@torch.no_grad()
def with_wide_stream(case: str, size: float) -> Any:
    """A stream of this size in all channels, which the MLPs of post-norm models read as it is."""
    model = build(case)
    embedding = model.get_input_embeddings().weight
    embedding.mul_(size / float(embedding.square().mean().sqrt()))
    if model.get_output_embeddings().weight is embedding:
        raise AssertionError("a tied head would grow too")
    return model
