"""Each op of the interpreter against torch, and against coremltools' own value inference where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from converters.coreml import Package, load_package
from converters.coreml.read.ops import definition_of
from converters.coreml.read.program import Operation
from tests.helpers.mil_build import save_program
from tests.helpers.mil_cases import Case
from tests.helpers.mil_cases_arithmetic import CONVOLUTION, NORMALIZATION, PRODUCT, REDUCTION
from tests.helpers.mil_cases_elementwise import ACTIVATION, ARITHMETIC, COMPARISON
from tests.helpers.mil_cases_structure import CREATION, GATHERING, JOINING, RESHAPING, SCATTERING, SLICING

FAMILIES: dict[str, list[Case]] = {
    "arithmetic": ARITHMETIC,
    "comparison": COMPARISON,
    "activation": ACTIVATION,
    "reduction": REDUCTION,
    "product": PRODUCT,
    "normalization": NORMALIZATION,
    "convolution": CONVOLUTION,
    "reshaping": RESHAPING,
    "joining": JOINING,
    "slicing": SLICING,
    "gathering": GATHERING,
    "scattering": SCATTERING,
    "creation": CREATION,
}
CASES = [pytest.param(family, case, id=case.name) for family, cases in FAMILIES.items() for case in cases]
DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}

# Same arithmetic in float32, another order of summation and another libm: a few units of the last place (6e-8).
FLOAT32_TOLERANCE = 2e-6
# One rounding to float16: half a unit of the last place is 2**-11 of the value; a float32 result next to the
# middle of two float16 values may go to the other one.
ROUNDED_TOLERANCE = 2**-10


def _cast(value: Any, dtype: np.dtype[Any]) -> Any:
    """Floating point in the dtype under test."""
    if isinstance(value, float):
        return dtype.type(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(dtype)
    return value.astype(np.int32) if isinstance(value, np.ndarray) and value.dtype.kind == "i" else value


def _build(case: Case, arguments: dict[str, Any], dtype: np.dtype[Any], name: str) -> list[Any]:
    params = {key: _cast(value, dtype) for key, value in case.params.items()}
    given = dict(arguments)
    if case.tuple_input is not None:
        given = {case.tuple_input: tuple(given.values())}
    made = getattr(mb, case.op)(**given, **params, name=name)
    return list(made) if isinstance(made, (list, tuple)) else [made]


def _program(cases: list[Case], dtype: np.dtype[Any]):
    def body(**inputs: Any) -> list[Any]:
        outputs = []
        for case in cases:
            given = {}
            for key in case.inputs:
                value = inputs[f"{case.name}__{key}"]
                value = mb.squeeze(x=value) if key in case.scalars else value
                given[key] = mb.cast(x=value, dtype="bool") if key in case.boolean else value
            for index, result in enumerate(_build(case, given, dtype, f"op_{case.name}")):
                kind = types.builtin_to_string(result.dtype)
                output = kind if kind in ("fp16", "fp32") else "int32"
                outputs.append(mb.cast(x=result, dtype=output, name=f"{case.name}__{index}"))
        return outputs

    return body


class Runs:
    """Outputs by family, target, dtype and precision; one package a family, for conversion takes the time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.packages: dict[tuple[str, str, str], Package] = {}
        self._outputs: dict[tuple[str, str, str, str], dict[str, torch.Tensor]] = {}

    def feed(self, family: str, target: str, name: str) -> dict[str, torch.Tensor]:
        return {
            f"{case.name}__{argument}": torch.tensor(_cast(array, DTYPES[name]))
            for case in FAMILIES[family]
            if case.target == target
            for argument, array in case.inputs.items()
        }

    def outputs(self, family: str, case: Case, name: str, precision: str) -> list[torch.Tensor]:
        key = (family, case.target, name, precision)
        if key not in self._outputs:
            feed = self.feed(family, case.target, name)
            if key[:3] not in self.packages:
                cases = [other for other in FAMILIES[family] if other.target == case.target]
                path = self._folder / f"{family}_{case.target}_{name}.mlpackage"
                arrays = {argument: tensor.numpy() for argument, tensor in feed.items()}
                save_program(path, arrays, _program(cases, DTYPES[name]), target=case.target)
                self.packages[key[:3]] = load_package(path)
            self._outputs[key] = self.packages[key[:3]].run(feed, precision=precision)
        found = self._outputs[key]
        return [found[output] for output in sorted(found) if output.rsplit("__", 1)[0] == case.name]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ops"))


def _expected(case: Case, name: str) -> list[torch.Tensor]:
    dtype = DTYPES[name]
    given = {
        key: torch.tensor(_cast(array, dtype)).to(torch.float32 if array.dtype.kind == "f" else torch.int32)
        for key, array in case.inputs.items()
    }
    result = case.expected(**given)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.shape == wanted.shape
        if not wanted.is_floating_point():
            assert torch.equal(actual.int(), wanted.int())
            continue
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_float32_program(family: str, case: Case, runs: Runs) -> None:
    _assert_close(runs.outputs(family, case, "fp32", "float32"), _expected(case, "fp32"), FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_float16_program_in_float32(family: str, case: Case, runs: Runs) -> None:
    # constants of the program are float16: the reference, which has them in float32, is off by their rounding
    inexact = any(_inexact(value) for value in case.params.values())
    tolerance = 2e-3 if inexact else FLOAT32_TOLERANCE
    _assert_close(runs.outputs(family, case, "fp16", "float32"), _expected(case, "fp16"), tolerance)


def _inexact(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind == "f" and not np.array_equal(array.astype(np.float16).astype(np.float64), array)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_rounding_is_one_rounding(family: str, case: Case, runs: Runs) -> None:
    rounded = runs.outputs(family, case, "fp16", "rounded")
    exact = runs.outputs(family, case, "fp16", "float32")
    wanted = [value.half().float() if value.is_floating_point() else value for value in exact]
    _assert_close(rounded, wanted, ROUNDED_TOLERANCE)
    for value in rounded:
        if value.is_floating_point():
            assert torch.equal(value, value.half().float())


@pytest.mark.parametrize(("family", "case"), CASES)
def test_native_float16(family: str, case: Case, runs: Runs) -> None:
    found = runs.outputs(family, case, "fp16", "float16")
    _assert_close(found, runs.outputs(family, case, "fp16", "float32"), case.half_tolerance)


INFERRED = [
    pytest.param(family, case, id=case.name)
    for family, cases in FAMILIES.items()
    for case in cases
    if case.inferred
]


@pytest.mark.parametrize(("family", "case"), INFERRED)
def test_value_inference_of_coremltools(family: str, case: Case, runs: Runs) -> None:
    arguments = {
        key: array.astype(bool) if key in case.boolean else array[0] if key in case.scalars else array.copy()
        for key, array in case.inputs.items()
    }
    with Function({}, opset_version=getattr(ct.target, case.target)):
        inferred = [made.val for made in _build(case, arguments, DTYPES["fp32"], "inferred")]
    assert all(value is not None for value in inferred), "coremltools infers nothing: mark the case"
    wanted = [torch.tensor(np.ascontiguousarray(value)) for value in inferred]
    _assert_close(runs.outputs(family, case, "fp32", "float32"), wanted, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_moving_ops_share_memory(family: str, runs: Runs) -> None:
    """The interpreter rounds the results of all other ops in place."""
    case = FAMILIES[family][0]
    runs.outputs(family, case, "fp32", "float32")
    package = runs.packages[family, case.target, "fp32"]
    feed = runs.feed(family, case.target, "fp32")
    alive: dict[str, torch.Tensor] = {}  # keeps all memory, so that an address means one tensor
    seen = set()

    def observe(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        alive.update(outputs)
        if definition_of(operation).moves:
            return
        names = [
            name for bindings in operation.arguments.values() for name in bindings if isinstance(name, str)
        ]
        given = {
            alive[name].untyped_storage().data_ptr()
            for name in names
            if name in alive and alive[name].numel()
        }
        assert not any(value.untyped_storage().data_ptr() in given for value in outputs.values()), (
            operation.label
        )
        seen.add(operation.type)

    package.run(feed, observer=observe)
    assert seen


@pytest.mark.parametrize("family", FAMILIES)
def test_each_result_has_its_declared_type(family: str, runs: Runs) -> None:
    """Inside the program too: float16 in native precision, representable in float16 when rounded."""
    case = FAMILIES[family][0]
    runs.outputs(family, case, "fp16", "float32")
    package, feed = runs.packages[family, case.target, "fp16"], runs.feed(family, case.target, "fp16")
    unrounded: set[str] = set()
    counts = {"half": 0, "rounded": 0}

    def native(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        for output in operation.outputs:
            if output.type.dtype.name == "float16":
                assert outputs[output.name].dtype == torch.float16, operation.label
                counts["half"] += 1

    def rounded(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        for output in operation.outputs:
            if output.type.dtype.name == "float16":
                value = outputs[output.name]
                assert torch.equal(value, value.half().float()), operation.label
                counts["rounded"] += 1

    def exact(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        for name, value in outputs.items():
            if value.is_floating_point() and not torch.equal(value, value.half().float()):
                unrounded.add(name)

    package.run(feed, precision="float16", observer=native)
    package.run(feed, precision="rounded", observer=rounded)
    package.run(feed, precision="float32", observer=exact)
    if family != "comparison":
        assert counts["half"] == counts["rounded"] > 0
    moving = {"comparison", "reshaping", "joining", "slicing", "gathering", "creation"}
    assert bool(unrounded) == (family not in moving)
