"""Faults in the operations of a package, and changes that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edkm_export.checkpoint import Checkpoint
from tests.faults.coreml_program import PARAMETERS, Program, bind, bound, move, set_half, swap, swap_bindings
from tests.faults.mutation import DOWN, Q1, UP, K, Q, V


def swap_weights(first: str, second: str) -> Callable[[Program], None]:
    return lambda program: swap_bindings(program.reader(first), program.reader(second), "weight")


def retype(kind: str, place: int, to: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.ops(kind)[place].type = to

    return change


def bypass_norm_weight(parameter: str) -> Callable[[Program], None]:
    """Read what the norm multiplies in the place of the product."""

    def change(program: Program) -> None:
        op = program.reader(parameter)
        weight = program.weight(parameter)
        other = next(name for key in ("x", "y") if (name := bound(op, key)) != weight)
        program.replace(op.outputs[0].name, other)

    return change


def residual_add(program: Program, number: int) -> Any:
    """The op that adds the output of attention (even) or MLP (odd) to the residual stream."""
    layer, mlp = divmod(number, 2)
    name = f"model.layers.{layer}.{'mlp.down' if mlp else 'self_attn.o'}_proj.weight"
    (op,) = program.users(program.reader(name).outputs[0].name)
    return op


def sub_residual(program: Program) -> None:
    residual_add(program, 0).type = "sub"


def skip_residual(program: Program) -> None:
    """Forget the stream: go on with the output of the MLP alone."""
    op = residual_add(program, 1)
    program.replace(op.outputs[0].name, program.reader(DOWN).outputs[0].name)


def gated(program: Program) -> Any:
    """The product of gate and up projection."""
    (op,) = program.users(program.reader(UP).outputs[0].name)
    return op


def gate_by_add(program: Program) -> None:
    gated(program).type = "add"


def rotation(program: Program) -> Any:
    """The negation in the first rotation: a product of half a head with -1."""
    split = program.ops("split")[0]
    return program.users(split.outputs[1].name)[0]


def rotate_backwards(program: Program) -> None:
    values = program.constant(rotation(program), "y")
    assert values.WhichOneof("value") == "bytes"
    values.bytes.values = np.float16(1).tobytes()


def turn_concat(program: Program) -> None:
    names = program.ops("concat")[0].inputs["values"].arguments
    first, second = names[0].name, names[1].name
    names[0].name, names[1].name = second, first


def drop_mask(program: Program) -> None:
    del program.ops("scaled_dot_product_attention")[0].inputs["attn_mask"]


def exchange_query_and_key(program: Program) -> None:
    op = program.ops("scaled_dot_product_attention")[1]
    swap(op, "query", "key")


def repeat_heads_wrongly(program: Program) -> None:
    """Key heads in the order 0 1 0 1, where query heads 0 and 1 share key head 0."""
    tile = program.ops("tile")[0]
    expand = program.maker(bound(tile, "x"))
    program.constant(expand, "axes").ints.values[:] = [1]
    # the axes are a constant that other layers share: give them the same fault
    for op in program.ops("expand_dims"):
        program.constant(op, "axes").ints.values[:] = [1]
        sizes = op.outputs[0].type.tensorType.dimensions
        shape = [size.constant.size for size in sizes]
        sizes[1].constant.size, sizes[2].constant.size = shape[2], shape[1]
    for op in program.ops("tile"):
        reps = program.constant(op, "reps").ints.values
        reps[1], reps[2] = reps[2], reps[1]


def norm_epsilon(program: Program) -> None:
    """An epsilon of one in the place of the tiny one that keeps rsqrt finite."""
    values = program.constant(program.ops("rsqrt")[0], "epsilon")
    if values.WhichOneof("value") == "bytes":
        values.bytes.values = np.float16(1).tobytes()
    else:
        values.floats.values[:] = [1.0]


def ints(
    kind: str, place: int, key: str, change: Callable[[list[int]], list[int]]
) -> Callable[[Program], None]:
    """Change the integers of a constant argument."""

    def apply(program: Program) -> None:
        values = program.constant(program.ops(kind)[place], key)
        if values.WhichOneof("value") == "bytes":
            known = np.frombuffer(values.bytes.values, np.int32).tolist()
            values.bytes.values = np.array(change(known), np.int32).tobytes()
        else:
            values.ints.values[:] = change(list(values.ints.values))

    return apply


def reversed_halves(values: list[int]) -> list[int]:
    return [*values[:-2], values[-1], values[-2]]


def declare(kind: str, place: int, axis: int, size: int) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        dimensions = program.ops(kind)[place].outputs[0].type.tensorType.dimensions
        dimensions[axis].constant.size = size

    return change


def shorten_input(program: Program) -> None:
    for given in program.function.inputs:
        given.type.tensorType.dimensions[-1].constant.size //= 2
    program.message.description.input[0].type.multiArrayType.shape[-1] //= 2


def rename_output(program: Program) -> None:
    old = program.block.outputs[0]
    for output in program.maker(old).outputs:
        output.name = "scores"
    program.block.outputs[0] = "scores"
    program.message.description.output[0].name = "scores"


def rename_input(program: Program) -> None:
    program.replace("input_ids", "tokens")
    program.function.inputs[0].name = "tokens"
    program.message.description.input[0].name = "tokens"


def other_output(program: Program) -> None:
    """Give out the state before the head as logits, which has another width."""
    name = bound(program.maker(program.block.outputs[0]), "x")
    program.block.outputs[0] = name


def metadata(change: Callable[[dict[str, str]], object]) -> Callable[[Program], None]:
    def apply(program: Program) -> None:
        known = program.message.description.metadata.userDefined
        names = json.loads(known[PARAMETERS])
        change(names)
        known[PARAMETERS] = json.dumps(names)

    return apply


def swap_names(names: dict[str, str]) -> None:
    first, second = (next(key for key, name in names.items() if name == wanted) for wanted in (Q, Q1))
    names[first], names[second] = names[second], names[first]


def swap_layers(program: Program) -> None:
    """Layer 1 computes with the weights of layer 2, and the other way round."""
    for name in (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    ):
        swap_weights(f"model.layers.1.{name}_proj.weight", f"model.layers.2.{name}_proj.weight")(program)


def skip_layer(program: Program) -> None:
    """Layer 2 reads what layer 1 read."""
    program.replace(residual_add(program, 3).outputs[0].name, residual_add(program, 1).outputs[0].name)


def too_early(program: Program) -> None:
    """Move the first linear op in front of everything that it needs."""
    place = next(number for number, op in enumerate(program.operations) if op.type == "linear")
    move(program, place, 0)


def overflow(program: Program) -> None:
    """Multiply what goes into the last projection of layer 0 by 2**30 and back: nothing changes but in float16."""
    name = bound(program.reader(DOWN), "x")
    source, known = program.maker(name), program.ops("reduce_max")[0]
    (user,) = program.users(known.outputs[0].name)
    floor = program.maker(bound(user, "y"))
    for number, value in enumerate((2.0**15, 2.0**15, 2.0**-15, 2.0**-15)):
        factor, product = program.operations.add(), program.operations.add()
        factor.CopyFrom(floor)
        factor.outputs[0].name = f"factor_{number}"
        set_half(factor.attributes["val"].immediateValue.tensor, value)
        product.CopyFrom(gated(program))
        bind(product, "x", name)
        bind(product, "y", f"factor_{number}")
        product.outputs[0].CopyFrom(source.outputs[0])
        product.outputs[0].name = name = f"product_{number}"
        for behind in (2, 1):  # in front of the reader, in this order
            place = list(program.operations).index(program.reader(DOWN))
            move(program, len(program.operations) - behind, place)
    bind(program.reader(DOWN), "x", name)


def square_root(program: Program) -> None:
    """A sqrt takes no epsilon."""
    op = program.ops("rsqrt")[0]
    op.type = "sqrt"
    del op.inputs["epsilon"]


def rename_ops(program: Program) -> None:
    for number, op in enumerate(program.operations):
        if "name" in op.attributes:
            op.attributes["name"].immediateValue.tensor.strings.values[:] = [f"op_{number}"]


def describe(program: Program) -> None:
    program.message.description.metadata.author = "someone"
    program.message.description.metadata.userDefined["note"] = "x"


def turn_product(program: Program) -> None:
    swap(gated(program), "x", "y")


def turn_sums(program: Program) -> None:
    for number in range(4):
        swap(residual_add(program, number), "x", "y")


def unused(program: Program) -> None:
    copy = program.operations.add()
    copy.CopyFrom(gated(program))
    copy.outputs[0].name = "nobody_reads_this"


def independent_order(program: Program) -> None:
    """Values before keys."""
    keys, values = (
        next(n for n, op in enumerate(program.operations) if op is program.reader(name)) for name in (K, V)
    )
    move(program, keys, values)


def indent_manifest(package: Path, _checkpoint: Checkpoint) -> None:
    path = package / "Manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
