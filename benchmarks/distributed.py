"""Memory of each GPU and traffic of a step when a model of LLaMA-7B's shape trains on 1, 2 and 8 GPUs.

    python -m benchmarks.distributed                 # the tables of docs/distributed.md, as Markdown
    python -m benchmarks.distributed --context 512 --windows 4 --bits 4

Nothing is timed and no GPU is used: shapes come from transformers' model, bytes from the formulas below, and the bytes
that autograd keeps for a token from counting them in one decoder layer an eighth as wide, in bfloat16 autocast.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import click
import torch

from edkm_export.clustering import hard_assign
from edkm_export.recipe import Rule
from edkm_export.training.palettized.clusters import ClusterMethod, Clusters
from edkm_export.training.palettized.modules import PalettizedLinear

LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
NARROWER = 8
GPUS = (1, 2, 8)
GB = 1e9
CHUNK_LOGITS = 1 << 27  # training/distillation.py on CUDA
LOGITS_ALIVE = 4  # student's, teacher's, probabilities, gradient; float32


@dataclass(frozen=True)
class Shape:
    """Numbers of weights: of one layer's matrices, of all layers', of embedding and head; layers; largest matrix."""

    layer: int
    outer: int
    layers: int
    largest: int
    hidden: int
    lut_entries: int

    @property
    def inner(self) -> int:
        """Weights of all layers' matrices."""
        return self.layer * self.layers

    @property
    def all(self) -> int:
        """Weights of all matrices."""
        return self.inner + self.outer


def shape_of(settings: dict[str, Any], bits: int, group_size: int) -> Shape:
    """Of transformers' own model, on no device."""
    import accelerate
    import transformers

    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    matrices = [each.shape for each in model.model.layers[0].parameters() if each.dim() == 2]
    layer = sum(math.prod(each) for each in matrices)
    groups = sum(rows // (group_size or rows) for rows, _ in matrices) * len(model.model.layers)
    outer = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    return Shape(
        layer,
        outer,
        len(model.model.layers),
        max(math.prod(each) for each in matrices),
        settings["hidden_size"],
        groups * 2**bits + 2 * 256,  # embedding and head: 8 bits, one LUT each
    )


def saved_bytes(settings: dict[str, Any]) -> int:
    """What autograd keeps of one decoder layer for a token: distinct storages that are not the model's own."""
    import transformers

    narrow = {
        **settings,
        "num_hidden_layers": 1,
        "hidden_size": settings["hidden_size"] // NARROWER,
        "intermediate_size": settings["intermediate_size"] // NARROWER,
        "head_dim": settings["hidden_size"] // settings["num_attention_heads"] // NARROWER,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**narrow))
    layer = model.model.layers[0]
    for parent in (layer.self_attn, layer.mlp):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                setattr(parent, name, PalettizedLinear(clusters_for(linear.weight), None))
    own = {each.untyped_storage().data_ptr() for each in (*layer.parameters(), *layer.buffers())}
    own |= {
        each.clusters.table(torch.bfloat16).untyped_storage().data_ptr()
        for each in layer.modules()
        if isinstance(each, PalettizedLinear)
    }
    tokens = 128
    x = torch.randn(1, tokens, narrow["hidden_size"], requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(tokens)[None])
    own |= {each.untyped_storage().data_ptr() for each in angles}
    kept: dict[int, int] = {}
    alive = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        alive.append(storage)  # so that no address is used twice
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x, position_embeddings=angles)
    return sum(kept.values()) // tokens * NARROWER


def clusters_for(weight: torch.Tensor) -> Clusters:
    """Any clusters: only their sizes matter."""
    centroids = torch.linspace(-0.05, 0.05, 8).repeat(weight.shape[0] // 16, 1)
    hard_assign(weight.detach().view(len(centroids), -1)[:1, :8], centroids[:1])
    return Clusters(
        weight, centroids, Rule(match="*", bits=3, group_size=16), ClusterMethod(), in_bfloat16=True
    )


MOMENTS = {
    "float32": 8.0,
    "bfloat16": 4.0,
    "8bit": 2 + 2 * 4 / 256,
}  # two a weight; of 8 bits a scale for 256
MASTERS = {"float32": 4, "bfloat16": 2}


def memory(
    shape: Shape,
    gpus: int,
    tokens: int,
    token_bytes: int,
    *,
    dkm: bool,
    moments: str = "float32",
    masters: str = "float32",
) -> dict[str, float]:
    """Bytes of each GPU by what they are for; straight-through unless `dkm`."""
    wide = MASTERS[masters]
    prefetched = 2 if gpus > 1 else 0  # the layer in use and the one on its way
    moved = 2 if dkm else 1  # dkm gathers soft weights in bfloat16
    return {
        f"master weights, {masters}": wide * shape.all / gpus,
        f"Adam's m and v, {moments}": MOMENTS[moments] * shape.inner / gpus,
        f"gradients, {masters}": wide * shape.inner / gpus,
        "indices, uint8": shape.all / gpus,
        "soft weights, bfloat16 (dkm)": 2 * shape.inner / gpus if dkm else 0,
        # parameter, gradient, m, v and table in float32; table in bfloat16 and float16
        "LUTs, whole": (5 * 4 + 2 * 2) * shape.lut_entries,
        "gathered indices": (prefetched * shape.layer * moved + shape.outer) if gpus > 1 else 0,
        "decoded weight, bfloat16": 2 * max(shape.largest, shape.outer // 2),
        # of the layer in the backward pass and of the one that is being reduced, and the reduction's buffer
        "gradients of whole layers": 4 * 3 * shape.layer if gpus > 1 else 0,
        # matrices in bfloat16 (without evaluation texts), embedding and head in float32, the head in bfloat16 too
        "original": 2 * shape.inner / gpus + 4 * shape.outer + 2 * shape.outer / 2,
        "original, gathered layers": 2 * prefetched * shape.layer,
        "logits of a chunk": 4 * CHUNK_LOGITS * LOGITS_ALIVE,
        "activations": tokens * token_bytes * shape.layers,
        "activations, checkpointed": tokens * (4 * shape.hidden * shape.layers + token_bytes),
    }


def traffic(shape: Shape, gpus: int, *, dkm: bool) -> dict[str, float]:
    """Bytes that each GPU receives in a step of one micro-batch, by ring collectives."""
    ring = (gpus - 1) / gpus
    moved = 2 if dkm else 1
    return {
        "indices, forward": ring * (moved * shape.inner + shape.outer),
        "indices, backward": ring * (moved * shape.inner + shape.outer),
        "gradients, reduce-scatter": ring * 4 * shape.inner,
        "LUT gradients, all-reduce": 2 * ring * 4 * shape.lut_entries,
        "original's layers": ring * 2 * shape.inner,
    }


def plain_traffic(shape: Shape, gpus: int) -> float:
    """FSDP2 of the same weights in bfloat16, gathered twice, gradients reduced in float32; no distillation."""
    return (gpus - 1) / gpus * (2 * 2 * shape.all + 4 * shape.inner)


def table(title: str, columns: list[str], rows: list[tuple[str, list[float]]]) -> None:
    print(f"\n| {title} | " + " | ".join(columns) + " |")
    print("|---" * (1 + title.count("|")) + "|" + "---:|" * len(columns))
    for name, values in rows:
        print(f"| {name} | " + " | ".join(f"{value / GB:.2f}" if value else "-" for value in values) + " |")


@click.command(help=__doc__)
@click.option("--bits", default=3, show_default=True)
@click.option("--group-size", default=16, show_default=True)
@click.option("--context", default=2048, show_default=True)
@click.option("--windows", default=1, show_default=True, help="Of a micro-batch, on each GPU.")
def main(bits: int, group_size: int, context: int, windows: int) -> None:
    shape = shape_of(LLAMA_7B, bits, group_size)
    token_bytes, tokens = saved_bytes(LLAMA_7B), context * windows
    print(
        f"{shape.all:,} weights in matrices, {shape.inner:,} of them in the layers; {shape.lut_entries:,} LUT entries "
        f"({bits} bits, group size {group_size}); autograd keeps {token_bytes:,} bytes a token and layer; "
        f"{tokens:,} tokens a micro-batch on each GPU."
    )
    columns = [f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS]
    for dkm in (False, True):
        found = [memory(shape, gpus, tokens, token_bytes, dkm=dkm) for gpus in GPUS]
        names = list(found[0])
        rows = [(name, [each[name] for each in found]) for name in names if any(each[name] for each in found)]
        fixed = [sum(value for name, value in each.items() if not name.startswith("activ")) for each in found]
        lean = [each["activations, checkpointed"] for each in found]
        full = [each["activations"] for each in found]
        rows.append(("**sum**", [a + b for a, b in zip(fixed, full, strict=True)]))
        rows.append(("**sum, checkpointed**", [a + b for a, b in zip(fixed, lean, strict=True)]))
        table(f"GB on each of, {'dkm' if dkm else 'straight-through'}", columns, rows)
    rows = []
    for moments, masters in itertools.product(MOMENTS, MASTERS):
        found = [
            memory(shape, gpus, tokens, token_bytes, dkm=False, moments=moments, masters=masters)
            for gpus in GPUS
        ]
        sums = [sum(value for name, value in each.items() if name != "activations") for each in found]
        if masters != "float32":
            sums[1:] = [0.0] * (len(GPUS) - 1)  # in a single process only
        rows.append((f"{moments} | {masters}", sums))
    table("moments | masters", columns, rows)
    several = [gpus for gpus in GPUS if gpus > 1]
    moves = [traffic(shape, gpus, dkm=False) for gpus in several]
    rows = [(name, [each[name] for each in moves]) for name in moves[0]]
    own = [sum(each.values()) - each["original's layers"] for each in moves]
    rows.append(("**sum without the original**", own))
    rows.append(("plain FSDP2 of the same model", [plain_traffic(shape, gpus) for gpus in several]))
    table("GB received by each GPU in a step", [f"{gpus} GPUs" for gpus in several], rows)


if __name__ == "__main__":
    main()
