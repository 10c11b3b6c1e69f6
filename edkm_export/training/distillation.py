"""Losses over a whole vocabulary in bounded memory.

Logits of 16,384 positions and 49,152 tokens take 3.2 GB in float32, and autograd keeps several such tensors.
Here the output head runs on some hundred positions at a time, forward and backward together, so that only the
gradient of the hidden states (and of the head, if it is trained) is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edkm_export.training.palettized.modules import PalettizedModule

__all__ = ["Head", "cross_entropy", "distillation", "has_plain_head", "head_of"]

_CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits of one chunk; a few tensors of that size are alive
# Settings with which a model changes its logits after the output head.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class Head:
    """An output head as tensors: weight [vocab_size, hidden], in the dtype of the product; bias or None."""

    weight: Tensor
    bias: Tensor | None


def has_plain_head(model: Any) -> bool:
    """Whether logits are head(last hidden state) and nothing else."""
    text = model.config.get_text_config()
    changed = any(getattr(text, name, None) not in (None, 0, 1.0) for name in _LOGIT_SETTINGS)
    return not changed and model.get_output_embeddings() is not None and model.base_model is not model


def head_of(model: Any, dtype: torch.dtype) -> Head:
    """The output head, differentiable when it is palettized or trained."""
    module: nn.Module = model.get_output_embeddings()
    bias = getattr(module, "bias", None)
    if isinstance(module, PalettizedModule):
        return Head(module.dense_weight(dtype), bias)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Head(weight.to(dtype), bias)


def _chunks(positions: int, vocabulary: int, device: str) -> list[slice]:
    stride = max(1, _CHUNK_LOGITS.get(device, 1 << 24) // vocabulary)
    return [slice(start, min(start + stride, positions)) for start in range(0, positions, stride)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def distillation(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Mean KL divergence of next-token distributions, KL(teacher || student), in nats.

    Args:
        hidden: last hidden states of the student, [positions, hidden].
        head: of the student.
        teacher_hidden: of the frozen original, [positions, its hidden].
        teacher: head of the original.
        mask: bool [positions], which of them count; None: all.
        temperature: divides the logits of both; the loss is multiplied by its square (Hinton et al. 2015,
            arXiv 1503.02531, section 2), so that gradients keep their size.

    Returns:
        Scalar, float32 or wider; differentiable in `hidden` and `head`.
    """
    if mask is not None:
        hidden, teacher_hidden = hidden[mask], teacher_hidden[mask]
    teacher_parts = (teacher_hidden.detach(), teacher.weight.detach(), teacher.bias)
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, None, teacher_parts, temperature
    )
    return loss


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Mean negative log likelihood, in nats.

    Args:
        hidden: [positions, hidden].
        head: output head.
        targets: int64 [positions]; negative ones do not count.

    Returns:
        Scalar, float32 or wider; differentiable in `hidden` and `head`.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, None, 1.0
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """apply(hidden, weight, bias, targets or None, teacher parts or None, temperature) -> scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        temperature: float,
    ) -> Tensor:
        wide = _wide(weight.dtype)
        positions = len(hidden)
        needs = ctx.needs_input_grad
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # A tensor where it depends on the targets: the host does not wait for it.
        count = max(1, positions) if targets is None else (targets >= 0).sum().clamp_min(1).to(wide)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        for some in _chunks(positions, len(weight), weight.device.type):
            x = hidden[some].to(weight.dtype)
            logits = _logits(x, weight, bias, wide)
            if teacher is None:
                assert targets is not None
                loss, grad = _likelihood(logits, targets[some])
            else:
                known = _logits(teacher[0][some], teacher[1], teacher[2], wide)
                loss, grad = _divergence(logits, known, temperature)
            total += loss
            if not any(needs[:3]):
                continue
            low = grad.div_(count).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[some] = low @ weight
            if grad_weight is not None:
                grad_weight += low.t() @ x
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else grad.mul_(upstream.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """Logits in a wide type: a bfloat16 result would round those around 20 to steps of 1/8."""
    x = hidden.to(weight.dtype)
    if x.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype"):
        logits: Tensor = torch.ops.aten.mm.dtype(x, weight.t(), wide)  # torch 2.8: float32 sums kept
        return logits if bias is None else logits.add_(bias)
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype)).to(wide)


def _likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss, and the gradient of the logits, [positions, vocab_size]; overwrites them.

    Negative targets do not count.
    """
    counts = (targets >= 0).to(logits.dtype)
    normalizer = logits.logsumexp(-1)
    at = targets.clamp_min(0)[:, None]
    loss = ((normalizer - logits.gather(1, at)[:, 0]) * counts).sum()
    grad = logits.sub_(normalizer[:, None]).exp_()
    grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=grad.dtype))
    return loss, grad.mul_(counts[:, None])


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Summed KL and the gradient of the student's logits, [positions, vocab_size]; overwrites both."""
    if temperature != 1.0:
        student, teacher = student.div_(temperature), teacher.div_(temperature)
    student = student.sub_(student.logsumexp(-1, keepdim=True))  # log probabilities
    teacher = teacher.sub_(teacher.logsumexp(-1, keepdim=True))
    p = teacher.exp()
    loss = (p * teacher.sub_(student)).sum() * temperature**2
    return loss, student.exp_().sub_(p).mul_(temperature)
