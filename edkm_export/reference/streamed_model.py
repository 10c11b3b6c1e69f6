"""A model of transformers whose weights are read layer by layer while it runs, and dropped after use.

The modules, hooks and forward passes are transformers' own; only where the values of the parameters come from, and how
long they stay, is decided here. A layer is computed from the same values by the same operations as in a model that is
in memory whole, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edkm_export.activity import activity
from edkm_export.memory import return_freed_memory
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.turns import Turns

__all__ = [
    "WAVE",
    "StreamedWeights",
    "device_of",
    "is_layer",
    "release",
    "run_all",
    "shared_names",
    "stream",
    "streamed_weights",
    "values_of",
]

_T = TypeVar("_T")
_ATTRIBUTE = "_edkm_streamed_weights"
_ALWAYS = -1  # stands for a block that is in memory all the time

WAVE = 16
"""Runs that share a pass at most: each has a thread, its activations and its results in memory."""


@dataclass(frozen=True)
class _Slot:
    """A parameter of a module."""

    module: nn.Module
    attribute: str
    name: str  # of the parameter in the model
    key: str  # of the values: tied parameters have one


@dataclass(frozen=True)
class _Block:
    """What is read at once: a decoder layer, or a module outside of the layers."""

    module: nn.Module
    slots: tuple[_Slot, ...]
    size_bytes: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its values, each once."""
        return tuple(dict.fromkeys(slot.key for slot in self.slots))


class StreamedWeights:
    """The weights of a model, of which one block and as many others as there is room for are in memory.

    Forward passes go through the blocks in a circle, where keeping what was used last would keep nothing of use: so
    the first blocks that fit stay, and the others are read each time.

    Args:
        model: transformers.PreTrainedModel; its parameters are on the meta device.
        read: gives the values of a parameter by its key, in the form that the model holds, in memory of their own.
        keys: {parameter name: key}, where it is another one; tied parameters have one key.
        dtype: of the values.
        room_bytes: what they may take in memory; one block is there in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[str], Tensor],
        keys: Mapping[str, str],
        dtype: torch.dtype,
        room_bytes: int,
    ) -> None:
        self._own, self._keys = read, keys
        self._others: Callable[[str], Tensor | None] = lambda _key: None
        self._blocks, always = _blocks(model, keys, dtype)
        # beside the blocks that stay: the one that is used, and what decoding it takes
        self._hold_bytes = room_bytes - 2 * max(block.size_bytes for block in self._blocks)
        self._held: set[int] = set()
        self._held_bytes = self._most_bytes = 0
        self._loaded: int | None = None
        self._slots: dict[str, list[_Slot]] = {}
        for slot in (*always, *(slot for block in self._blocks for slot in block.slots)):
            self._slots.setdefault(slot.key, []).append(slot)
        self._meta = dict(model.named_parameters(remove_duplicate=False))
        self._users: dict[str, set[int]] = {}  # of what is in memory: the blocks that it is there for
        self._bring([slot.key for slot in always], _ALWAYS)
        for number, block in enumerate(self._blocks):
            block.module.register_forward_pre_hook(self._entering(number), prepend=True)

    @property
    def words(self) -> str:
        """How the model is run, for a report."""
        total = sum(block.size_bytes for block in self._blocks)
        held = f", {self._most_bytes / 1e9:.1f} GB of them held" if self._most_bytes else ""
        return f"layer by layer, {total / 1e9:.1f} GB of weights{held}"

    def run_all(self, runs: Sequence[Callable[[], _T]], words: str = "reading weights") -> list[_T]:
        """Call functions that use the model; up to `WAVE` of them share each pass over its weights.

        Args:
            runs: called without arguments, in threads of their own, one at a time.
            words: what is shown meanwhile.

        Returns:
            What they return, in their order.
        """
        found: list[_T] = []
        with activity(words) as shown:

            def load(number: int) -> None:
                shown.detail = f"layer {number + 1} of {len(self._blocks)}"
                self._load(number)

            for start in range(0, len(runs), WAVE):
                found += Turns(load, len(self._blocks), runs[start : start + WAVE]).results()
        return found

    def read(self, name: str) -> Tensor:
        """Values of one parameter, in the form that the model holds, in memory of their own."""
        return self._read(self._keys.get(name, name))

    def replace(self, read: Callable[[str], Tensor | None]) -> None:
        """From now on, take what this gives for a key; None: the values are those that they were."""
        self.release()
        self._others = read

    def _read(self, key: str) -> Tensor:
        other = self._others(key)
        return self._own(key) if other is None else other

    def release(self) -> None:
        """Drop every block; those that are needed again are read again."""
        for number in self._held if self._loaded is None else {*self._held, self._loaded}:
            self._drop(number)
        self._held.clear()
        self._loaded, self._held_bytes = None, 0
        return_freed_memory()

    def _entering(self, number: int) -> Callable[[nn.Module, Any], None]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            if number == self._loaded or number in self._held:
                return
            run = Turns.current()
            if run is None:
                self._load(number)
            else:
                run.wait_for(number)

        return enter

    def _load(self, number: int) -> None:
        """Bring a block into memory; the one before goes, unless it is held."""
        if number == self._loaded or number in self._held:
            return
        if self._loaded is not None:
            self._drop(self._loaded)
            self._loaded = None
        block = self._blocks[number]
        self._bring(block.keys, number)
        if self._held_bytes + block.size_bytes <= self._hold_bytes:
            self._held.add(number)
            self._held_bytes += block.size_bytes
            self._most_bytes = max(self._most_bytes, self._held_bytes)
        else:
            self._loaded = number

    def _bring(self, keys: Iterable[str], number: int) -> None:
        """Put values in place for a block; tied parameters are one, in memory and out of it."""
        for key in keys:
            if key not in self._users:
                parameter = nn.Parameter(self._read(key), requires_grad=False)
                for slot in self._slots[key]:
                    assert parameter.shape == self._meta[slot.name].shape, slot.name
                    slot.module._parameters[slot.attribute] = parameter
            self._users.setdefault(key, set()).add(number)

    def _drop(self, number: int) -> None:
        """Take away what is there for this block alone."""
        for key in self._blocks[number].keys:
            self._users[key].discard(number)
            if not self._users[key]:
                del self._users[key]
                for slot in self._slots[key]:
                    slot.module._parameters[slot.attribute] = self._meta[slot.name]


def stream(
    model: Any,
    read: Callable[[str], Tensor],
    *,
    keys: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    room_bytes: int = 0,
) -> Any:
    """Let a model read its weights while it runs; see `StreamedWeights`.

    Returns:
        The model, in eval mode.
    """
    model.eval().requires_grad_(False)
    for name, buffer in stored_buffers(model).items():  # a number a layer: they are always there
        buffer.copy_(read(keys.get(name, name)))
    model.__dict__[_ATTRIBUTE] = StreamedWeights(model, read, keys, dtype, room_bytes)
    return model


def streamed_weights(model: Any) -> StreamedWeights | None:
    """The weights of a model that reads them while it runs; None: it is in memory whole."""
    found = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, StreamedWeights) else None


def run_all(model: Any, runs: Sequence[Callable[[], _T]], words: str = "reading weights") -> list[_T]:
    """Call functions that use a model, one after the other, or in step where its weights are read for all of them."""
    weights = streamed_weights(model)
    return [run() for run in runs] if weights is None else weights.run_all(runs, words)


def device_of(model: Any) -> torch.device:
    """Where a model computes: on the CPU, if it reads its weights while it runs."""
    device: torch.device = torch.device("cpu") if streamed_weights(model) is not None else model.device
    return device


def values_of(model: Any, name: str) -> Tensor:
    """Values of a parameter, in the form that the model holds; read for this, if it reads its weights while it runs."""
    weights = streamed_weights(model)
    values: Tensor = model.get_parameter(name).data if weights is None else weights.read(name)
    return values


def release(model: Any, name: str) -> None:
    """Free the values of a parameter, so that the model is used up; those that are read anew are not held."""
    if streamed_weights(model) is None:
        parameter = model.get_parameter(name)
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _blocks(
    model: nn.Module, keys: Mapping[str, str], dtype: torch.dtype
) -> tuple[list[_Block], list[_Slot]]:
    """The blocks in the order of the modules, and parameters that always stay.

    These are the ones of modules that have others inside: they may be used at any time while those run.
    """
    found: list[_Block] = []
    always: list[_Slot] = []
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        layer = is_layer(path)
        inside = f"{path}." if layer else None
        parameters = dict(module.named_parameters(path, recurse=layer, remove_duplicate=False))
        slots = tuple(_slot(model, name, keys) for name in parameters)
        if not layer and any(True for _ in module.children()):
            always += slots
        elif slots:
            size = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
            found.append(_Block(module, slots, size))
    return found, always


def _slot(model: nn.Module, name: str, keys: Mapping[str, str]) -> _Slot:
    owner, _, attribute = name.rpartition(".")
    return _Slot(model.get_submodule(owner), attribute, name, keys.get(name, name))


def shared_names(model: nn.Module) -> dict[str, str]:
    """{further name of a tied parameter: its first name}."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    return {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name}


def is_layer(name: str) -> bool:
    """Whether a module is one of the stack of layers: in a list of modules that is in no other list."""
    parent, _, number = name.rpartition(".")
    return number.isdigit() and not any(part.isdigit() for part in parent.split("."))
