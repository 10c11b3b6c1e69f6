"""Which interface an export gets, by what its checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError

__all__ = ["EMBEDDING_INTERFACE", "chosen_interface"]

EMBEDDING_INTERFACE = "embedding"


def chosen_interface(checkpoint: Checkpoint, asked: str | None, known: Sequence[str], default: str) -> str:
    """The interface that was asked for, or the usual one.

    Args:
        checkpoint: what is exported.
        asked: by the user; None: nothing.
        known: those of the format.
        default: that of a language model.

    Raises:
        ConversionError: there is no such interface, or the checkpoint holds a model of the other kind.
    """
    source = str(checkpoint.path or "checkpoint")
    embeds = checkpoint.embedding is not None
    if asked is None:
        asked = EMBEDDING_INTERFACE if embeds else default
    if asked not in known:
        raise ConversionError(f"--interface {asked!r} is unknown; use one of {', '.join(known)}.")
    if embeds and asked != EMBEDDING_INTERFACE:
        raise ConversionError(
            f"{source}: holds an embedding model, which gives no logits; use --interface {EMBEDDING_INTERFACE}, or "
            "leave it out."
        )
    if not embeds and asked == EMBEDDING_INTERFACE:
        raise ConversionError(
            f"{source}: holds a language model; --interface {EMBEDDING_INTERFACE} is for a checkpoint that was "
            "palettized from a folder of sentence-transformers (modules.json)."
        )
    return asked
