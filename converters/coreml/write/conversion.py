"""A traced PyTorch module becomes a Core ML program that holds our palettes bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.coreml.backend import load_coremltools, quiet
from converters.coreml.format import PARAMETERS_KEY
from converters.coreml.write.deployment_target import parse_target
from converters.coreml.write.state_cache import FLOAT32_MODULES
from converters.coreml.write.strided import lean_casts
from converters.coreml.write.targets import check_target
from converters.coreml.write.traceable import TraceableModule, make_traceable, named_arguments
from edkm_export.errors import ConversionError
from edkm_export.interrupts import check_interrupt
from edkm_export.palette import PalettizedTensor

__all__ = ["convert", "save_package"]

# Deduplication would merge two weights that happen to be equal, and one of the two LUTs would be missed; the others
# multiply the scales of a norm into a weight, which is then no longer what its LUT holds.
_CHANGING_WEIGHTS = {
    "common::const_deduplication",
    "common::fuse_conv_batchnorm",
    "common::fuse_conv_scale",
}


def convert(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    palettized: Mapping[str, PalettizedTensor],
    *,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    states: Sequence[Any] | None = None,
    target: str = "iOS18",
    metadata: Mapping[str, str] | None = None,
    prefix: str = "",
    stand_ins: bool = False,
    source: str = "model",
) -> Any:
    """Convert a module whose palettized weights hold their decoded values.

    Args:
        module: in eval mode; every palettized weight must be one of its parameters.
        example_inputs: arguments to trace it with: tensors, arrays or lists, in order, or a mapping by name.
        palettized: {parameter name: palette}.
        inputs: `coremltools.TensorType` of each argument; None: named as the arguments of `module.forward`, with
            the shapes of the examples, floating point as float16 and integers as int32.
        outputs: `coremltools.TensorType` of each result; None: named as the keys of a dictionary, named tuple or
            dataclass (nested ones "key_0"), by coremltools where the module gives a tensor or a tuple.
        states: `coremltools.StateType` of buffers that outlive a call; iOS18.
        target: one of `deployment_target.TARGETS`, in any usual spelling.
        metadata: further user metadata of the package.
        stand_ins: palettized weights hold `standins.stand_in` instead of their values.
        prefix: of the names in `palettized` in `module` ("decoder.").
        source: where the palettes are from, for messages.

    Returns:
        coremltools.models.MLModel, not compiled and not loaded; write it with `save_package`.

    Raises:
        ConversionError: the target cannot hold the palettes, coremltools cannot convert the module, or a palettized
            weight would have been left dense.
        BackendMissingError: coremltools is not installed.
    """
    target = parse_target(target)
    check_target(palettized, target, source)
    ct = load_coremltools()
    if states is None and (
        outputs is None or isinstance(example_inputs, Mapping)
    ):  # running it would change states
        module, arguments, names = make_traceable(module, example_inputs)
        prefix = TraceableModule.PREFIX + prefix if isinstance(module, TraceableModule) else prefix
        outputs = [ct.TensorType(name) for name in names] if outputs is None and names else outputs
    else:
        arguments = named_arguments(module, example_inputs)
    example_inputs = list(arguments.values())
    inputs = _input_types(arguments) if inputs is None else inputs
    from converters.coreml.write.lut_pass import PASS_NAME, Substitution, program_names, substituting

    dense = {
        name: parameter.data
        for name, parameter in module.named_parameters()
        if name.removeprefix(prefix) not in palettized
    }
    ours = {prefix + name: tensor for name, tensor in palettized.items()}
    plain = program_names(name.removeprefix(prefix) for name in (*ours, *dense))
    substitution = Substitution(
        ours,
        dense,
        {name: plain[name.removeprefix(prefix)] for name in (*ours, *dense)},
        {name: module.get_parameter(name).data for name in ours} if stand_ins else {},
    )
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(_CHANGING_WEIGHTS)
    pipeline.append_pass(PASS_NAME)
    with torch.no_grad(), quiet():
        traced = torch.jit.trace(module, tuple(example_inputs), check_trace=False)  # type: ignore[no-untyped-call]
        try:
            with substituting(substitution), lean_casts():
                model = ct.convert(
                    traced,
                    inputs=list(inputs),
                    outputs=None if outputs is None else list(outputs),
                    states=None if states is None else list(states),
                    minimum_deployment_target=getattr(ct.target, target),
                    compute_precision=ct.transform.FP16ComputePrecision(op_selector=_lowers),
                    pass_pipeline=pipeline,
                    skip_model_load=True,
                )
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            check_interrupt()  # coremltools may have made this error out of it
            if "FileWriter" in str(error):  # it writes the weights while it converts
                raise OSError(f"{source}: writing failed, is the disk full? ({error})") from error
            raise ConversionError(f"{source}: coremltools cannot convert this model: {error}") from error
    check_interrupt()  # coremltools swallows what is raised inside of it
    missed = sorted(set(substitution.palettized) - substitution.consumed)
    if missed:
        raise ConversionError(
            f"{source}: {len(missed)} palettized weights were not found in the converted program and would ship dense: "
            f"{', '.join(name.removeprefix(prefix) for name in missed[:5])}. Report this model."
        )
    parameters = {
        program: parameter.removeprefix(prefix) for program, parameter in substitution.names.items()
    }
    model.user_defined_metadata[PARAMETERS_KEY] = json.dumps(parameters, sort_keys=True)
    for key, value in (metadata or {}).items():
        model.user_defined_metadata[key] = value
    return model


def _lowers(operation: Any) -> bool:
    """False for what stays in float32: operations of modules that need it."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    return FLOAT32_MODULES.isdisjoint(operation.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_TYPE, ()))


def _input_types(arguments: Mapping[str, Tensor]) -> list[Any]:
    """`coremltools.TensorType` of example inputs by name."""
    ct = load_coremltools()
    import numpy as np

    return [
        ct.TensorType(name, tuple(example.shape), np.float16 if example.is_floating_point() else np.int32)
        for name, example in arguments.items()
    ]


def save_package(model: Any, path: str | Path) -> None:
    """Write a converted model as an .mlpackage folder. `path` must not exist.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        with quiet():
            model.save(str(path))
    except Exception as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{path}: writing failed, is the disk full? ({error})") from error
