"""Core ML packages as a model in the middle of a text, run by our interpreter.

Weights are decoded when they are first used, and held as float32: four bytes a weight, six hundred megabytes for a
model of 135 million parameters with its states and the program. Where they may not take as much, those for which
there is no room are decoded at each use; see `DecodedWeights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from converters.coreml.format import (
    COUNT,
    DECODE,
    HIDDEN_IN,
    HIDDEN_OUT,
    LOGITS,
    MASK,
    POSITION,
    PREFILL,
    RECURRENCE_CACHE,
    TEXT,
    TOKENS,
)
from converters.coreml.read.decoded_weights import DecodedWeights
from converters.coreml.read.description import Description
from converters.coreml.read.folder import find_package
from converters.coreml.read.package import Package, load_package
from converters.coreml.read.program import Function
from edkm_export.context_window import require_room
from edkm_export.errors import PackageError
from edkm_export.taking_turns import taking_turns
from edkm_export.token_ids import Ids

__all__ = ["CoreMLSession", "Runnable", "open_chunks"]

_CHUNK = 64  # tokens
_FORBIDDEN = -65504.0  # what swift-transformers writes into its mask


def open_chunks(path: str | Path, room_bytes: int | None = None) -> tuple[list[Package], Description]:
    """All packages of a model and their description.

    Args:
        path: of one of the packages, or of the folder that `edkm-export coreml` made.
        room_bytes: what the decoded weights of all of them may take in memory; None: no limit.

    Raises:
        PackageError: a package is damaged or missing, or has an unknown interface.
    """
    path = find_package(path)
    decoded = DecodedWeights(room_bytes)
    package = load_package(path, decoded)
    description = Description.of(package.metadata, path) or _guess(package)
    if len(description.packages) < 2:
        return [package], description
    packages = [load_package(path.resolve().parent / file, decoded) for file in description.packages]
    for other in packages:
        if Description.of(other.metadata, other.path) != description:
            raise PackageError(f"{other.path}: belongs to another export than {path}; export again.")
    return packages, description


def _guess(package: Package) -> Description:
    """Describe a package without our metadata, which can be run if it takes whole texts."""
    function = package.functions[package.default_function]
    shape = function.inputs[TEXT].type.fixed_shape if TEXT in function.inputs else None
    if set(function.inputs) != {TEXT} or LOGITS not in function.outputs or function.states:
        raise PackageError(
            f"{package.path}: function '{function.name}' takes {', '.join(function.inputs) or 'nothing'}, expected "
            f"`{TEXT}` and an output `{LOGITS}`, or a package that edkm-export made."
        )
    if shape is None or len(shape) != 2:
        raise PackageError(
            f"{package.path}: `{TEXT}` is {function.inputs[TEXT].type}, expected a fixed length."
        )
    return Description("logits", shape[1], 0, (package.path.name,))


class Runnable(Protocol):
    """What a session needs of a package; see `Package`, which is one."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def functions(self) -> Mapping[str, Function]:
        """Functions by name."""

    @property
    def default_function(self) -> str:
        """Name of the one that runs when None is asked for."""

    def new_state(self, function: str | None = None) -> Any:
        """State of a fresh text."""

    def run(
        self, inputs: Mapping[str, Tensor], *, function: str | None, state: Any, precision: str
    ) -> dict[str, Tensor]:
        """Outputs by name."""


class CoreMLSession:
    """The packages of one model.

    Args:
        packages: in the order in which they run.
        description: how they are called.
        precision: of the arithmetic: "float32", "rounded" or "float16".

    Attributes:
        context: most positions that it can hold.
        has_cache: whether the interface keeps one.

    Raises:
        PackageError: the packages do not have the inputs and outputs that their description promises.
    """

    def __init__(
        self, packages: Sequence[Runnable], description: Description, precision: str = "float32"
    ) -> None:
        if description.interface == "embedding":
            raise PackageError(f"{packages[0].path}: gives embeddings and continues no text.")
        self.context = description.context
        self.has_cache = description.interface != "logits"
        self._where, self._how = str(packages[0].path), f"{description.interface}, {precision}"
        kind = _CALLERS[description.interface]
        self._caller = kind(packages, description, precision)
        logits = packages[-1].functions[packages[-1].default_function].outputs.get(LOGITS)
        if logits is None or not logits.shape or logits.shape[-1] is None:
            raise PackageError(f"{packages[-1].path}: has no output `logits` of a fixed vocabulary.")
        self._vocab_size = logits.shape[-1]
        self.reset()

    @classmethod
    def open(
        cls, path: str | Path, precision: str = "float32", room_bytes: int | None = None
    ) -> CoreMLSession:
        """Open a model for generation.

        Args:
            path: of a package, of one of its chunks, or of the folder that `edkm-export coreml` made.
            precision: of the arithmetic: "float32", "rounded" or "float16".
            room_bytes: what decoded weights may take in memory; None: no limit.

        Raises:
            PackageError: see `open_chunks`.
        """
        packages, description = open_chunks(path, room_bytes)
        return cls(packages, description, precision)

    def __repr__(self) -> str:
        """One line: package, interface, precision, positions taken."""
        return (
            f"CoreMLSession({Path(self._where).name}, {self._how}, "
            f"{self._used:,} of {self.context:,} positions taken)"
        )

    @taking_turns
    def reset(self) -> None:
        """Forget the text."""
        self._used = 0
        self._caller.reset()

    @taking_turns
    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text: ids [new], in any form that `as_ids` takes -> logits float32 [new, vocab_size].

        Raises:
            InputError: there is no room for the tokens, or one is outside the vocabulary.
            PackageError, UnsupportedOpError: the program cannot be run.
        """
        ids = require_room(tokens, self._used, self.context, self._vocab_size, self._where)
        logits = self._caller.call(ids, self._used)
        self._used += len(ids)
        return logits


class _Caller(Protocol):
    """How the functions of an interface are called."""

    def reset(self) -> None: ...

    def call(self, tokens: Tensor, used: int) -> Tensor:
        """Tokens int64 [new] after `used` others -> logits float32 [new, vocab_size]."""


class _WholeSequence:
    """No cache: the whole text is run again."""

    def __init__(self, packages: Sequence[Runnable], description: Description, precision: str) -> None:
        (self._package,) = packages
        self._precision, self._length = precision, description.context

    def reset(self) -> None:
        self._text = torch.empty(0, dtype=torch.int64)

    def call(self, tokens: Tensor, used: int) -> Tensor:
        self._text = torch.cat((self._text, tokens))
        padded = torch.nn.functional.pad(self._text, (0, self._length - len(self._text)))
        outputs = self._package.run(
            {TEXT: padded[None].int()}, function=None, state=None, precision=self._precision
        )
        return _logits(outputs, self._package)[used : used + len(tokens)]


class _Stateful:
    """All new tokens in one call; of a program with a recurrence so many that its one chunk stays small."""

    def __init__(self, packages: Sequence[Runnable], description: Description, precision: str) -> None:
        (self._package,) = packages
        self._precision = precision
        function = self._package.functions[self._package.default_function]
        self._most = _CHUNK if RECURRENCE_CACHE in function.states else description.context

    def reset(self) -> None:
        self._state = self._package.new_state()

    def call(self, tokens: Tensor, used: int) -> Tensor:
        pieces = []
        for piece in tokens.split(self._most):  # type: ignore[no-untyped-call]
            pieces.append(self._run(piece, used))
            used += len(piece)
        return torch.cat(pieces)

    def _run(self, tokens: Tensor, used: int) -> Tensor:
        inputs = {
            TOKENS: tokens[None].int(),
            MASK: _mask(len(tokens), used, used + len(tokens)),
        }
        outputs = self._package.run(inputs, function=None, state=self._state, precision=self._precision)
        return _logits(outputs, self._package)


class _NeuralEngine:
    """Prompts in pieces of the prefill length, padded on the right; up to a quarter of one is decoded instead."""

    def __init__(self, packages: Sequence[Runnable], description: Description, precision: str) -> None:
        self._packages, self._precision = packages, precision
        self._prefill, self._context = description.prefill, description.context
        for package in packages:
            if missing := {PREFILL, DECODE} - package.functions.keys():
                raise PackageError(f"{package.path}: has no function {min(missing)!r}; export it again.")

    def reset(self) -> None:
        self._states = [package.new_state(DECODE) for package in self._packages]

    def call(self, tokens: Tensor, used: int) -> Tensor:
        pieces, done = [], 0
        while done < len(tokens):
            # Padding is written after the text, where it is overwritten before any token attends to it.
            fits = used + done + self._prefill <= self._context
            long = fits and len(tokens) - done > self._prefill // 4
            piece = tokens[done : done + (self._prefill if long else 1)]
            pieces.append(self._run(piece, used + done, PREFILL if long else DECODE))
            done += len(piece)
        return torch.cat(pieces)

    def _run(self, tokens: Tensor, position: int, function: str) -> Tensor:
        new = self._prefill if function == PREFILL else 1
        values = torch.nn.functional.pad(tokens, (0, new - len(tokens)))[None].int()
        common = {
            POSITION: torch.tensor([position], dtype=torch.int32),
            MASK: _mask(new, position, self._context),
            COUNT: torch.tensor([len(tokens)], dtype=torch.int32),
        }
        outputs: dict[str, Tensor] = {}
        for package, state in zip(self._packages, self._states, strict=True):
            first = {TOKENS: values} if not outputs else {HIDDEN_IN: outputs[HIDDEN_OUT]}
            # layers without attention need no mask, and only states that do not grow need the count
            taken = {
                name: value for name, value in common.items() if name in package.functions[function].inputs
            }
            outputs = package.run(
                {**first, **taken}, function=function, state=state, precision=self._precision
            )
            if package is not self._packages[-1] and HIDDEN_OUT not in outputs:
                raise PackageError(f"{package.path}: has no output {HIDDEN_OUT!r}; export it again.")
        return _logits(outputs, self._packages[-1])[: len(tokens)]


_CALLERS: dict[str, type[_WholeSequence] | type[_Stateful] | type[_NeuralEngine]] = {
    "logits": _WholeSequence,
    "swift-transformers": _Stateful,
    "neural-engine": _NeuralEngine,
}


def _mask(new: int, used: int, total: int) -> Tensor:
    """Additive causal mask of `new` tokens after `used` others, float32 [1, 1, new, total]."""
    return torch.full((1, 1, new, total), _FORBIDDEN).triu(used + 1)


def _logits(outputs: dict[str, Tensor], package: Runnable) -> Tensor:
    logits = outputs.get(LOGITS)
    if logits is None or logits.dim() != 3:
        raise PackageError(f"{package.path}: has no output `logits` of rank 3; export it again.")
    return logits[0].float()
