"""A module as tracing wants it: tensors in, a flat tuple of tensors out, each with a name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.array_input import as_tensor
from edkm_export.errors import ConversionError

__all__ = ["TraceableModule", "make_traceable", "named_arguments"]

_MASK = "attention_mask"
_HIDDEN = -1e4  # added to the score of a padded key; exp(-1e4) is 0, and float16 can hold it
_RTOL, _ATOL = 1e-3, 1e-4  # float32 sums in another order


class TraceableModule(nn.Module):
    """Calls a module, and gives its outputs as a flat tuple.

    Args:
        module: is held as `wrapped`.
        names: of the arguments, in order.
        by_name: give them by name, not by position.
        own_mask: make the additive mask of an encoder from `attention_mask` [batch, tokens]: that of transformers uses
            operations that Core ML does not have.
    """

    PREFIX = "wrapped."

    def __init__(self, module: nn.Module, names: Sequence[str], *, by_name: bool, own_mask: bool) -> None:
        super().__init__()
        self.wrapped = module
        self._names, self._by_name, self._own_mask = tuple(names), by_name, own_mask

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The outputs that hold tensors, in order."""
        return tuple(tensor for _, tensor in self.named_outputs(arguments))

    def named_outputs(self, arguments: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The same with their names; empty names where the module gives none."""
        where = type(self.wrapped).__name__
        if not self._by_name:
            return list(_flat("", self.wrapped(*arguments), where))
        named = dict(zip(self._names, arguments, strict=True))
        if self._own_mask:
            named[_MASK] = (1.0 - named[_MASK][:, None, None, :].float()) * _HIDDEN
        return list(_flat("", self.wrapped(**named), where))


@torch.no_grad()
def make_traceable(
    module: nn.Module, examples: Sequence[Any] | Mapping[str, Any]
) -> tuple[TraceableModule | nn.Module, dict[str, Tensor], list[str] | None]:
    """Wrap a module, if it needs that.

    Args:
        module: in eval mode.
        examples: its arguments: in order, or by name.

    Returns:
        What is to be traced; the arguments by name, in order; names of the outputs, None: it names none.

    Raises:
        ConversionError: there are more arguments than it takes, it fails on them, an output is no tensor, or it
            computes something else with the mask that is made for it.
    """
    where = type(module).__name__
    arguments = named_arguments(module, examples)
    own_mask = _is_transformers(module) and _MASK in arguments and arguments[_MASK].dim() == 2
    by_name = own_mask or isinstance(examples, Mapping)
    wrapper = TraceableModule(module, list(arguments), by_name=by_name, own_mask=own_mask)
    try:
        outputs = wrapper.named_outputs(list(arguments.values()))
        expected = list(_flat("", module(**arguments), where)) if own_mask else outputs
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConversionError(
            f"{where}: fails on the example inputs {', '.join(arguments)}: {_first_line(error)}"
        ) from error
    if not outputs:
        raise ConversionError(f"{where}: gives no tensor for the example inputs {', '.join(arguments)}.")
    if not all(
        torch.allclose(ours.float(), theirs.float(), rtol=_RTOL, atol=_ATOL)
        for (_, ours), (_, theirs) in zip(outputs, expected, strict=True)
    ):
        raise ConversionError(
            f"{where}: does not attend to all tokens that {_MASK} shows, so its mask cannot be traced; give a module "
            "that makes its own, or leave the mask out."
        )
    names = [name for name, _ in outputs]
    if all(names):
        return wrapper, arguments, names
    return (wrapper if by_name else module), arguments, None


def named_arguments(module: nn.Module, examples: Sequence[Any] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Example inputs by the names of the arguments of `forward`."""
    where = type(module).__name__
    if isinstance(examples, Mapping):
        return {
            str(name): as_tensor(value, f"{where}: example input {name!r}")
            for name, value in examples.items()
        }
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(examples) > len(names):
        raise ConversionError(
            f"{where}.forward takes {len(names)} arguments, {len(examples)} example inputs were given."
        )
    return {
        name: as_tensor(value, f"{where}: example input {name!r}")
        for name, value in zip(names, examples, strict=False)
    }


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "model_type")


def _flat(name: str, value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested outputs with their names: "logits", "hidden_states_0"; None is left out."""
    if isinstance(value, Tensor):
        yield name, value
    elif value is None:
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}_{key}" if name else str(key), inner, where)
    elif hasattr(value, "_asdict"):  # a named tuple
        yield from _flat(name, value._asdict(), where)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        yield from _flat(name, fields, where)
    elif isinstance(value, (tuple, list)):
        for place, inner in enumerate(value):
            yield from _flat(f"{name}_{place}" if name else "", inner, where)
    else:
        advice = "; set config.use_cache = False" if "Cache" in type(value).__name__ else ""
        raise ConversionError(
            f"{where}: its output {name or 'is'} {f'is a {type(value).__name__}' if name else type(value).__name__}, "
            f"expected tensors{advice}."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
