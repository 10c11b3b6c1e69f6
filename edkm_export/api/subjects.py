"""A language model that is to be palettized: on disk or on a hub, or in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.reference import source as sources
from edkm_export.reference.account import Account
from edkm_export.reference.memory_model import account_of_model, portable
from edkm_export.reference.outline import outline

__all__ = ["MemorySubject", "SourceSubject", "Subject"]


class Subject(Protocol):
    """What palettization asks of a model. Nothing but `load` takes the weights."""

    @property
    def where(self) -> str:
        """What to call it."""

    @property
    def consume(self) -> bool:
        """Whether the loaded model may be used up."""

    def embedding(self) -> EmbeddingSettings | None:
        """Pooling and what follows, of an embedding model; None: it is a language model."""

    def config(self) -> Any:
        """Configuration of transformers."""

    def account(self) -> Account:
        """What becomes of its parts; one with a part that is not understood is refused."""

    def outline(self) -> Any:
        """The model, perhaps without values."""

    def tokenizer(self) -> Any:
        """Tokenizer of transformers; None: it has none."""

    def load(self, room_bytes: int | None = None) -> Any:
        """The model, in eval mode, on the CPU or where it is: transformers' own, or a `SentenceModel`.

        Args:
            room_bytes: see `reference.source.load_model`.
        """

    def settings(self, model: Any) -> Any:
        """What holds `config` and `generation_config`, which may be changed."""

    def base_model(self) -> dict[str, Any]:
        """Reference and digests, for the provenance."""


@dataclass(frozen=True)
class SourceSubject:
    """A folder, a hub id or a GGUF file.

    Attributes:
        source: where it is.
        given_tokenizer: instead of its own; None: its own.
    """

    source: sources.Source
    given_tokenizer: Any = None
    consume: bool = True

    @property
    def where(self) -> str:
        """What the user gave."""
        return self.source.reference

    def embedding(self) -> EmbeddingSettings | None:
        """See `Subject`."""
        return sources.embedding_settings(self.source)

    def config(self) -> Any:
        """See `Subject`."""
        return sources.load_config(self.source)

    def account(self) -> Account:
        """See `Subject`."""
        found = sources.account(self.source)
        found.require_understood()
        return found

    def outline(self) -> Any:
        """See `Subject`."""
        return outline(self.source)

    def tokenizer(self) -> Any:
        """See `Subject`."""
        return sources.load_tokenizer(self.source) if self.given_tokenizer is None else self.given_tokenizer

    def load(self, room_bytes: int | None = None) -> Any:
        """See `Subject`; an embedding model is read whole."""
        if self.embedding() is not None:
            return sources.load_embedding_model(self.source)
        return sources.load_model(self.source, room_bytes=room_bytes)

    def settings(self, model: Any) -> Any:
        """The model itself, which is used up."""
        return model

    def base_model(self) -> dict[str, Any]:
        """See `Subject`."""
        return self.source.provenance()


@dataclass(frozen=True)
class MemorySubject:
    """A model of transformers that is left as it is.

    Attributes:
        model: the model.
        given_tokenizer: None: there is none.
    """

    model: Any
    given_tokenizer: Any = None
    consume: bool = False

    @property
    def where(self) -> str:
        """Its class."""
        return f"{type(self.model).__name__} in memory"

    def embedding(self) -> None:
        """See `Subject`."""
        return None

    def config(self) -> Any:
        """See `Subject`."""
        return self.model.config

    def account(self) -> Account:
        """See `Subject`."""
        return account_of_model(self.model, self.where)

    def outline(self) -> Any:
        """The model itself."""
        return self.model

    def tokenizer(self) -> Any:
        """See `Subject`."""
        return self.given_tokenizer

    def load(self, room_bytes: int | None = None) -> Any:
        """The model itself, which is in memory."""
        return self.model

    def settings(self, model: Any) -> Any:
        """Copies."""
        return portable(model)

    def base_model(self) -> dict[str, Any]:
        """There are no files to name."""
        return {"reference": self.where, "sha256": {}}
