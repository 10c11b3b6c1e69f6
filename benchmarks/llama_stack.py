"""A stack of LLaMA-7B decoder layers, and the ways to cluster its weights that `llama_layers.py` compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edkm_export.clustering import MarshaledTensors, soft_cluster
from edkm_export.clustering.dense import cluster_dense
from edkm_export.recipe import Rule, uniform_recipe
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import clusters_of, insert_clusters, seed_centroids

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
OURS = {"straight-through": "straight-through", "ours-soft": "soft", "ours-dkm": "dkm"}
SIDES = ("plain", "dkm", "paper", "histogram", "streaming", *OURS)


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share.

    Attributes:
        bits, group_size, iterations: of the clustering; group size 0 is one LUT for a weight.
        context: tokens of the one sequence.
        weights: dtype of the trained weights, "float32" or "bfloat16"; Adam's moments have the same.
        optimizer: whether there is one. Its moments are the larger part of a layer's memory.
        checkpointing: whether activations are computed again in the backward pass.
        learners: among which S shards.
        device: "cuda" or "cpu".
        small: a tiny shape, to try the script.
    """

    bits: int
    group_size: int
    iterations: int
    context: int
    weights: str
    optimizer: bool
    checkpointing: bool
    learners: int
    device: str
    small: bool


class Stack(nn.Module):
    """Decoder layers of a Llama, without embedding, last norm and output head: [1, tokens, hidden] -> the same."""

    def __init__(self, layers: int, settings: Settings) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        shape = SMALL if settings.small else LLAMA_7B
        config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=8, attn_implementation="sdpa")
        dtype = getattr(torch, settings.weights)
        self.width, self.checkpointing = config.hidden_size, settings.checkpointing
        self.rotary = LlamaRotaryEmbedding(config).to(settings.device)
        with torch.device(settings.device):
            self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        self.layers.to(dtype)
        for name, parameter in self.layers.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        tables = self.rotary(hidden, places)
        for layer in self.layers:

            def run(x: Tensor, layer: Any = layer) -> Tensor:
                made = layer(x, position_embeddings=tables, attention_mask=None, position_ids=places)
                return made if isinstance(made, Tensor) else made[0]

            hidden = checkpoint(run, hidden, use_reentrant=False) if self.checkpointing else run(hidden)
        return hidden


class SoftLinear(nn.Module):
    """A linear layer whose weight is clustered by ordinary autograd functions in every forward pass."""

    held: list[MarshaledTensors] = []  # of all layers, in the last forward pass
    process_group: Any = None

    def __init__(self, weight: nn.Parameter, centroids: Tensor, error: Tensor, side: str, steps: int) -> None:
        super().__init__()
        self.weight, self.side, self.steps = weight, side, steps
        self.centroids = nn.Parameter(centroids.float())
        self.register_buffer("temperature", error.float())  # [groups]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        with torch.autocast(x.device.type, enabled=False):
            # Uniquification and histograms need 16 bits, and the paper trains in bfloat16.
            weight = self.weight.to(torch.bfloat16).view(len(self.centroids), -1)
            soft = self._soft(weight)
        return F.linear(x.to(torch.bfloat16), soft.view(self.weight.shape))

    def _soft(self, weight: Tensor) -> Tensor:
        if self.side in ("histogram", "streaming"):
            method: Any = self.side
            return soft_cluster(
                weight, self.centroids, temperature=self.temperature, iterations=self.steps, method=method
            )[0]
        low = torch.bfloat16
        start, tau = self.centroids.to(low)[..., None], self.temperature.to(low)
        if self.side == "dkm":
            return cluster_dense(weight[..., None], start, tau, self.steps)[0]
        held = MarshaledTensors(weight, process_group=self.process_group)
        self.held.append(held)
        with held:
            return cluster_dense(weight[..., None], start, tau, self.steps)[0]


def palettize(model: Stack, side: str, settings: Settings) -> None:
    """Put the side's layers into the model; weights are random, so layers of one shape share their seeds."""
    rule = Rule(bits=settings.bits, group_size=settings.group_size)
    seeds: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in linear.values():
        if (shape := tuple(module.weight.shape)) not in seeds:
            centroids, error = seed_centroids(module.weight, rule)
            entries = module.weight.numel() / len(centroids)
            seeds[shape] = (centroids.to(settings.device), (error / entries).to(settings.device))
    if side in OURS:
        backward: Any = OURS[side]
        insert_clusters(
            model,
            uniform_recipe(settings.bits, settings.group_size),
            method=ClusterMethod(backward, iterations=settings.iterations),
            seeds={(name, settings.bits): seeds[tuple(module.weight.shape)][0] for name, module in linear.items()},
            in_bfloat16=True,
        )  # fmt: skip
        for clusters in clusters_of(model).values():
            clusters.lut.requires_grad_(backward != "dkm")
        return
    for name, module in linear.items():
        parent, _, child = name.rpartition(".")
        made = SoftLinear(module.weight, *seeds[tuple(module.weight.shape)], side, settings.iterations)
        setattr(model.get_submodule(parent), child, made)


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count the storages that autograd saves, {address: bytes}; parameters and buffers are not counted."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    for tensor in (*model.parameters(), *model.buffers()):
        seen.pop(tensor.untyped_storage().data_ptr(), None)
