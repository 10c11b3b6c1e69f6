"""An artifact on disk as the verifier sees it, whatever its format.

A format takes part in the ladder by a class with the members of `Artifact`; the ladder does not depend on any format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

from torch import Tensor

from edkm_export.artifact.execution import DAMAGED, Execution
from edkm_export.artifact.thresholds import EXECUTION
from edkm_export.errors import PackageError
from edkm_export.kv_cache import FLOAT, HeldCache, KVCache
from edkm_export.palette import PalettizedTensor
from edkm_export.token_ids import Ids

__all__ = [
    "Artifact",
    "DamagedArtifact",
    "Decoding",
    "Holding",
    "Reaching",
    "Session",
    "Storing",
    "StoredModel",
    "Traceable",
    "kv_cache_of",
]


class Session(Protocol):
    """A model in the middle of a text."""

    context: int
    """Most positions that it can hold."""

    has_cache: bool
    """False: each token runs the whole text again."""

    def reset(self) -> None:
        """Forget the text."""

    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text; the cache then holds these tokens too.

        Args:
            tokens: ids [new], in any form that `as_ids` takes.

        Returns:
            Logits of these tokens, float32 [new, vocab_size].

        Raises:
            InputError: there is no room for them, or one of them is not in the vocabulary.
        """


class Holding(Session, Protocol):
    """A session that holds keys and values as int8."""

    def held(self) -> HeldCache:
        """Those of the text so far.

        Raises:
            PackageError: they cannot be had.
        """


class StoredModel(Protocol):
    """What an exporter left on disk, read back, but for how it is run."""

    @property
    def path(self) -> Path:
        """The package or folder."""
        ...

    @property
    def kind(self) -> str:
        """Format, for people: "Core ML package", "ONNX folder"."""
        ...

    @property
    def context(self) -> int:
        """Most positions that one execution takes."""
        ...

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by parameter name, read from disk.

        Raises:
            PackageError: one is damaged.
        """
        ...

    def dense(self) -> dict[str, Tensor]:
        """All other parameters by name, read from disk; other constants may be among them.

        Raises:
            PackageError: one is damaged.
        """
        ...

    def weights_size_bytes(self) -> int:
        """Size of the files that hold the weights."""
        ...

    def size_bytes(self) -> int:
        """Size of everything that ships."""
        ...


class Artifact(StoredModel, Protocol):
    """An exported language model."""

    @property
    def claimed_context(self) -> int | None:
        """Positions that it says it can hold; None: nothing that could be read."""
        ...

    @property
    def executions(self) -> Sequence[Execution]:
        """Ways to run it, the strictest first."""
        ...

    def session(self) -> Session | None:
        """The artifact with its cache, in the arithmetic of the first execution; None: the interface has no cache."""
        ...

    def rounded_session(self) -> Session | None:
        """The same, rounded to float16 after each op; None: no cache, or no such way to run it."""
        ...


@runtime_checkable
class Traceable(Protocol):
    """An artifact that can show what happens inside."""

    def trace(
        self, execution: str, tokens: Tensor, observe: Callable[[str, Tensor], None], cached: int = 0
    ) -> None:
        """Run a text and show the output of each operation.

        Args:
            execution: id of one of the executions; its arithmetic is used.
            tokens: int64 [positions].
            observe: called with the name of the operation and its output, in order; must not keep the tensor.
            cached: so many tokens are fed first, unobserved; 0 when the interface has no cache.

        Raises:
            PackageError: the artifact is at fault.
        """
        ...


@runtime_checkable
class Reaching(Protocol):
    """An artifact that can be tried at the end of its context without a text of that length."""

    def reach(self, context: int) -> None:
        """Try the last of so many positions.

        Raises:
            PackageError: it cannot be had.
        """
        ...


@runtime_checkable
class Decoding(Protocol):
    """An artifact whose palettes a program that is not ours can decode."""

    @property
    def decoder_name(self) -> str:
        """That program, for people."""
        ...

    @property
    def decoder_missing(self) -> str:
        """Why it cannot be asked here; empty when it can."""
        ...

    def decoded_elsewhere(self) -> Iterator[tuple[str, Tensor]]:
        """Each palettized parameter: name, dense weight float16 as that program decodes it from the bytes on disk.

        Raises:
            PackageError: the artifact is at fault.
        """
        ...


@runtime_checkable
class Storing(Protocol):
    """An artifact that says how it holds keys and values."""

    @property
    def kv_cache(self) -> KVCache:
        """As floats, or as int8; each session is then `Holding`, and each execution has `held`."""
        ...


def kv_cache_of(artifact: object) -> KVCache:
    """How an artifact holds keys and values; as floats where it does not say it."""
    return artifact.kv_cache if isinstance(artifact, Storing) else FLOAT


class DamagedArtifact:
    """Stands for an artifact that cannot be opened: it fails the rung of the bytes, and nothing of it can be run.

    Args:
        path: where it lies.
        kind: its format.
        reason: what is wrong with it.
    """

    context = 512  # what the original and hard PyTorch are measured with
    claimed_context = None

    def __init__(self, path: str | Path, kind: str, reason: str) -> None:
        self.path = Path(path)
        self.kind = kind
        self.reason = reason
        self.executions = tuple(
            Execution(f"execution-{name}", f"executed artifact, {threshold.words}", threshold, None, DAMAGED)
            for name, threshold in EXECUTION.items()
        )

    def palettized(self) -> NoReturn:
        """Raise PackageError."""
        raise PackageError(self.reason)

    def dense(self) -> NoReturn:
        """Raise PackageError."""
        raise PackageError(self.reason)

    def weights_size_bytes(self) -> NoReturn:
        """Raise PackageError."""
        raise PackageError(self.reason)

    def size_bytes(self) -> int:
        """Nothing that could be read."""
        return 0

    def session(self) -> None:
        """Nothing that could be run."""
        return None

    def rounded_session(self) -> None:
        """Nothing that could be run."""
        return None
