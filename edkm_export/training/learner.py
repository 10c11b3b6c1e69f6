"""The module that is trained: a palettized model with its loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.reference.conv1d import is_conv1d
from edkm_export.training.distillation import Head, cross_entropy, distillation, has_plain_head, head_of

__all__ = ["Learner", "Student", "hold_in_bfloat16"]

Objective = Literal["distillation", "cross-entropy"]


class Learner(nn.Module):
    """A student and its loss in one forward pass, so that wrappers such as FSDP see the whole computation.

    Attributes:
        model: the palettized student, a causal language model of transformers.
        config: the student's.
    """

    def __init__(
        self, model: Any, teacher: Any | None, *, objective: Objective, temperature: float = 1.0
    ) -> None:
        super().__init__()
        assert (teacher is None) == (objective == "cross-entropy")
        self.model = model
        self.config = model.config
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._teacher = (teacher,)  # not a submodule: it is neither trained nor saved
        self._teacher_head: Head | None = None
        self.temperature = temperature
        self.in_chunks = has_plain_head(model)

    @property
    def teacher(self) -> Any | None:
        """The frozen original, None for cross-entropy."""
        return self._teacher[0]

    def forward(self, input_ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """Mean loss over the positions that count.

        Args:
            input_ids: int64 [batch, context].
            counts: bool [batch, context], whether a token is one to be predicted; None: all but each first.
        """
        if self.in_chunks:
            return self._loss_in_chunks(input_ids, counts)
        return self._loss_of_logits(input_ids, counts)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the student, [batch, context, vocab_size]."""
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found

    def _loss_in_chunks(self, ids: Tensor, counts: Tensor | None) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        dtype = _product_dtype(hidden)
        head = head_of(self.model, dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.teacher is None:
            return cross_entropy(flat, head, _targets(ids, counts).reshape(-1))
        with torch.no_grad():
            known = self.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if self._teacher_head is None or self._teacher_head.weight.dtype != dtype:
                self._teacher_head = head_of(self.teacher, dtype)
        mask = _positions(ids, counts)
        return distillation(
            flat,
            head,
            known.reshape(-1, known.shape[-1]),
            self._teacher_head,
            None if mask is None else mask.reshape(-1),
            temperature=self.temperature,
        )

    def _loss_of_logits(self, ids: Tensor, counts: Tensor | None) -> Tensor:
        """For models that change their logits after the head; these are held as a whole."""
        logits = self.model(input_ids=ids, use_cache=False).logits.float()
        targets = _targets(ids, counts).reshape(-1)
        flat = logits.reshape(-1, logits.shape[-1])
        if self.teacher is None:
            return F.cross_entropy(flat, targets, ignore_index=-1)
        with torch.no_grad():
            known = self.teacher(input_ids=ids, use_cache=False).logits.float().reshape(flat.shape)
        mask = _positions(ids, counts)
        if mask is not None:
            flat, known = flat[mask.reshape(-1)], known[mask.reshape(-1)]
        p = (known / self.temperature).log_softmax(-1)
        q = (flat / self.temperature).log_softmax(-1)
        loss: Tensor = (p.exp() * (p - q)).sum(-1).mean() * self.temperature**2
        return loss


def hold_in_bfloat16(original: Any, within: nn.Module | None = None) -> None:
    """Round the matrices of a frozen model's linear layers to what autocast makes of them in every pass, in place.

    For bfloat16 training: products are the same to the last bit, and weights are half as large, on each GPU and when
    they are gathered. Embedding, head and norms stay as they are.

    Args:
        original: the model.
        within: the part of it that is meant; None: all of it.
    """
    outer = {id(original.get_input_embeddings()), id(original.get_output_embeddings())}
    for module in (original if within is None else within).modules():
        if id(module) not in outer and (type(module) is nn.Linear or is_conv1d(module)):
            weight: Any = module.weight
            if weight.dtype != torch.bfloat16:
                weight.data = weight.data.to(torch.bfloat16)


class Student:
    """The student as evaluations call it: through the learner, for which FSDP2 gathers embedding and head."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.parameters, self.eval, self.train = learner.parameters, learner.eval, learner.train

    @property
    def training(self) -> bool:
        """Mode of its modules."""
        return self._learner.training

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """`.logits` [batch, context, vocab_size]; a collective."""
        assert not use_cache
        return SimpleNamespace(logits=self._learner.logits(input_ids))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _targets(ids: Tensor, counts: Tensor | None) -> Tensor:
    """The next token of each position, -1 where it does not count: [batch, context]."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:] if counts is None else torch.where(counts[:, 1:], ids[:, 1:], -1)
    return targets


def _positions(ids: Tensor, counts: Tensor | None) -> Tensor | None:
    """Positions whose prediction is compared: all of them, or those before a token that counts."""
    if counts is None:
        return None
    mask = torch.zeros_like(counts)
    mask[:, :-1] = counts[:, 1:]
    return mask
