"""The gated delta rule as a Scan over the tokens (onnx/docs/Operators.md)."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.backend import load_onnx
from converters.onnx.write.tracing import Tracer, Value
from edkm_export.decoder.context import Context
from edkm_export.decoder.linear_attention import Rule, decays

__all__ = ["replace_rule"]


def replace_rule(module: torch.nn.Module, tracer: Tracer) -> None:
    """Let a rule of a decoder be a Scan, if the module is one: a chunk would have to be as long as any prompt."""
    if isinstance(module, Rule):
        module.forward = _ScannedRule(module, tracer)  # type: ignore[method-assign, assignment]


class _ScannedRule:
    """`Rule.forward`, a token after the other, in float32.

    Args:
        module: the decoder's rule.
        tracer: of the graph.
    """

    def __init__(self, module: Rule, tracer: Tracer) -> None:
        self._module, self._tracer = module, tracer

    def __call__(
        self, mixed: Value, strength: Value, fading: Value, a_log: Any, dt_bias: Any, before: Value, context: Context
    ) -> tuple[Value, Value]:  # fmt: skip
        wide = torch.float32
        made: Any = self._module.heads(mixed.to(wide))  # type: ignore[arg-type]
        queries, keys, values = made
        decay: Any = decays(fading.to(wide), self._parameter(a_log), self._parameter(dt_bias))  # type: ignore[arg-type]
        strength = strength.to(wide)._unary("Sigmoid")
        if context.real is not None:
            real: Any = context.real
            decay, strength = decay * real.to(wide), strength * real.to(wide)
        # One token of each is what the body works with: rows [batch, heads, 1, dim], and numbers [batch, heads, 1, 1].
        rows = [each.unsqueeze(3) for each in (queries, keys, values)]
        numbers = [
            each.transpose(1, 2).unsqueeze(-1).unsqueeze(-1) for each in (decay._unary("Exp"), strength)
        ]
        return self._scan(before, [*rows, *numbers])

    def _parameter(self, parameter: torch.Tensor) -> Value:
        name = self._tracer.weights.vector(self._tracer.parameters[id(parameter)], wide=True)
        return Value(self._tracer, name, tuple(parameter.shape), torch.float32)

    def _scan(self, before: Value, tokens: list[Value]) -> tuple[Value, Value]:
        """Matrices before, what each token brings -> outputs [batch, new, value_heads, value_dim], matrices after."""
        graph = self._tracer.graph
        name = graph.unique("DeltaRule")
        graph.append(
            "Scan",
            (before.name, *(each.name for each in tokens)),
            (f"{name}.matrices", name),
            body=_body(),
            num_scan_inputs=len(tokens),
            scan_input_axes=[2] * len(tokens),
            scan_output_axes=[1],
        )
        batch, heads, new, _, dim = tokens[2].shape
        outputs = Value(self._tracer, name, (batch, new, heads, 1, dim), torch.float32)
        after = Value(self._tracer, f"{name}.matrices", before.shape, torch.float32)
        return outputs.reshape(batch, new, heads, dim), after


def _body() -> Any:
    """One token; see `decoder.delta_rule.delta_step`."""
    helper, types = load_onnx().helper, load_onnx().TensorProto
    given = ("matrices", "query", "key", "value", "decay", "strength")
    nodes = [
        ("Mul", ("matrices", "decay"), "faded", {}),
        ("MatMul", ("key", "faded"), "held", {}),
        ("Sub", ("value", "held"), "missing", {}),
        ("Mul", ("missing", "strength"), "written", {}),
        ("Transpose", ("key",), "column", {"perm": [0, 1, 3, 2]}),
        ("Mul", ("column", "written"), "change", {}),
        ("Add", ("faded", "change"), "after", {}),
        ("MatMul", ("query", "after"), "output", {}),
    ]
    return helper.make_graph(
        [
            helper.make_node(op, list(inputs), [output], name=output, **attributes)
            for op, inputs, output, attributes in nodes
        ],
        "token",
        [helper.make_tensor_value_info(each, types.FLOAT, None) for each in given],
        [helper.make_tensor_value_info(each, types.FLOAT, None) for each in ("after", "output")],
    )
