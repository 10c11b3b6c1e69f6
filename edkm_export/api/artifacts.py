"""Whatever `edkm-export` exported, of any format: the one place that tells formats apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.artifact.encodings import EmbeddingArtifact
    from edkm_export.artifact.protocol import Artifact, Session
    from edkm_export.checkpoint import Checkpoint

__all__ = [
    "find_artifact",
    "is_artifact",
    "open_artifact",
    "open_embedding_artifact",
    "open_session",
    "predicted_size_bytes",
]


def is_artifact(path: str | Path) -> bool:
    """True for what may be an exported model, false for what may be a checkpoint."""
    from converters.onnx.read.folder import is_onnx

    return is_onnx(path) or Path(path).is_dir()


def find_artifact(path: str | Path) -> Path:
    """The artifact that a user means: itself, or the one inside a folder that we made.

    Raises:
        PackageError: there is none, or more than one.
    """
    from converters.coreai.read.folder import find_asset, is_coreai
    from converters.coreml.read.folder import find_package
    from converters.onnx.read.folder import is_onnx

    path = Path(path)
    if is_coreai(path):
        return find_asset(path)
    return path if is_onnx(path) else find_package(path)


def open_artifact(path: str | Path, room_bytes: int | None = None) -> Artifact:
    """Open what `find_artifact` found, for the verifier; an embedding model is a damaged language model.

    Args:
        path: of the artifact.
        room_bytes: what its decoded weights may take in memory, where our own interpreter runs it; None: no limit.
    """
    from edkm_export.artifact.protocol import DamagedArtifact

    found = _open(path, room_bytes)
    if hasattr(found, "encodings"):
        reason = f"{path}: holds an embedding model, not a language model; it was exported from another checkpoint."
        return DamagedArtifact(path, found.kind, reason)
    return found


def open_embedding_artifact(path: str | Path) -> EmbeddingArtifact:
    """The same, where an embedding model should be."""
    from edkm_export.artifact.encodings import DamagedEmbeddingArtifact

    found = _open(path)
    if hasattr(found, "encodings"):
        return cast("EmbeddingArtifact", found)
    reason = getattr(
        found, "reason", f"{path}: gives logits, not embeddings; it was exported from another checkpoint."
    )
    return DamagedEmbeddingArtifact(path, found.kind, reason)


def _open(path: str | Path, room_bytes: int | None = None) -> Artifact | EmbeddingArtifact:
    """Whatever lies there."""
    from converters.onnx.read.folder import is_onnx

    path = Path(path)
    if is_onnx(path):
        from converters.onnx.read.artifact import open_artifact as open_onnx

        return open_onnx(path)
    from converters.coreai.read.folder import is_coreai

    if is_coreai(path):
        from converters.coreai.read.artifact import open_artifact as open_coreai

        return open_coreai(path)
    from converters.coreml.read.artifact import open_artifact as open_coreml

    return open_coreml(path, room_bytes)


def open_session(path: str | Path, room_bytes: int | None = None) -> tuple[Session, Path]:
    """A session for an exported model, and the folder that holds its tokenizer.

    Args:
        path: of the model.
        room_bytes: see `open_artifact`.

    Raises:
        PackageError: it is damaged, or has an unknown interface.
    """
    from converters.onnx.read.folder import OnnxFolder, is_onnx

    path = Path(path)
    if is_onnx(path):
        from converters.onnx.read.session import OnnxSession

        return OnnxSession.open(path), OnnxFolder.find(path).root
    from converters.coreai.read.folder import find_asset, is_coreai, tokenizer_folder

    if is_coreai(path):
        from converters.coreai.read.session import open_session as open_coreai

        asset = find_asset(path)
        return open_coreai(asset), tokenizer_folder(asset)
    from converters.coreml.read.folder import find_package
    from converters.coreml.read.session import CoreMLSession

    package = find_package(path)
    return CoreMLSession.open(package, room_bytes=room_bytes), package.parent


def predicted_size_bytes(checkpoint: Checkpoint, artifact: Artifact | EmbeddingArtifact) -> int | None:
    """What the weights of a checkpoint should take in the form of an artifact that was opened.

    The export is planned again from what the artifact says of itself.

    Returns:
        None for a damaged artifact, and when the checkpoint cannot be exported in this form: other rungs say why.
    """
    from converters.coreai.read.artifact import CoreAIArtifact
    from converters.coreml.read.artifact import CoreMLArtifact
    from converters.coreml.read.embedding_artifact import CoreMLEmbeddingArtifact
    from converters.onnx.read.artifact import OnnxArtifact
    from converters.onnx.read.embedding_artifact import OnnxEmbeddingArtifact
    from edkm_export.errors import EdkmExportError

    try:
        if isinstance(artifact, CoreAIArtifact):
            from converters.coreai.write.export_plan import plan_coreai

            told = artifact.description
            return plan_coreai(
                checkpoint,
                interface=told.interface,
                context=told.context,
                pad_3bit=artifact.pads_3bit,
                kv_cache=told.kv_cache,
            ).weights_size_bytes
        if isinstance(artifact, (CoreMLArtifact, CoreMLEmbeddingArtifact)):
            from converters.coreml.write.export_plan import plan_export

            found = artifact.description
            return plan_export(
                checkpoint,
                interface=found.interface,
                sequence_length=found.context,
                prefill=found.prefill or 2,
                chunks=len(found.packages),
            ).weights_size_bytes
        if isinstance(artifact, (OnnxArtifact, OnnxEmbeddingArtifact)):
            from converters.onnx.write.export_plan import plan_onnx

            graph = artifact.graph
            return plan_onnx(
                checkpoint,
                runtime=graph.profile,
                dtype=next(iter(graph.outputs.values())).dtype.name,
                opset=graph.graph.opsets[""],
                context=graph.description.context,
                standard_ops="DequantizeLinear" in graph.op_counts(),
                kv_cache=graph.description.kv_cache,
            ).weights_size_bytes
    except EdkmExportError:
        return None
    return None
