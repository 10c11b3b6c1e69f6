"""Damaged and hostile packages: an error of ours that says what is wrong, and where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.proto import Model_pb2

from converters.coreml import load_package
from edkm_export.errors import InputError, PackageError, UnsupportedOpError
from tests.helpers.mil_build import lookup, save_program

_rng = np.random.default_rng(3)
_INDICES = _rng.integers(0, 8, (8, 12)).astype(np.uint8)
_LUT = _rng.standard_normal((2, 1, 8, 1)).astype(np.float16)
_WEIGHT = _rng.standard_normal((8, 8)).astype(np.float16)
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [2, 12] -> two linears -> softmax; one palette and one dense weight."""

    def body(x: Any) -> Any:
        hidden = mb.linear(x=x, weight=lookup("palette", None, indices=_INDICES, lut=_LUT), name="first")
        return mb.softmax(
            x=mb.linear(x=hidden, weight=mb.const(val=_WEIGHT, name="dense"), name="second"), name="y"
        )

    path = tmp_path_factory.mktemp("hostile") / "model.mlpackage"
    return save_program(path, {"x": np.zeros((2, 12), np.float16)}, body)


@pytest.fixture
def package(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model.mlpackage"
    shutil.copytree(pristine, copy)
    return copy


def use(path: Path) -> None:
    """Everything that a caller can do with a package."""
    loaded = load_package(path)
    _ = loaded.size_bytes, loaded.weights_size_bytes, loaded.op_counts()
    loaded.palettized()
    loaded.dense()
    loaded.run({"x": torch.zeros(2, 12)})


def edit(path: Path, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Change the model; `change` gets the function and its operations by the name of the first output."""
    model = Model_pb2.Model()
    model.ParseFromString((path / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    change(function, {op.outputs[0].name: op for op in operations if op.outputs})
    (path / MODEL).write_bytes(model.SerializeToString())


def refuse(path: Path, *parts: str, kind: type[Exception] = PackageError) -> None:
    with pytest.raises(kind) as caught:
        use(path)
    for part in parts:
        assert part in str(caught.value)


def test_pristine_package_is_fine(package: Path) -> None:
    use(package)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("Manifest.json", "not an .mlpackage")),
        ("{", ("Manifest.json", "not JSON")),
        ("[]", ("Manifest.json", "does not name its root model")),
        ("{}", ("Manifest.json", "rootModelIdentifier")),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {}}', ("'a'",)),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 3}}}', ("is 3, expected a string",)),
        (
            '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "no.mlmodel"}}}',
            ("no.mlmodel", "does not exist"),
        ),
        (
            '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../x"}}}',
            ("'../x'", "leave the package"),
        ),
        (
            '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "/etc/passwd"}}}',
            ("'/etc/passwd'", "leave"),
        ),
        ("[" * 100_000, ("not JSON",)),
    ],
    ids=range(10),
)
def test_manifest(text: str | None, parts: tuple[str, ...], package: Path) -> None:
    manifest = package / "Manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    refuse(package, *parts)


def test_manifest_decides_which_model_is_read(package: Path) -> None:
    (package / MODEL).rename(package / MODEL.with_name("renamed.mlmodel"))
    manifest = json.loads((package / "Manifest.json").read_text())
    item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    item["path"] = item["path"].replace("model.mlmodel", "renamed.mlmodel")
    (package / "Manifest.json").write_text(json.dumps(manifest))
    use(package)


def test_not_a_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "none.mlpackage", "none.mlpackage", "no such package")
    (tmp_path / "file.mlpackage").write_bytes(b"")
    refuse(tmp_path / "file.mlpackage", "is a file")


@pytest.mark.parametrize("data", [b"garbage", b"\xff" * 64, b"\x0a" * 5000], ids=["text", "ones", "nested"])
def test_garbage_model(data: bytes, package: Path) -> None:
    (package / MODEL).write_bytes(data)
    refuse(package, "model.mlmodel", "not a Core ML model")


def test_empty_model(package: Path) -> None:
    (package / MODEL).write_bytes(b"")
    refuse(package, "model.mlmodel", "no model")


def test_every_tenth_truncation_of_the_model(package: Path) -> None:
    whole = (package / MODEL).read_bytes()
    for length in range(0, len(whole) - 1, max(len(whole) // 10, 1)):
        (package / MODEL).write_bytes(whole[:length])
        refuse(package, "model")


def test_another_kind_of_model(package: Path) -> None:
    model = Model_pb2.Model()
    model.neuralNetwork.layers.add().name = "x"
    (package / MODEL).write_bytes(model.SerializeToString())
    refuse(package, "model.mlmodel", "neuralNetwork")


def test_missing_weights(package: Path) -> None:
    (package / WEIGHTS).unlink()
    refuse(package, "weight.bin", "does not exist")


def test_truncated_weights(package: Path) -> None:
    whole = (package / WEIGHTS).read_bytes()
    for length in (0, 63, 64, 127, 128, 200, len(whole) - 1):
        (package / WEIGHTS).write_bytes(whole[:length])
        refuse(package, "weight.bin")


def test_trailing_bytes_in_the_weights_do_no_harm(package: Path) -> None:
    with (package / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 1000)
    use(package)


@pytest.mark.parametrize(
    "name",
    [
        "@model_path/../../../secret.bin",
        "@model_path//etc/passwd",
        "/etc/passwd",
        "weights/weight.bin",
        "@model_path/weights/../../x",
        "@model_path/",
        "@model_path/weights\\weight.bin",
        "@model_path/weights",
        "",
    ],
)
def test_blob_file_name(name: str, package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["dense"].attributes["val"].blobFileValue.fileName = name

    edit(package, change)
    refuse(package, "model.mlmodel")


def test_symbolic_link_out_of_the_package(package: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    (package / WEIGHTS).rename(secret)
    (package / WEIGHTS).symlink_to(secret)
    refuse(package, "leads outside the package", str(secret))


def test_symbolic_link_loop(package: Path) -> None:
    (package / WEIGHTS).unlink()
    (package / WEIGHTS).symlink_to(package / WEIGHTS)
    refuse(package, "weight.bin")


def test_symbolic_link_within_the_package(package: Path) -> None:
    (package / WEIGHTS).rename(package / WEIGHTS.with_name("moved.bin"))
    (package / WEIGHTS).symlink_to("moved.bin")
    use(package)


@pytest.mark.parametrize(
    ("offset", "part"),
    [(2**63, "9223372036854775808"), (3, "record offset 3"), (2**64 - 64, "beyond"), (128, "sentinel")],
)
def test_bad_offset(offset: int, part: str, package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["dense"].attributes["val"].blobFileValue.offset = offset

    edit(package, change)
    refuse(package, "weight.bin", "'dense'", part)


@pytest.mark.parametrize("size", [9, 7, 2**20])
def test_shape_that_does_not_fit_the_data(size: int, package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["dense"].attributes["val"].type.tensorType.dimensions[0].constant.size = size
        operations["dense"].outputs[0].type.tensorType.dimensions[0].constant.size = size

    edit(package, change)
    refuse(package, "weight.bin", "'dense'", "size in bytes is 128", str(size * 8 * 2))


@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
def test_absurd_dimension(size: int, package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["second"].outputs[0].type.tensorType.dimensions[1].constant.size = size

    edit(package, change)
    refuse(package, "'second'", str(size))


def test_absurd_dimension_beside_a_zero(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        sizes = operations["second"].outputs[0].type.tensorType.dimensions
        sizes[0].constant.size, sizes[1].constant.size = 2**63, 0

    edit(package, change)
    refuse(package, "'second'", str(2**63))


def test_states_beyond_what_the_package_bears_out(package: Path) -> None:
    """Each of them could be, together they are 3 GB in a package of some kilobytes."""

    def change(function: Any, operations: dict[str, Any]) -> None:
        for number in range(10):
            given = function.inputs.add()
            given.name = f"state{number}"
            wrapped = given.type.stateType.wrappedType.tensorType
            wrapped.CopyFrom(operations["second"].outputs[0].type.tensorType)
            wrapped.dimensions[0].constant.size = 2**23 + 2**21

    edit(package, change)
    refuse(package, "its states have 838,860,800 elements together")


def squared(length: int) -> Callable[[Any, dict[str, Any]], None]:
    """Put so many constants behind `dense`, each the square of the one before; the last one is used."""

    def change(function: Any, operations: dict[str, Any]) -> None:
        block = function.block_specializations[function.opset]
        made = list(block.operations)
        place = next(at for at, op in enumerate(made) if op.outputs and op.outputs[0].name == "dense")
        name, chain = "dense", []
        for number in range(length):
            link = type(made[place])()
            link.type = "constexpr_blockwise_shift_scale"
            for key in ("data", "scale"):
                link.inputs[key].arguments.add().name = name
            name = f"link{number}"
            link.outputs.add().CopyFrom(made[place].outputs[0])
            link.outputs[0].name = name
            chain.append(link)
        operations["second"].inputs["weight"].arguments[0].name = name
        changed = [*made[: place + 1], *chain, *made[place + 1 :]]
        del block.operations[:]
        block.operations.extend(changed)

    return change


@pytest.mark.parametrize("length", [40, 900])
def test_chain_of_constants_that_use_the_one_before_twice(length: int, package: Path) -> None:
    """Each is computed once: computed anew for each use, forty would take weeks."""
    expected = torch.from_numpy(_WEIGHT)
    for _ in range(length):
        expected = (expected.float() ** 2).half()
    edit(package, squared(length))
    loaded = load_package(package)
    assert torch.equal(loaded.dense()[f"link{length - 1}"], expected)
    loaded.run({"x": torch.zeros(2, 12)})


def test_chain_of_constants_without_end(package: Path) -> None:
    edit(package, squared(5000))
    refuse(package, "is made of more than 1000 other constants")


@pytest.mark.parametrize(
    "names",
    [
        ["a.mlpackage"] * 2,
        [".."],
        ["."],
        ["a/b"],
        [""],
        [f"{n}.mlpackage" for n in range(1000)],
        [3],
        "a",
        None,
    ],
    ids=str,
)
def test_names_of_chunks(names: Any) -> None:
    from converters.coreml.read.description import Description

    prefix = "com.github.edkm-export."
    metadata = {f"{prefix}interface": "neural-engine", f"{prefix}context": "64", f"{prefix}prefill": "32"}
    with pytest.raises(PackageError, match="packages is not a list of different names"):
        Description.of({**metadata, f"{prefix}packages": json.dumps(names)}, Path("it"))


def test_absurd_fill(tmp_path: Path) -> None:
    path = save_program(
        tmp_path / "fill.mlpackage",
        {"shape": np.zeros(2, np.int32)},
        lambda shape: mb.fill(shape=shape, value=np.float32(1), name="y"),
    )
    with pytest.raises(PackageError, match=r"fill 'y' \(line \d+\): shape \[1000000, 1000000\] is absurd"):
        load_package(path).run({"shape": torch.tensor([10**6, 10**6])})


def test_declared_shape_that_is_not_made(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["second"].outputs[0].type.tensorType.dimensions[1].constant.size = 9

    edit(package, change)
    refuse(package, "linear 'second'", "declared as float16 [2, 9]", "[2, 8]")


def test_declared_dtype_is_what_comes_out(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["y"].outputs[0].type.tensorType.dataType = 23

    edit(package, change)
    assert load_package(package).run({"x": torch.zeros(2, 12)})["y"].dtype == torch.int32


def test_unknown_op(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["y"].type = "quantum_softmax"

    edit(package, change)
    with pytest.raises(
        UnsupportedOpError, match=r"quantum_softmax 'y' \(line \d+\): the interpreter does not support"
    ):
        use(package)
    assert load_package(package).op_counts()["quantum_softmax"] == 1
    assert set(load_package(package).palettized()) == {"palette"}


def test_unknown_argument(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["y"].inputs["temperature"].CopyFrom(operations["y"].inputs["axis"])

    edit(package, change)
    refuse(package, "softmax 'y'", "argument 'temperature' is not implemented", kind=UnsupportedOpError)


def test_unknown_mode(tmp_path: Path) -> None:
    path = save_program(
        tmp_path / "gelu.mlpackage",
        {"x": np.zeros(3, np.float32)},
        lambda x: mb.gelu(x=x, mode="EXACT", name="y"),
    )

    def change(function: Any, operations: dict[str, Any]) -> None:
        mode = operations["y_mode_0"].attributes["val"].immediateValue.tensor.strings
        mode.values[0] = "QUICK"

    edit(path, change)
    with pytest.raises(UnsupportedOpError, match=r"gelu 'y' \(line \d+\): mode 'QUICK'"):
        load_package(path).run({"x": torch.zeros(3)})


def test_missing_argument(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        del operations["second"].inputs["weight"]

    edit(package, change)
    refuse(package, "linear 'second'", "argument 'weight' is missing")


def test_value_that_nobody_makes(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["second"].inputs["x"].arguments[0].name = "ghost"

    edit(package, change)
    refuse(package, "linear 'second'", "uses 'ghost'")


def test_value_that_is_made_later(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["first"].inputs["x"].arguments[0].name = "y"

    edit(package, change)
    refuse(package, "linear 'first'", "uses 'y'")


def test_value_that_is_made_twice(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["second"].outputs[0].name = "first"

    edit(package, change)
    refuse(package, "makes 'first', which is there already")


def test_missing_output(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        function.block_specializations[function.opset].outputs[0] = "ghost"

    edit(package, change)
    refuse(package, "no operation makes the output 'ghost'")


def test_missing_block(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        function.opset = "CoreML99"

    edit(package, change)
    refuse(package, "no block for its opset 'CoreML99'")


def test_unknown_element_type(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["dense"].attributes["val"].type.tensorType.dataType = 40

    edit(package, change)
    refuse(package, "'dense'", "element type 40", kind=UnsupportedOpError)


def test_constant_of_another_type_than_declared(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["dense"].outputs[0].type.tensorType.dataType = 11

    edit(package, change)
    refuse(package, "'dense'", "declared as float32 [8, 8], but holds float16 [8, 8]")


def test_inline_data_of_another_length(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        operations["y_axis_0"].attributes["val"].type.tensorType.dimensions.add().constant.size = 2**50

    edit(package, change)
    refuse(package, "y_axis_0", "1 values inline", str(2**50))


def test_constexpr_that_refers_to_itself(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        binding = operations["palette"].inputs["lut"].arguments[0]
        binding.name = "palette"

    edit(package, change)
    refuse(package, "'palette'", "is not a constant made before it")


def test_lut_that_does_not_fit(package: Path) -> None:
    def change(function: Any, operations: dict[str, Any]) -> None:
        lut = operations["palette"].inputs["lut"].arguments[0].value.type.tensorType
        lut.dimensions[0].constant.size, lut.dimensions[2].constant.size = 4, 4

    edit(package, change)
    refuse(package, "'palette'")
    with pytest.raises(PackageError, match=r"index 7 is beyond the 4 entries"):
        load_package(package).run({"x": torch.zeros(2, 12)})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("[]", "is list, expected an object"),
        ('{"palette": 3}', "'palette' maps to 3"),
        ('{"palette": null}', "maps to None"),
    ],
)
def test_parameter_names(text: str, part: str, package: Path) -> None:
    set_metadata(package, text)
    refuse(package, "com.github.edkm-export.parameters", part)


def set_metadata(path: Path, text: str) -> None:
    model = Model_pb2.Model()
    model.ParseFromString((path / MODEL).read_bytes())
    model.description.metadata.userDefined["com.github.edkm-export.parameters"] = text
    (path / MODEL).write_bytes(model.SerializeToString())


def test_parameter_names_are_used(package: Path) -> None:
    set_metadata(package, json.dumps({"palette": "layers.0.weight", "dense": "head.weight"}))
    loaded = load_package(package)
    assert set(loaded.palettized()) == {"layers.0.weight"}
    assert loaded.palettized()["layers.0.weight"].name == "layers.0.weight"
    assert "head.weight" in loaded.dense()
    assert loaded.metadata["com.github.edkm-export.parameters"].startswith("{")


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ({}, "input 'x' of function main is missing"),
        ({"x": torch.zeros(2, 12), "z": torch.zeros(1)}, "no input 'z'"),
        ({"x": torch.zeros(2, 11)}, "shape [2, 11], expected float16 [2, 12]"),
        ({"x": torch.zeros(24)}, "shape [24]"),
        ({"x": "one"}, "is 'one', expected a tensor, an array or a list of numbers"),
    ],
    ids=["missing", "unknown", "shape", "rank", "list"],
)
def test_inputs(inputs: dict[str, Any], part: str, pristine: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_package(pristine).run(inputs)
    assert part in str(caught.value)


def test_function_and_precision_and_state_are_checked(pristine: Path) -> None:
    loaded = load_package(pristine)
    inputs = {"x": torch.zeros(2, 12)}
    with pytest.raises(InputError, match=r"no function 'decode'; it has main"):
        loaded.run(inputs, function="decode")
    with pytest.raises(InputError, match=r"precision is 'float64'"):
        loaded.run(inputs, precision="float64")
    with pytest.raises(InputError, match=r"has the states none, found cache"):
        loaded.run(inputs, state={"cache": torch.zeros(1)})


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_index_out_of_range(target: str, tmp_path: Path) -> None:
    path = save_program(
        tmp_path / "gather.mlpackage",
        {"ids": np.zeros(3, np.int32)},
        lambda ids: mb.gather(
            x=np.arange(20, dtype=np.float32).reshape(10, 2), indices=ids, axis=0, name="y"
        ),
        target=target,
    )
    loaded = load_package(path)
    for wrong in (10, -11, *([-1] if target == "iOS18" else [])):
        with pytest.raises(
            InputError, match=rf"gather 'y' \(line \d+\): index {wrong} is out of range .* size 10"
        ):
            loaded.run({"ids": torch.tensor([0, wrong, 1])})
    with pytest.raises(InputError, match=r"'ids' holds 4294967296, which int32 cannot"):
        loaded.run({"ids": torch.tensor([0, 2**32, 1])})
    with pytest.raises(InputError, match=r"'ids' is torch.float32, expected int32"):
        loaded.run({"ids": torch.zeros(3)})


def test_importing_the_package_does_not_import_coremltools() -> None:
    code = "import sys, converters.coreml; sys.exit('coremltools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_coremltools(pristine: Path) -> None:
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from converters.coreml import load_package\n"
        "from edkm_export.errors import BackendMissingError\n"
        "try:\n    load_package(sys.argv[1])\n"
        "except BackendMissingError as error:\n"
        "    sys.exit(0 if \"pip install 'edkm-export[coreml]'\" in str(error) else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(pristine)], check=False).returncode == 0
