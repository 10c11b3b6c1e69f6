"""Whatever `edkm-export` exported, of any format: the one place that tells formats apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.artifact.protocol import Artifact, Session
    from edkm_export.checkpoint import Checkpoint

__all__ = [
    "checkpoint_and_artifact",
    "find_artifact",
    "is_artifact",
    "open_artifact",
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
    from converters.coreml.read.folder import find_package
    from converters.onnx.read.folder import is_onnx

    return Path(path) if is_onnx(path) else find_package(path)


def checkpoint_and_artifact(paths: tuple[Path, ...]) -> tuple[Path, Path]:
    """The model.pt and the exported model of a command line that may leave the first one out.

    Args:
        paths: one or two, in any order.

    Returns:
        The model.pt, which the record in the exported folder agrees with if there is one, and the exported model.

    Raises:
        InputError: there are others than these, the model.pt is found nowhere, or it is not the one that was exported.
        PackageError: the exported model is missing.
    """
    from edkm_export.checkpoint_record import CheckpointRecord
    from edkm_export.cli.parameter_types import CHECKPOINT, PACKAGE
    from edkm_export.command_line import command_line
    from edkm_export.errors import CheckpointError, InputError
    from edkm_export.unfinished import unfinished_run

    for path in paths:
        if unfinished := unfinished_run(path):
            raise CheckpointError(f"{path}: {unfinished}")
    if len(paths) == 1:
        (exported,) = paths
        if exported.is_file() and not is_artifact(exported):
            raise InputError(
                f"{exported}: is no exported model; name it too: {command_line('verify', exported, 'OUT')}"
            )
        PACKAGE.convert(exported, None, None)
        record = CheckpointRecord.read(exported)
        if record is None:
            raise InputError(
                f"{exported}: does not say which model.pt it was exported from; name it: "
                f"{command_line('verify', 'MODEL.PT', exported)}"
            )
        return record.find(exported), exported
    if len(paths) > 2:
        raise InputError(f"expected MODEL.PT and OUT, got {len(paths)} paths.")
    checkpoint, exported = paths
    if is_artifact(checkpoint) and exported.is_file() and not is_artifact(exported):
        checkpoint, exported = exported, checkpoint
    CHECKPOINT.convert(checkpoint, None, None)
    PACKAGE.convert(exported, None, None)
    if (record := CheckpointRecord.read(exported)) is not None:
        record.require(checkpoint, exported)
    return checkpoint, exported


def open_artifact(path: str | Path) -> Artifact:
    """Open what `find_artifact` found, for the verifier."""
    from converters.onnx.read.folder import is_onnx

    if is_onnx(path):
        from converters.onnx.read.artifact import open_artifact as open_onnx

        return open_onnx(path)
    from converters.coreml.read.artifact import open_artifact as open_coreml

    return open_coreml(path)


def open_session(path: str | Path) -> tuple[Session, Path]:
    """A session for an exported model, and the folder that holds its tokenizer.

    Raises:
        PackageError: it is damaged, or has an unknown interface.
    """
    from converters.onnx.read.folder import OnnxFolder, is_onnx

    if is_onnx(path):
        from converters.onnx.read.session import OnnxSession

        return OnnxSession.open(path), OnnxFolder.find(path).root
    from converters.coreml.read.folder import find_package
    from converters.coreml.read.session import CoreMLSession

    package = find_package(path)
    return CoreMLSession.open(package), package.parent


def predicted_size_bytes(checkpoint: Checkpoint, artifact: Artifact) -> int | None:
    """What the weights of a checkpoint should take in the form of an artifact that was opened.

    The export is planned again from what the artifact says of itself.

    Returns:
        None for a damaged artifact, and when the checkpoint cannot be exported in this form: other rungs say why.
    """
    from converters.coreml.read.artifact import CoreMLArtifact
    from converters.onnx.read.artifact import OnnxArtifact
    from edkm_export.errors import EdkmExportError

    try:
        if isinstance(artifact, CoreMLArtifact):
            from converters.coreml.write.export_plan import plan_export

            found = artifact.description
            return plan_export(
                checkpoint,
                interface=found.interface,
                sequence_length=found.context,
                prefill=found.prefill or 2,
                chunks=len(found.packages),
            ).weights_size_bytes
        if isinstance(artifact, OnnxArtifact):
            from converters.onnx.write.export_plan import plan_onnx

            graph = artifact.graph
            return plan_onnx(
                checkpoint,
                runtime=graph.profile,
                dtype=graph.outputs["logits"].dtype.name,
                opset=graph.graph.opsets[""],
                context=graph.description.context,
                standard_ops="DequantizeLinear" in graph.op_counts(),
            ).weights_size_bytes
    except EdkmExportError:
        return None
    return None
