"""The models of a run: the float model that is measured, the frozen original and the student.

They are read from the source's files layer by layer, straight to where they stay. At no time does a process hold two
float32 models, unless evaluations or float32 training need the original beside the student; of several processes none
holds a whole one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import InputError
from edkm_export.recipe import Recipe
from edkm_export.reference.conv1d import conv1d_weights
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.shares import Shares, decoder_layers
from edkm_export.training.learner import hold_in_bfloat16
from edkm_export.training.palettized.surgery import clusters_of
from edkm_export.training.preparation import insert
from edkm_export.training.tokens import Tokens
from edkm_export.training.train_config import TrainConfig

__all__ = ["Models", "check_vocabulary"]


class Models:
    """Builds the models; each method is called by all processes.

    Attributes:
        weights: of the float model.
        shares: None in a single process.
        sizes: see `Shares.student`; None in a single process.
    """

    sizes: dict[str, float] | None = None

    def __init__(self, weights: FloatWeights, config: TrainConfig, processes: Processes) -> None:
        if processes.are_many and config.masters != "float32":
            raise InputError(
                f"--masters {config.masters} is for a single process; {processes.count} hold a share of float32 ones."
            )
        self.weights, self._config, self._processes = weights, config, processes
        self.shares = Shares(processes) if processes.are_many else None
        self._float: Any = None

    def measured(self, *, needed: bool) -> Any:
        """The float model in float32, to be run; where it is not `needed`, an outline may do."""
        if self.shares is None:
            self._float = self.weights.load(self._processes.device)
        elif needed:
            self._float = self.shares.frozen(self.weights, in_bfloat16=False)
        return self.weights.model if self._float is None else self._float

    def writer(self) -> Any:
        """The float model to let it write text: the one that is measured, in bfloat16 in shares on a GPU."""
        if self.shares is None or self._processes.device == "cpu":
            return self._float
        narrow = dataclasses.replace(
            self.weights, dtype=torch.bfloat16
        )  # half of what is gathered for each token
        return self.shares.frozen(narrow, in_bfloat16=False)

    def evaluated(self, weights: FloatWeights) -> Any:
        """Another float32 model, such as the finished one, in shares where there are several processes."""
        weights.model.tie_weights()
        if self.shares is not None:
            return self.shares.frozen(weights, in_bfloat16=False)
        return weights.load(self._processes.device)

    @property
    def reads(self) -> Callable[[str], Tensor] | None:
        """What reads a layer's weight [out, in, ...] from the source; None: the measured model holds it whole."""
        if self.shares is None:
            return None
        turned = conv1d_weights(self.weights.model)
        return lambda name: self.weights.held(name, turned=f"{name}.weight" in turned)

    def original(self, *, in_bfloat16: bool, changed: bool) -> Any:
        """The frozen original.

        Args:
            in_bfloat16: round it, see `hold_in_bfloat16`.
            changed: scales were folded into the measured model, which therefore cannot serve.
        """
        if self.shares is not None:
            measured, self._float = self._float, None
            if measured is not None and not in_bfloat16 and not changed:
                return measured
            del measured
            return self.shares.frozen(self.weights, in_bfloat16=in_bfloat16)
        device = self._processes.device
        model = self.weights.outline(device)
        if in_bfloat16:
            for layer in decoder_layers(model):
                self.weights.fill(model, layer, device)
                hold_in_bfloat16(model, layer)
        self.weights.fill(model, model, device)
        if in_bfloat16:
            hold_in_bfloat16(model)
        return model

    def student(
        self,
        recipe: Recipe,
        seeds: Mapping[tuple[str, int], Tensor] | None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The palettized model.

        Args:
            recipe: bits, groups and LUT dtype by module name.
            seeds: first centroids of every weight; None: LUTs and indices are to be loaded from a checkpoint.
            scales: what was folded into the measured model.
        """
        if self.shares is not None:
            weights = self.weights.scaled(scales or {})
            student, self.sizes = self.shares.student(weights, recipe, self._config, seeds)
            return student
        student, self._float = self._float or self.weights.load(self._processes.device), None
        insert(
            student,
            recipe,
            self._config,
            seeds=seeds,
            seeded=seeds is not None,
            source=self.weights.reference,
        )
        if self._config.masters == "bfloat16":
            for clusters in clusters_of(student).values():
                clusters.narrow()
        if self._config.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return student


def check_vocabulary(weights: FloatWeights, tokens: Tokens) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        InputError: naming the token.
    """
    largest, rows = int(tokens.ids.max()), weights.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{weights.reference}: its tokenizer gives token {largest}, beyond the model's vocabulary of {rows}."
        )
