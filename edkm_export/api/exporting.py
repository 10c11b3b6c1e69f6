"""`edkm_export.export`: a checkpoint as a Core ML package, an ONNX folder or a Core AI model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from edkm_export.api.artifacts import open_session
from edkm_export.api.formats import CoreAIFormat, CoreMLFormat, Format, OnnxFormat, Plan, write_folder
from edkm_export.atomic import atomic_folder, check_output
from edkm_export.checkpoint import Checkpoint, load
from edkm_export.decoder.build import FAMILIES
from edkm_export.disk_space import require_space
from edkm_export.errors import InputError
from edkm_export.quantities import short_size
from edkm_export.reference.decoded_module import decoded_module

if TYPE_CHECKING:
    from edkm_export.artifact.protocol import Session
    from edkm_export.verify.report import Report

__all__ = ["Exported", "export"]

_PACKAGE = ".mlpackage"
_FORMATS: dict[str, type[CoreMLFormat] | type[OnnxFormat] | type[CoreAIFormat]] = {
    "coreml": CoreMLFormat,
    "onnx": OnnxFormat,
    "coreai": CoreAIFormat,
}
_NAMES = {"coreml": "Core ML", "onnx": "ONNX", "coreai": "Core AI"}


@dataclass(frozen=True)
class Exported:
    """What an export left on disk.

    Attributes:
        path: the folder, or the .mlpackage of a module that is no language model.
        format: "coreml", "onnx" or "coreai".
        kind: interface or runtime profile, for people.
        weights_size_bytes: predicted size of its weights; None: of a module that is no language model.
        checkpoint: what it was made of.
    """

    path: Path
    format: str
    kind: str
    weights_size_bytes: int | None
    checkpoint: Checkpoint = field(repr=False)

    def __repr__(self) -> str:
        """One line: path, format, size on disk."""
        return f"Exported({self.path}, {_NAMES[self.format]} {self.kind}, {short_size(self.size_bytes)})"

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def session(self) -> Session:
        """Open it for generation, in our interpreter or in onnxruntime.

        Raises:
            PackageError: it has no interface of a language model.
        """
        return open_session(self.path)[0]

    def verify(self, **options: Any) -> Report:
        """Verify it against its checkpoint; the options are those of `edkm_export.verify`."""
        from edkm_export.api.verifying import verify

        return verify(self, **options)


def export(
    checkpoint: Checkpoint | str | Path,
    out: str | Path,
    format: Literal["coreml", "onnx", "coreai"] = "coreml",
    *,
    module: nn.Module | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    interface: str | None = None,
    target: str | None = None,
    sequence_length: int | None = None,
    prefill: int | None = None,
    chunks: int | Literal["auto"] | None = None,
    runtime: str | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    context_length: int | None = None,
    standard_ops: bool | None = None,
    pad_3bit: bool | None = None,
    kv_cache: Literal["float", "int8"] | None = None,
) -> Exported:
    """Write a checkpoint for Core ML, ONNX or Core AI, bit for bit. It is not verified: see `verify`.

    Args:
        checkpoint: from `palettize` or `load`, or the path of a model.pt.
        out: folder to make; of a module that is no language model the package, NAME.mlpackage.
        format: "coreml", "onnx" or "coreai"; a module that is no language model takes "coreml".
        module: of the checkpoint, when it is no language model: what is traced. Its own weights are not used.
        example_inputs: of the module: tensors, arrays or lists in the order of its arguments, or a mapping by name.
            Their shapes are those of the package.
        name: of the packages; default: that of the model.pt, or "model".
        overwrite: replace an existing output.
        interface: Core ML: "swift-transformers" (default), "neural-engine" or "logits". Core AI: "dynamic" (default) or
            "neural-engine". ONNX: "decoder" (default). Of an embedding model Core ML and ONNX have "embedding" alone,
            their default then.
        target: Core ML: "iOS18" (default), "iOS17" or "iOS16".
        sequence_length: Core ML: positions that it can hold.
        prefill: Core ML: tokens of a prefill call, "neural-engine" only; default 64.
        chunks: Core ML: packages to cut the layers into, "neural-engine" only; default "auto".
        runtime: ONNX: "exact" (default), "low-memory" or "fast".
        dtype: ONNX: of activations, "float32" (default) or "float16".
        opset: ONNX: version of the standard operators.
        context_length: ONNX, Core AI: positions of the longest text.
        standard_ops: ONNX: with "fast", no operators of onnxruntime's own.
        pad_3bit: Core AI: hold 3-bit indices in 4 bits.
        kv_cache: how keys and values are held: "float" (default), or "int8" in ONNX and in Core AI's "dynamic".

    Returns:
        Where it lies; `verify` takes it.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is false.
        CheckpointError, ConversionError: the checkpoint cannot be read, or not be exported so.
        InputError: an option of the other format, or a module without example inputs.
        BackendMissingError: coremltools or onnx is not installed.

    Example:
        >>> exported = edkm_export.export(checkpoint, "model-onnx", format="onnx", runtime="exact")
    """
    if format not in _FORMATS:
        raise InputError(f"format: is {format!r}, expected {' or '.join(map(repr, _FORMATS))}.")
    given: dict[str, Any] = {
        "interface": interface,
        "target": target,
        "sequence_length": sequence_length,
        "prefill": prefill,
        "chunks": chunks,
        "runtime": runtime,
        "dtype": dtype,
        "opset": opset,
        "context_length": context_length,
        "standard_ops": standard_ops,
        "pad_3bit": pad_3bit,
        "kv_cache": kv_cache,
    }
    chosen = {option: value for option, value in given.items() if value is not None}
    taken = {field.name for field in fields(_FORMATS[format])}
    if wrong := [option for option in chosen if option not in taken]:
        others = " or ".join(
            repr(name) for name, form in _FORMATS.items() if wrong[0] in form.__annotations__
        )
        raise InputError(f"{wrong[0]}: is an option of format {others}, and the format is {format!r}.")
    if not isinstance(checkpoint, (Checkpoint, str, Path)):
        raise InputError(
            f"checkpoint: is {type(checkpoint).__name__}, expected a Checkpoint or the path of a model.pt; make one "
            "with edkm_export.palettize."
        )
    path = Path(out)
    if module is None and example_inputs is not None:
        raise InputError("example_inputs: belong to a module; give module= too.")
    held = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
    if module is not None:
        return _export_module(held, path, format, module, example_inputs, chosen, overwrite=overwrite)
    if held.config.get("model_type") not in FAMILIES and not held.tokenizer and held.embedding is None:
        kind = held.config.get("model_type") or "no language model"
        raise InputError(
            f"{held.path or 'checkpoint'}: is {kind}; give the module that it was made of (module=) and "
            "example_inputs=."
        )
    check_output(path, overwrite=overwrite, folder=True)
    form: Format[Any] = _FORMATS[format](**chosen)
    plan = form.plan(held)
    require_space(path, plan.weights_size_bytes)
    stem = name or (held.path.stem if held.path is not None else "model")
    write_folder(form, held, plan, path, stem, overwrite=overwrite)
    return Exported(path, format, _kind(form, plan), plan.weights_size_bytes, held)


def _export_module(
    checkpoint: Checkpoint,
    path: Path,
    format: str,
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    options: dict[str, Any],
    *,
    overwrite: bool,
) -> Exported:
    """A package of any module."""
    if format != "coreml":
        raise InputError("format: modules that are no language models are exported to 'coreml' only.")
    if not isinstance(module, nn.Module):
        raise InputError(f"module: is {type(module).__name__}, expected a torch.nn.Module.")
    if example_inputs is None:
        raise InputError(
            "module: is traced with example_inputs=; give a tuple of tensors, or a dict by name."
        )
    if wrong := options.keys() - {"target"}:
        raise InputError(f"{min(wrong)}: is an option of language models.")
    if path.suffix != _PACKAGE:
        raise InputError(f"{path}: name the package of a module NAME{_PACKAGE}.")
    from converters.coreml import convert, save_package
    from converters.coreml.write.deployment_target import parse_target

    check_output(path, overwrite=overwrite, folder=True, is_ours=_is_package)
    if not isinstance(example_inputs, (Mapping, tuple, list)):
        example_inputs = (example_inputs,)
    model = convert(
        decoded_module(checkpoint, module),
        example_inputs,
        checkpoint.palettized,
        target=parse_target(options.get("target") or CoreMLFormat.target),
        source=type(module).__name__,
    )
    with atomic_folder(path, overwrite=overwrite, is_ours=_is_package) as temporary:
        save_package(model, temporary)
    return Exported(path, format, f"of a {type(module).__name__}", None, checkpoint)


def _is_package(folder: Path) -> bool:
    return (folder / "Manifest.json").is_file()


def _kind(form: Format[Any], plan: Plan) -> str:
    """Who runs what a format writes, for people."""
    if isinstance(form, OnnxFormat) and plan.interface != "embedding":
        return f"for {form.runtime}"
    if isinstance(form, CoreAIFormat):
        return f"for the {form.interface} engine"
    return f"for {plan.interface}"
