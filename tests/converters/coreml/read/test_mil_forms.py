"""Programs of other tools: optional inputs, nested blocks, old blob files, constants that are not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.proto import Model_pb2

from converters.coreml import load_package
from converters.coreml.read.program import Operation
from edkm_export.errors import InputError, PackageError, UnsupportedOpError
from tests.helpers.mil_build import save, save_program
from tests.helpers.mil_draws import Output, any_shape, operation, run


def test_optional_inputs_take_their_default(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    example = (torch.zeros(2, 3), torch.zeros(2, 3))
    model = ct.convert(
        torch.jit.trace(Sum(), example),
        inputs=[
            ct.TensorType("x", (2, 3)),
            ct.TensorType("y", (2, 3), default_value=np.full((2, 3), 2.5, np.float32)),
        ],
        outputs=[ct.TensorType("sum")],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    package = load_package(save(model, tmp_path / "sum.mlpackage"))
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(package.run({"x": x})["sum"], x + 2.5)
    assert torch.equal(package.run({"x": x, "y": x})["sum"], x + x)
    with pytest.raises(InputError, match="input 'x' of function main is missing"):
        package.run({"y": x})


class Observed:
    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __call__(self, op: Operation, made: Mapping[str, torch.Tensor]) -> None:
        self._seen.append(op.type)


def test_a_loop_in_a_branch(tmp_path: Path) -> None:
    """Both branches and both blocks of the loop use names of their own for what is called the same."""

    def body(x, n):
        def loop():
            def more(i, total):
                return mb.less(x=i, y=count)

            def step(i, total):
                return mb.add(x=i, y=1), mb.mul(x=total, y=np.float32(2))

            count = mb.squeeze(x=n)
            return mb.while_loop(_cond=more, _body=step, loop_vars=(0, x))[1]

        positive = mb.greater(x=mb.squeeze(x=n), y=0)
        return mb.cond(pred=positive, _true_fn=loop, _false_fn=lambda: mb.add(x=x, y=np.float32(1)), name="y")

    inputs = {"x": np.ones(3, np.float32), "n": np.zeros(1, np.int32)}
    package = load_package(save_program(tmp_path / "loop.mlpackage", inputs, body))
    x = torch.tensor([1.0, 2.0, 3.0])
    for n, expected in ((3, x * 8), (1, x * 2), (0, x + 1), (-2, x + 1)):
        seen: list[str] = []
        found = package.run({"x": x, "n": torch.tensor([n])}, observer=Observed(seen))
        assert torch.equal(found["y"], expected)
        assert seen.count("mul") == max(n, 0)
    assert package.op_counts()["while_loop"] == 1


def test_whole_bytes_have_no_padding_bits(tmp_path: Path) -> None:
    """Writers before coremltools 8 left anything in the field."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)

    def body(x):
        return mb.linear(x=x, weight=mb.const(val=weight, name="w"), name="y")

    path = save_program(tmp_path / "old.mlpackage", {"x": np.zeros((1, 4), np.float32)}, body)
    blob = path / "Data/com.apple.CoreML/weights/weight.bin"
    data = bytearray(blob.read_bytes())
    data[64 + 24 : 64 + 32] = b"\x07" * 8
    blob.write_bytes(bytes(data))
    assert torch.equal(
        load_package(path).run({"x": torch.ones(1, 4)})["y"], torch.ones(1, 4) @ torch.from_numpy(weight).T
    )


def rename_op(path: Path, old: str, new: str) -> None:
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                op.type = new if op.type == old else op.type
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("new", ["constexpr_of_tomorrow", "op_of_tomorrow"])
def test_what_is_not_known_is_told_once_before_the_run(new: str, tmp_path: Path) -> None:
    def body(x):
        data = np.ones((3, 4), np.int8)
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=np.ones((1, 1), np.float32), name="w")
        return mb.relu(x=mb.add(x=mb.sin(x=x, name="first"), y=weight), name="y")

    path = save_program(tmp_path / "new.mlpackage", {"x": np.zeros((3, 4), np.float32)}, body)
    rename_op(path, "constexpr_blockwise_shift_scale" if new.startswith("constexpr") else "relu", new)
    package, seen = load_package(path), []
    with pytest.raises(UnsupportedOpError) as raised:
        package.run({"x": torch.zeros(3, 4)}, observer=lambda op, made: seen.append(op.type))
    message = str(raised.value)
    assert not seen and message.count(str(path)) == message.count("function main") == 1
    assert f"{new} " in message and "does not support this type of op" in message


def test_long_ranges_of_floats() -> None:
    made = operation(
        "range_1d", {"start": "%a", "end": "%b", "step": "%c"}, [Output("y", any_shape("float32"))]
    )
    for end, step, count in ((0.3, 0.1, 3), (9.0, 1e-6, 9_000_000)):
        given = {"a": np.float32(0), "b": np.float32(end), "c": np.float32(step)}
        (y,) = run([made], given, ["y"])
        assert y.numel() == count
        assert abs(float(y[-1]) - (count - 1) * step) < 1e-6 * max(end, 1)


def test_blocks_that_an_op_does_not_have() -> None:
    lonely = operation("cond", {"pred": "%p"}, [Output("y", any_shape("float32"))])
    with pytest.raises(PackageError, match="holds 0 nested blocks, expected 2"):
        run([lonely], {"p": np.array(True)}, ["y"])
