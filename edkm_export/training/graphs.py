"""A training step as a CUDA graph: recorded once, then launched as a whole.

A model of a hundred million parameters takes some 5,000 kernels a step, which a GPU runs faster than the host can
launch them one by one, and palettized layers have more to launch than plain ones. A recorded step costs the host
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edkm_export.training.learner import Learner
from edkm_export.training.palettized.surgery import clusters_of

__all__ = ["GraphedStep", "can_record"]

_EAGER = 3  # steps before recording: kernels are compiled and workspaces allocated in them
_CAUSAL = "edkm_export_causal"


def can_record(learner: Learner) -> bool:
    """Whether the model takes the same course in each step: on CUDA, all attention full, nothing random.

    Exact DKM is excluded: its centroids are handed from step to step by the host.
    """
    if any(each.method.backward == "dkm" for each in clusters_of(learner).values()):
        return False
    for model in (learner.model, learner.teacher):
        if model is None:
            continue
        config = model.config.get_text_config()
        full = getattr(config, "sliding_window", None) is None
        if (
            not full
            or config._attn_implementation != "sdpa"
            or next(model.parameters()).device.type != "cuda"
        ):
            return False
        if any(isinstance(each, torch.nn.Dropout) and each.p > 0 for each in model.modules()):
            return False
        if getattr(config, "attention_dropout", 0.0) or model.is_gradient_checkpointing:
            return False
    return learner.in_chunks


class GraphedStep:
    """Forward and backward pass of micro-batches, gradients added up in `grad` of the parameters.

    Takes the place of the two passes for whole windows of one shape. Gradients stay where the recording found
    them: after `zero_grad` the next call puts them back, at zero.

    Args:
        learner: `can_record` holds for it.
        divide: micro-batches of an optimizer step; each loss is divided by it.
        bf16: whether products run in bfloat16.
    """

    def __init__(self, learner: Learner, *, divide: int, bf16: bool) -> None:
        self.learner, self.divide, self.bf16 = learner, divide, bf16
        self._left = _EAGER
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._loss = torch.empty(0)
        self._trained: list[Any] = []
        self._gradients: list[Tensor] = []

    def takes(self, inputs: dict[str, Tensor]) -> bool:
        """Whether these inputs have the shape that is recorded."""
        return set(inputs) == {"input_ids"} and (
            self._graph is None or inputs["input_ids"].shape == self._ids.shape
        )

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [batch, context] -> the loss, which the next call overwrites."""
        if self._graph is None and self._left > 0:
            self._left -= 1
            return self._run_aside(input_ids)
        if self._graph is None:
            self._record(input_ids)
        self._put_back()
        self._ids.copy_(input_ids, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._loss

    def _run_aside(self, ids: Tensor) -> Tensor:
        """An ordinary step on another stream, as what precedes a recording has to be."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._passes(ids.to(torch.device("cuda"), non_blocking=True))
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _passes(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.learner(ids) / self.divide
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _record(self, ids: Tensor) -> None:
        # A step that is replayed runs no forward pass that could notice.
        assert all(each.is_attached for each in clusters_of(self.learner).values()), "attach the optimizer"
        self._trained = [each for each in self.learner.parameters() if each.requires_grad]
        self._gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in self._trained
        ]
        self._ids = ids.to(torch.device("cuda"), copy=True)
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with _without_masks(self.learner), torch.cuda.graph(self._graph):
            self._loss = self._passes(self._ids)

    def _put_back(self) -> None:
        if self._trained[0].grad is self._gradients[0]:
            return
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _without_masks(learner: Learner) -> Iterator[None]:
    """Let attention be causal by itself.

    A model cannot look at positions while it is recorded, and would materialize a mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(_CAUSAL, lambda *_, **__: None)
    configs = [
        model.config.get_text_config() for model in (learner.model, learner.teacher) if model is not None
    ]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = _CAUSAL
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
