"""The gated delta rule as a loop over the tokens, whose number a trace leaves open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.decoder.context import Context
from edkm_export.decoder.delta_rule import delta_step
from edkm_export.decoder.linear_attention import Rule

__all__ = ["loop_rules"]


def loop_rules(module: nn.Module) -> None:
    """Let each rule of a decoder be a loop: one chunk would have to be as long as the longest prompt."""
    for each in module.modules():
        if isinstance(each, Rule):
            each.forward = _LoopedRule(each)  # type: ignore[method-assign, assignment]


class _LoopedRule:
    """`Rule.forward`, a token after the other.

    Args:
        module: the decoder's rule.
    """

    def __init__(self, module: Rule) -> None:
        self._module = module

    def __call__(
        self, mixed: Tensor, strength: Tensor, fading: Tensor, a_log: Tensor, dt_bias: Tensor, before: Tensor,
        context: Context,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert context.real is None, "this interface knows no padding"
        tokens = self._module.operands(mixed, strength, fading, a_log, dt_bias, context)
        outputs = torch.zeros(
            tokens[2].shape
        )  # a loop keeps the strides of what it carries: not those of a view
        start = torch.zeros((), dtype=torch.int64)
        _, after, outputs = torch.ops.higher_order.while_loop(_more, _step, (start, before, outputs), tokens)
        return outputs.transpose(1, 2), after


def _more(token: Tensor, matrices: Tensor, outputs: Tensor, *tokens: Tensor) -> Tensor:
    return token < tokens[0].shape[2]


def _step(token: Tensor, matrices: Tensor, outputs: Tensor, *tokens: Tensor) -> tuple[Any, ...]:
    place = token.view(1)
    queries, keys, values, decay, strength = (torch.index_select(each, 2, place) for each in tokens)
    output, matrices = delta_step(queries, keys, values, decay, strength, matrices)
    places = token.view(1, 1, 1, 1).expand(output.shape)
    return token + 1, matrices, outputs.scatter(2, places, output)
