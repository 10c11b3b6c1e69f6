"""An exported embedding model as the verifier sees it, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

from torch import Tensor

from edkm_export.artifact.execution import DAMAGED
from edkm_export.artifact.protocol import StoredModel
from edkm_export.errors import PackageError

__all__ = [
    "CLOSE",
    "COSINE_LIMIT",
    "CosineThreshold",
    "DamagedEmbeddingArtifact",
    "EmbeddingArtifact",
    "Encode",
    "Encoding",
    "TextTokens",
    "cosine_limit",
]


@dataclass(frozen=True)
class TextTokens:
    """One text that is to be embedded.

    Attributes:
        ids: int64 [tokens], special tokens included.
        prompt: so many of the first belong to its prompt.
    """

    ids: Tensor
    prompt: int = 0


Encode = Callable[[Sequence[TextTokens]], Tensor]
"""Texts -> float32 [texts, dimension]."""


@dataclass(frozen=True)
class CosineThreshold:
    """How close embeddings must be to those of hard PyTorch.

    Attributes:
        words: the precision, in words.
        cosine: least cosine similarity of the two embeddings of a text, for every text.
        length: largest relative difference of their lengths.
        tie: two texts whose similarities to a query differ by less may come in either order.
        why: the reason.
    """

    words: str
    cosine: float
    length: float
    tie: float
    why: str

    def because(self, why: str) -> CosineThreshold:
        """The same threshold for another reason."""
        return replace(self, why=why)

    def __str__(self) -> str:
        return (
            f"cosine of every text at least {self.cosine:g}, lengths within {self.length:g}, the same order of texts "
            f"but for those within {self.tie:g}"
        )


CLOSE = {
    "float32": CosineThreshold(
        "float32",
        1 - 1e-5,
        1e-3,
        1e-3,
        "both sides compute in float32 with the same weights; tables and norms of a package are float16, which moves a "
        "cosine by about 1e-7",
    ),
    "rounded": CosineThreshold(
        "rounded to float16 after each op",
        1 - 1e-3,
        1e-2,
        1e-2,
        "rounding every result to float16 is the least that a phone does; an overflow or lost precision shows here",
    ),
    "int8": CosineThreshold(
        "activations rounded to int8",
        0.98,
        0.1,
        5e-2,
        "the weights are exact, but MatMulNBits rounds activations to int8 in blocks; whether the graph is right shows "
        "without that rounding",
    ),
}
"""By the arithmetic."""

COSINE_LIMIT: dict[int, float | None] = {8: 0.995, 6: 0.98, 4: 0.9, 3: 0.8, 2: None, 1: None}
"""Least allowed mean cosine of hard PyTorch's embeddings with the original's, by the fewest bits of a palettized
weight; None: there is none. all-MiniLM-L6-v2, calibrated, has 0.9999, 0.998, 0.970, 0.886 and 0.62 at 8 to 2 bits."""

_DENSE_COSINE = 0.9999


def cosine_limit(bits: int | None, recipe: str = "") -> tuple[float | None, str]:
    """The limit that a preset sets, and who set it, in words.

    Args:
        bits: fewest bits of an index among the palettized weights; None: nothing is palettized.
        recipe: its name, for the words.
    """
    named = f", recipe {recipe}" if recipe else ""
    if bits is None:
        return _DENSE_COSINE, f"the default where nothing is palettized{named}"
    return COSINE_LIMIT.get(bits), f"the default for {bits} bit{'s' if bits > 1 else ''}{named}"


@dataclass(frozen=True)
class Encoding:
    """One way to run an artifact; one rung of the ladder.

    Attributes:
        id: stable name of the rung, such as "execution-float32".
        words: what is run, for people.
        threshold: how close to hard PyTorch it must be.
        encode: makes embeddings; raises PackageError when the artifact is at fault. None: it cannot be run here.
        missing: why not, when `encode` is None.
    """

    id: str
    words: str
    threshold: CosineThreshold
    encode: Encode | None
    missing: str = ""


class EmbeddingArtifact(StoredModel, Protocol):
    """An exported embedding model; `context` is the most tokens of a text."""

    @property
    def encodings(self) -> Sequence[Encoding]:
        """Ways to run it, the strictest first."""
        ...


class DamagedEmbeddingArtifact:
    """Stands for an artifact that cannot be opened: it fails the rung of the bytes, and nothing of it can be run.

    Args:
        path: where it lies.
        kind: its format.
        reason: what is wrong with it.
    """

    context = 512

    def __init__(self, path: str | Path, kind: str, reason: str) -> None:
        self.path, self.kind, self.reason = Path(path), kind, reason
        self.encodings = tuple(
            Encoding(f"execution-{name}", f"executed artifact, {close.words}", close, None, DAMAGED)
            for name, close in CLOSE.items()
            if name != "int8"
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
