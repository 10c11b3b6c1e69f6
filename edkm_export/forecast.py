"""How large a model gets, and how long each command takes: estimates from shapes, before any weight is read.

Sizes follow from the recipe to the byte, but for what a format adds. Times and peaks of memory are lines through what
docs/results.md has measured, whole commands on two cores of an AMD EPYC: palettize of 135M, 268M and 1,240M parameters,
coreml of 135M and 1,240M, verify of 135M with a vocabulary of 49,152 and of 268M with one of 262,144, training and
onnx of 135M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edkm_export.palettization import palettizable_shapes
from edkm_export.recipe import Recipe
from edkm_export.weight_storage import average_bits, storage_bits

__all__ = ["BASIS", "GPU_BASIS", "Footprint", "ModelSize", "Step", "forecast_steps"]

BASIS = "whole commands on 2 cores of an AMD EPYC (docs/results.md)"
GPU_BASIS = "SmolLM2-135M on one NVIDIA H100 (docs/results.md)"

STEP_TOKENS = 4 * 512
"""Tokens of a training step by default: `--batch-size` times `--context`."""


@dataclass(frozen=True)
class Footprint:
    """What a model takes under a recipe.

    Attributes:
        size_bytes: all weights, LUTs included; norms and what stays dense in float16.
        decoder_bits: bits a weight of what is neither embedding nor output head, LUTs included; None: all is dense.
    """

    size_bytes: float
    decoder_bits: float | None


@dataclass(frozen=True)
class ModelSize:
    """Shapes of a model.

    Attributes:
        shapes: {module name: (out, in)} of what can be palettized, tied ones once.
        outer: embedding and output head among them.
        parameters: of the whole model, tied ones once.
        layers: decoder layers.
        vocabulary: tokens.
    """

    shapes: Mapping[str, tuple[int, ...]]
    outer: frozenset[str]
    parameters: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Measure a model of transformers; an outline will do."""
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return cls(
            shapes=palettizable_shapes(model),
            outer=frozenset(name for name, module in model.named_modules() if module in ends),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=int(model.config.num_hidden_layers),
            vocabulary=int(model.config.vocab_size),
        )

    @property
    def float16_bytes(self) -> int:
        """Size of the model that is not palettized."""
        return self.parameters * 2

    def footprint(
        self, recipe: Recipe, source: str, *, target_decoder_bits: float | None = None
    ) -> Footprint:
        """What the model takes under a recipe.

        Args:
            recipe: bits, groups and LUT dtype by module name.
            source: name of the model, for messages.
            target_decoder_bits: average over the decoder that training mixes bits to; what cannot be had is not
                promised.

        Raises:
            RecipeError, PaletteError: the recipe does not fit the model.
        """
        plan = recipe.plan(self.shapes, source)
        inner = {name: rule for name, rule in plan.items() if name not in self.outer}
        bits = average_bits(self.shapes, inner) if inner else None
        size = sum(storage_bits(self.shapes[name], rule) for name, rule in plan.items()) / 8
        if bits is not None and target_decoder_bits is not None and target_decoder_bits > bits:
            size += (target_decoder_bits - bits) * sum(math.prod(self.shapes[name]) for name in inner) / 8
            bits = target_decoder_bits
        size += 2 * (self.parameters - sum(math.prod(self.shapes[name]) for name in plan))
        return Footprint(size, bits)


@dataclass(frozen=True)
class Step:
    """What a command takes.

    Attributes:
        command: with the options that the figures are for.
        seconds: of the whole command, but for training of one step.
        memory_bytes: peak.
        disk_bytes: what it writes.
        per: what `seconds` are for, when that is not the whole command.
        on_gpu: whether memory is that of the GPU.
    """

    command: str
    seconds: float
    memory_bytes: float
    disk_bytes: float
    per: str = ""
    on_gpu: bool = False


def forecast_steps(
    size: ModelSize, made_bytes: float, *, tokens: int = 1024, gpu: bool = False
) -> tuple[Step, ...]:
    """Time and memory of each command with its default options.

    Args:
        size: of the model.
        made_bytes: of its weights when they are palettized.
        tokens: of a verification.
        gpu: training is on a CUDA device.
    """
    millions, billions = size.parameters / 1e6, size.parameters / 1e9
    logits = tokens * size.vocabulary * 8 / 1e9  # GB of one set of logits in float64, as they are compared
    step_logits = STEP_TOKENS * size.vocabulary * 4 / 1e9
    verify_s = 5 + (0.335 * millions + 0.893e-3 * size.vocabulary) * tokens / 1024
    verify_gb = 0.5 + 3.29 * 4 * billions + 5.77 * logits
    # master weights, gradients, both moments of Adam, the original, and decoded weights; two checkpoints are kept, of
    # weights and moments without those of embedding and output head
    train_gb = 0.8 + 24 * billions + 5 * step_logits
    return (
        Step(
            "palettize --calibration TEXT", 10 + 0.18 * millions, (0.66 + 2.54 * billions) * 1e9, made_bytes
        ),
        Step(
            "train",
            (1.28e-4 if gpu else 0.147) * millions * STEP_TOKENS / 2048,
            train_gb * 1e9,
            made_bytes + 2 * 10.5 * size.parameters,
            per=f"a step of {STEP_TOKENS:,} tokens",
            on_gpu=gpu,
        ),
        Step(
            "coreml --no-verify",
            1.72 * size.layers + 0.0246 * millions,
            (0.66 + 1.82 * billions) * 1e9,
            made_bytes,
        ),
        Step("onnx --no-verify", 5 + 0.03 * millions, (0.3 + 1.7 * billions) * 1e9, made_bytes),
        Step(f"verify, {tokens:,} tokens", verify_s, verify_gb * 1e9, 0),
    )
