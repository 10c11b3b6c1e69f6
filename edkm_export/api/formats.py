"""The formats that a language model can be exported to, and the folder that each of them leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from converters.coreai.write.export_plan import CoreAIPlan
    from converters.coreml.write.export_plan import ExportPlan
    from converters.onnx.write.export_plan import OnnxPlan
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.model_card import FormatCard
    from edkm_export.verify.report import Report

__all__ = ["CoreAIFormat", "CoreMLFormat", "Format", "OnnxFormat", "Plan", "write_folder"]

_Plan = TypeVar("_Plan", bound="Plan")


class Plan(Protocol):
    """What an export will make."""

    @property
    def interface(self) -> str:
        """How it is called."""

    @property
    def weights_size_bytes(self) -> int:
        """Predicted size of all weights on disk."""


class Format(Protocol[_Plan]):
    """What a format does in an export."""

    def plan(self, checkpoint: Checkpoint) -> _Plan:
        """Check that a checkpoint can be exported, before the long work."""

    def write(self, checkpoint: Checkpoint, plan: _Plan, folder: Path, name: str) -> Path:
        """Write everything but card and report into an empty folder; the artifact in it that is to be verified."""

    def card(self, checkpoint: Checkpoint, plan: _Plan, name: str) -> FormatCard:
        """What the model card says of the format."""


@dataclass(frozen=True)
class CoreMLFormat:
    """Core ML packages; the attributes are the options of `edkm-export coreml`."""

    interface: str | None = None
    target: str = "iOS18"
    sequence_length: int | None = None
    prefill: int = 64
    chunks: int | Literal["auto"] = "auto"
    kv_cache: str = "float"

    def plan(self, checkpoint: Checkpoint) -> ExportPlan:
        """See `Format`."""
        from converters.coreml.write.deployment_target import parse_target
        from converters.coreml.write.export_plan import plan_export

        return plan_export(
            checkpoint,
            interface=self.interface,
            target=parse_target(self.target),
            sequence_length=self.sequence_length,
            prefill=self.prefill,
            chunks=self.chunks,
            kv_cache=self.kv_cache,
        )

    def write(self, checkpoint: Checkpoint, plan: ExportPlan, folder: Path, name: str) -> Path:
        """See `Format`."""
        from converters.coreml.write.bundle import write_bundle

        return write_bundle(checkpoint, plan, folder, name)

    def card(self, checkpoint: Checkpoint, plan: ExportPlan, name: str) -> FormatCard:
        """See `Format`."""
        from converters.coreml.write.card import coreml_card
        from converters.coreml.write.lint import lint

        return coreml_card(checkpoint, plan, name, lint(checkpoint, plan))


@dataclass(frozen=True)
class OnnxFormat:
    """A folder with an ONNX decoder or embedding model; the attributes are the options of `edkm-export onnx`."""

    runtime: str = "exact"
    dtype: str = "float32"
    opset: int | None = None
    context_length: int | None = None
    standard_ops: bool = False
    interface: str | None = None
    kv_cache: str = "float"

    def plan(self, checkpoint: Checkpoint) -> OnnxPlan:
        """See `Format`."""
        from converters.onnx.write.export_plan import plan_onnx

        return plan_onnx(
            checkpoint,
            interface=self.interface,
            runtime=self.runtime,
            dtype=self.dtype,
            opset=self.opset,
            context=self.context_length,
            standard_ops=self.standard_ops,
            kv_cache=self.kv_cache,
        )

    def write(self, checkpoint: Checkpoint, plan: OnnxPlan, folder: Path, name: str) -> Path:
        """See `Format`."""
        from converters.onnx.write.bundle import write_bundle

        write_bundle(checkpoint, plan, folder)
        return folder

    def card(self, checkpoint: Checkpoint, plan: OnnxPlan, name: str) -> FormatCard:
        """See `Format`."""
        from converters.onnx.write.card import onnx_card

        return onnx_card(checkpoint, plan)


@dataclass(frozen=True)
class CoreAIFormat:
    """A Core AI model and its folder; the attributes are the options of `edkm-export coreai`."""

    interface: str = "dynamic"
    context_length: int | None = None
    pad_3bit: bool = False
    kv_cache: str = "float"

    def plan(self, checkpoint: Checkpoint) -> CoreAIPlan:
        """See `Format`."""
        from converters.coreai.write.export_plan import plan_coreai

        return plan_coreai(
            checkpoint,
            interface=self.interface,
            context=self.context_length,
            pad_3bit=self.pad_3bit,
            kv_cache=self.kv_cache,
        )

    def write(self, checkpoint: Checkpoint, plan: CoreAIPlan, folder: Path, name: str) -> Path:
        """See `Format`."""
        from converters.coreai.write.bundle import write_bundle

        return write_bundle(checkpoint, plan, folder, name)

    def card(self, checkpoint: Checkpoint, plan: CoreAIPlan, name: str) -> FormatCard:
        """See `Format`."""
        from converters.coreai.write.card import coreai_card
        from converters.coreai.write.lint import lint

        return coreai_card(checkpoint, plan, name, lint(checkpoint, plan))


def write_folder(
    form: Format[Any],
    checkpoint: Checkpoint,
    plan: Plan,
    folder: str | Path,
    name: str,
    *,
    overwrite: bool = False,
    judge: Callable[[Path], Report] | None = None,
) -> Report | None:
    """Export into a folder that appears whole or not at all, with the model card and, if it is verified, the report.

    Args:
        form: the format.
        checkpoint: what to export.
        plan: of the format.
        folder: to make.
        name: of the model.
        overwrite: replace a folder that was made before.
        judge: verifies the artifact, which lies at the path that it is given; None: it is not verified.

    Returns:
        The report of `judge`.

    Raises:
        OutputExistsError, DiskFullError: the folder cannot be made.
        ConversionError: see the converters.
    """
    from edkm_export.activity import activity
    from edkm_export.api.cards import verification_words
    from edkm_export.atomic import atomic_folder
    from edkm_export.model_card import FILE, model_card
    from edkm_export.verify.write import write_report

    folder, report = Path(folder), None
    with atomic_folder(folder, overwrite=overwrite, needed_bytes=plan.weights_size_bytes) as temporary:
        with activity(f"converting {len(checkpoint.palettized)} palettized weights"):
            artifact = form.write(checkpoint, plan, temporary, name)
        if judge is not None:
            report = judge(artifact)
            if artifact == temporary:  # as it will be called
                report = report.model_copy(update={"artifact": folder.absolute().name})
            write_report(report, temporary)
        card = model_card(checkpoint, name, form.card(checkpoint, plan, name), *verification_words(report))
        (temporary / FILE).write_text(card, encoding="utf-8")
    return report
