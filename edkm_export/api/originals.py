"""What a checkpoint is compared with: the evaluation text, the float model, and the soft model of its training run."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.reference.soft_model import SoftWeights
    from edkm_export.reference.source import Source
    from edkm_export.token_ids import Ids

__all__ = ["check_length", "check_sentences", "find_original", "find_soft", "read_evaluation_text"]


def read_evaluation_text(path: str | Path | None, *, sentences: bool = False) -> tuple[str, str]:
    """A text and what to call it; the built-in sample when no file is named.

    Args:
        path: of the file; None: none is named.
        sentences: the built-in one is to be the texts for embedding models, one a line.
    """
    from edkm_export.text import read_text

    if path is None and sentences:
        return (files("edkm_export.verify") / "sentences.txt").read_text(encoding="utf-8"), "built-in texts"
    if path is None:
        return (files("edkm_export.verify") / "sample.txt").read_text(encoding="utf-8"), "built-in sample"
    return read_text(path), str(path)


def check_length(text: str | Ids, tokenizer: Any, tokens: int, name: str) -> None:
    """Refuse a text that is too short, before a model is loaded or converted.

    Raises:
        InputError: it is; the message names it, with what it has and what is needed.
    """
    from edkm_export.text import LEAST_TOKENS, token_windows

    token_windows(text, tokenizer, tokens=tokens, context=tokens, source=name, least=LEAST_TOKENS)


def check_sentences(text: str | Ids, name: str) -> None:
    """Refuse texts that an embedding model cannot be verified with.

    Raises:
        InputError: they are token ids, or too few.
    """
    from edkm_export.errors import InputError
    from edkm_export.verify.sentences import read_sentences

    if not isinstance(text, str):
        raise InputError(f"{name}: are token ids; an embedding model is verified with texts, one a line.")
    read_sentences(text, name)


def find_original(checkpoint: Checkpoint, asked: Source | None) -> tuple[Source | None, str]:
    """The float model, or the reason why there is none. One that was asked for must be there."""
    from edkm_export.errors import InputError
    from edkm_export.reference.source import Source

    if asked is not None:
        return asked, ""
    base = checkpoint.provenance.get("base_model")
    reference = base.get("reference") if isinstance(base, dict) else None
    if not isinstance(reference, str):
        return None, "the checkpoint does not say what it was made from; name it with --original"
    found = _seen_from(checkpoint, reference)
    if found is None:
        return None, f"{Path(reference).name} is not here; name it with --original"
    try:
        adapter = base.get("adapter") if isinstance(base, dict) else None
        merged = adapter.get("reference") if isinstance(adapter, dict) else None
        source = Source.parse(found, merged and (_seen_from(checkpoint, merged) or merged))
        if not _is_unchanged(source, base):
            return (
                None,
                f"{Path(reference).name} has changed since it was palettized; name the right one with --original",
            )
    except InputError as error:
        return None, str(error)
    return source, ""


def _seen_from(checkpoint: Checkpoint, reference: str) -> str | None:
    """What a checkpoint names, from its folder or from the working folder; None where nothing is there."""
    folders = [] if checkpoint.path is None else [checkpoint.path.parent]
    places = (folder / reference for folder in [*folders, Path()])
    return next((str(place) for place in places if place.exists()), None)


def _is_unchanged(source: Source, recorded: Any) -> bool:
    """Whether the weights of a source, and of its adapter, are those that were recorded."""
    found = source.provenance()
    added, before = found.get("adapter", {}), recorded.get("adapter") or {}
    return bool(found["sha256"] == recorded.get("sha256") and added.get("sha256") == before.get("sha256"))


def find_soft(checkpoint: Checkpoint, asked: str | Path | None) -> tuple[SoftWeights | None, str]:
    """What the run of a checkpoint left of its soft model, or the reason why there is none.

    Without `asked` the run is looked for where the checkpoint lies. One that was asked for must be there.
    """
    from edkm_export.errors import InputError

    folder = asked or (checkpoint.path.parent if checkpoint.path is not None else None)
    if asked is None and (folder is None or "training" not in checkpoint.provenance):
        return None, "the checkpoint was palettized in one shot: there is no soft model"
    assert folder is not None
    from edkm_export.training.soft_weights import read_soft_weights

    try:
        return read_soft_weights(folder, checkpoint), ""
    except InputError as error:
        if asked is not None:
            raise
        return None, str(error)
