"""Faults in .mlpackages with whole-sequence logits: bytes of weight.bin, and the program's protobuf message."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutation import Mutation

from edkm_export.checkpoint import Checkpoint
from edkm_export.models.rope import rope_tables

__all__ = ["COREML_MUTATIONS", "COREML_STATE_MUTATIONS"]

Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
Q1 = "model.layers.1.self_attn.q_proj.weight"
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORM, FINAL_NORM = "model.layers.1.input_layernorm.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
PARAMETERS = "com.github.edkm-export.parameters"


# Bytes of weight.bin


def stored(checkpoint: Checkpoint, name: str, part: str) -> bytes:
    """A parameter as it must lie in weight.bin; part is "lut", "indices" or "dense"."""
    if part == "dense":
        return checkpoint.dense[name].half().numpy().tobytes()
    return getattr(checkpoint.palettized[name], part).numpy().tobytes()


def edit_blob(needle: Callable[[Checkpoint], bytes], change: Callable[[bytearray], None]) -> Any:
    """Change the bytes of one blob."""

    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data, known = bytearray(path.read_bytes()), needle(checkpoint)
        assert data.count(known) == 1
        start = data.index(known)
        blob = bytearray(known)
        change(blob)
        assert len(blob) == len(known) and blob != known
        data[start : start + len(blob)] = blob
        path.write_bytes(data)

    return apply


def part(name: str, which: str) -> Callable[[Checkpoint], bytes]:
    return lambda checkpoint: stored(checkpoint, name, which)


def halves(change: Callable[[Any], None]) -> Callable[[bytearray], None]:
    """A change of the blob seen as float16."""

    def apply(blob: bytearray) -> None:
        values = np.frombuffer(bytes(blob), np.float16).copy()
        change(values)
        blob[:] = values.tobytes()

    return apply


def flip(place: int, mask: int) -> Callable[[bytearray], None]:
    def change(blob: bytearray) -> None:
        blob[place] ^= mask

    return change


def swap_groups(values: Any) -> None:
    """Exchange the first two LUTs of a weight with 16 entries in each."""
    values[:16], values[16:32] = values[16:32].copy(), values[:16].copy()


def set_value(place: int, value: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values[place] = value

    return change


def scale(factor: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values *= np.float16(factor)

    return change


def tables(checkpoint: Checkpoint, length: int, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    config = json.loads(json.dumps(checkpoint.config))
    config["rope_parameters"].update(changes)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return rope_tables(config, head_dim, length)


def rope_base(package: Path, checkpoint: Checkpoint) -> None:
    """Write the tables of another base in the place of the right ones."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    length = input_length(read(package))
    wrong = tables(checkpoint, length, rope_theta=500.0)
    for right, other in zip(tables(checkpoint, length), wrong, strict=True):
        known = right.half().numpy().tobytes()
        assert data.count(known) == 1
        start = data.index(known)
        data[start : start + len(known)] = other.half().numpy().tobytes()
    path.write_bytes(data)


def shifted_positions(package: Path, checkpoint: Checkpoint) -> None:
    """Let queries and keys of one head size stand one position further: only the table of the sines is moved."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    _, sin = tables(checkpoint, input_length(read(package)))
    known = sin.half().numpy().tobytes()
    start = data.index(known)
    data[start : start + len(known)] = sin.half().roll(1, 0).numpy().tobytes()
    path.write_bytes(data)


def open_mask(package: Path, _checkpoint: Checkpoint) -> None:
    """Let every position see what follows it."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    program = Program(read(package))
    mask = program.maker(bound(program.ops("scaled_dot_product_attention")[0], "attn_mask"))
    record = mask.attributes["val"].blobFileValue.offset
    sentinel, _, size, start, _ = struct.unpack_from("<IIQQQ", data, record)
    assert sentinel == 0xDEADBEEF and any(data[start : start + size])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def swap_blobs(first: str, second: str) -> Any:
    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data = bytearray(path.read_bytes())
        one, other = (stored(checkpoint, name, "indices") for name in (first, second))
        places = data.index(one), data.index(other)
        data[places[0] : places[0] + len(one)], data[places[1] : places[1] + len(other)] = other, one
        path.write_bytes(data)

    return apply


def truncate(package: Path, _checkpoint: Checkpoint) -> None:
    (path,) = package.rglob("weight.bin")
    path.write_bytes(path.read_bytes()[:-64])


def record_field(which: int, value: int) -> Any:
    """Change a field of the record in front of a LUT: sentinel, dtype, size, offset, padding."""

    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data = bytearray(path.read_bytes())
        start = data.index(stored(checkpoint, Q, "lut")) - 64
        fields = list(struct.unpack_from("<IIQQQ", data, start))
        fields[which] = value if which != 3 else fields[3] + value
        struct.pack_into("<IIQQQ", data, start, *fields)
        path.write_bytes(data)

    return apply


# The program


def read(package: Path) -> Any:
    from coremltools.proto import Model_pb2

    (path,) = package.rglob("*.mlmodel")
    message = Model_pb2.Model()
    message.ParseFromString(path.read_bytes())
    return message


def edit(change: Callable[[Program], object]) -> Callable[[Path, Checkpoint], None]:
    """Change the program."""

    def apply(package: Path, _checkpoint: Checkpoint) -> None:
        message = read(package)
        before = message.SerializeToString(deterministic=True)
        change(Program(message))
        after = message.SerializeToString(deterministic=True)
        assert after != before
        (path,) = package.rglob("*.mlmodel")
        path.write_bytes(after)

    return apply


def input_length(message: Any) -> int:
    return int(message.description.input[0].type.multiArrayType.shape[-1])


class Program:
    """The one function of a package, for editing."""

    def __init__(self, message: Any) -> None:
        self.message = message
        (self.function,) = message.mlProgram.functions.values()
        (self.block,) = self.function.block_specializations.values()
        self.operations = self.block.operations

    def ops(self, kind: str) -> list[Any]:
        return [op for op in self.operations if op.type == kind]

    def maker(self, name: str) -> Any:
        return next(op for op in self.operations if any(output.name == name for output in op.outputs))

    def users(self, name: str) -> list[Any]:
        return [
            op
            for op in self.operations
            if any(one.name == name for given in op.inputs.values() for one in given.arguments)
        ]

    def weight(self, parameter: str) -> str:
        """Name of the value that holds a parameter."""
        names = json.loads(self.message.description.metadata.userDefined[PARAMETERS])
        return next(value for value, name in names.items() if name == parameter)

    def reader(self, parameter: str) -> Any:
        """The op that computes with a parameter."""
        return self.users(self.weight(parameter))[-1]

    def replace(self, old: str, new: str) -> None:
        """Let everything that reads one value read another."""
        for op in self.users(old):
            for given in op.inputs.values():
                for one in given.arguments:
                    if one.name == old:
                        one.name = new

    def constant(self, op: Any, key: str) -> Any:
        """The tensor value of an argument, written at its use or in a const op."""
        (binding,) = op.inputs[key].arguments
        if binding.WhichOneof("binding") == "value":
            return binding.value.immediateValue.tensor
        return self.maker(binding.name).attributes["val"].immediateValue.tensor


def bind(op: Any, key: str, name: str) -> None:
    op.inputs[key].arguments[0].name = name


def bound(op: Any, key: str) -> str:
    return str(op.inputs[key].arguments[0].name)


def swap_bindings(first: Any, second: Any, key: str) -> None:
    names = bound(first, key), bound(second, key)
    bind(first, key, names[1])
    bind(second, key, names[0])


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


def swap(op: Any, first: str, second: str) -> None:
    names = bound(op, first), bound(op, second)
    bind(op, first, names[1])
    bind(op, second, names[0])


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


def move(program: Program, place: int, to: int) -> None:
    ordered = list(program.operations)
    ordered.insert(to, ordered.pop(place))
    copies = [type(op).FromString(op.SerializeToString()) for op in ordered]
    del program.operations[:]
    program.operations.extend(copies)


def overflow(program: Program) -> None:
    """Multiply what goes into the last projection of layer 0 by 2**30 and back: nothing changes but in float16."""
    reader = program.reader(DOWN)
    name = bound(reader, "x")
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
            place = next(
                n for n, op in enumerate(program.operations) if op.outputs[0].name == linear_name(reader)
            )
            move(program, len(program.operations) - behind, place)
            reader = program.reader(DOWN)
    bind(program.reader(DOWN), "x", name)


def linear_name(op: Any) -> str:
    return str(op.outputs[0].name)


def set_half(tensor: Any, value: float) -> None:
    assert tensor.WhichOneof("value") == "bytes"
    tensor.bytes.values = np.float16(value).tobytes()


def square_root(program: Program) -> None:
    """A sqrt takes no epsilon."""
    op = program.ops("rsqrt")[0]
    op.type = "sqrt"
    del op.inputs["epsilon"]


# Harmless


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


COREML_MUTATIONS = [
    Mutation("bytes", "one LUT value has another sign", edit_blob(part(Q, "lut"), flip(1, 0x80))),
    Mutation(
        "bytes",
        "one LUT value is large",
        edit_blob(part(Q, "lut"), halves(set_value(8, 4.0))),
        module="model.layers.0.self_attn.q_proj",
    ),
    Mutation(
        "bytes", "one LUT value is not finite", edit_blob(part(UP, "lut"), halves(set_value(3, np.inf)))
    ),
    Mutation("bytes", "last bit of a LUT value", edit_blob(part(Q, "lut"), flip(0, 1))),
    Mutation(
        "bytes",
        "swapped groups",
        edit_blob(part(DOWN, "lut"), halves(swap_groups)),
        module="model.layers.0.mlp.down_proj",
    ),
    Mutation("bytes", "a LUT is scaled by 1.05", edit_blob(part(OUT, "lut"), halves(scale(1.05)))),
    Mutation("bytes", "one index", edit_blob(part(Q, "indices"), flip(100, 1))),
    Mutation("bytes", "indices of two layers are exchanged", swap_blobs(Q, Q1)),
    Mutation("bytes", "one index of the embedding", edit_blob(part(EMBEDDING, "indices"), flip(5000, 0x80))),
    Mutation("bytes", "exponent of a norm weight", edit_blob(part(NORM, "dense"), flip(1, 0x04))),
    Mutation("bytes", "RoPE tables of another base", rope_base, module="model.rotary_emb"),
    Mutation("bytes", "sines off by one position", shifted_positions, module="model.rotary_emb"),
    Mutation("bytes", "mask without causality", open_mask, module="model.layers.0.self_attn"),
    Mutation("bytes", "file of weights is truncated", truncate),
    Mutation("bytes", "record with another dtype", record_field(1, 3)),
    Mutation("bytes", "record that points 64 bytes further", record_field(3, 64)),
    Mutation("ops", "residual is subtracted", edit(sub_residual), module="model.layers.0"),
    Mutation("ops", "residual is forgotten", edit(skip_residual)),
    Mutation("ops", "gate is added", edit(gate_by_add), module="model.layers.0.mlp"),
    Mutation("ops", "silu is a sigmoid", edit(retype("silu", 0, "sigmoid")), module="model.layers.0.mlp"),
    Mutation("ops", "silu is a relu", edit(retype("silu", 3, "relu")), module="model.layers.3.mlp"),
    Mutation(
        "ops",
        "rsqrt is a sqrt",
        edit(square_root),
        module="model.layers.0.input_layernorm",
    ),
    Mutation("ops", "mean is a maximum", edit(retype("reduce_mean", 1, "reduce_max"))),
    Mutation("ops", "mean is a sum", edit(retype("reduce_mean", 2, "reduce_sum"))),
    Mutation(
        "ops",
        "missing norm weight",
        edit(bypass_norm_weight(NORM)),
        module="model.layers.1.input_layernorm",
    ),
    Mutation(
        "ops", "missing weight of the last norm", edit(bypass_norm_weight(FINAL_NORM)), module="model.norm"
    ),
    Mutation("ops", "attention without mask", edit(drop_mask), module="model.layers.0.self_attn"),
    Mutation("ops", "float16 overflow", edit(overflow), module="model.layers.0.mlp.down_proj"),
    Mutation("ops", "an op that does not exist", edit(retype("silu", 0, "siluh"))),
    Mutation("attributes", "rotation the other way", edit(rotate_backwards), module="model.rotary_emb"),
    Mutation("attributes", "epsilon of a norm", edit(norm_epsilon)),
    Mutation(
        "attributes", "heads are transposed otherwise", edit(ints("transpose", 0, "perm", reversed_halves))
    ),
    Mutation("attributes", "key heads repeated in another order", edit(repeat_heads_wrongly)),
    Mutation("attributes", "mean over positions", edit(ints("reduce_mean", 0, "axes", lambda _: [1]))),
    Mutation(
        "attributes",
        "rows of the embedding along the other axis",
        edit(ints("gather", 0, "axis", lambda _: [1])),
    ),
    Mutation("names", "two parameters have each other's name", edit(metadata(swap_names))),
    Mutation("names", "a parameter has no name", edit(metadata(lambda names: names.popitem()))),
    Mutation("names", "an output of another name", edit(rename_output)),
    Mutation("names", "an input of another name", edit(rename_input)),
    Mutation("shapes", "an op declares another shape", edit(declare("linear", 0, 2, 64))),
    Mutation("shapes", "a reshape to other heads", edit(ints("reshape", 0, "shape", reversed_halves))),
    Mutation("shapes", "an input of half the length", edit(shorten_input)),
    Mutation("shapes", "hidden states as logits", edit(other_output)),
    Mutation("order", "key and value projection exchanged", edit(swap_weights(K, V))),
    Mutation("order", "gate and up projection exchanged", edit(swap_weights(GATE, UP))),
    Mutation("order", "query and key exchanged", edit(exchange_query_and_key)),
    Mutation("order", "halves of the rotation exchanged", edit(turn_concat), module="model.rotary_emb"),
    Mutation("order", "two layers exchanged", edit(swap_layers)),
    Mutation("order", "a layer is skipped", edit(skip_layer)),
    Mutation("order", "an op before what it needs", edit(too_early)),
    Mutation("ops", "ops renamed", edit(rename_ops), harmful=False),
    Mutation("names", "author and a note", edit(describe), harmful=False),
    Mutation("order", "factors exchanged", edit(turn_product), harmful=False),
    Mutation("order", "summands exchanged", edit(turn_sums), harmful=False),
    Mutation("ops", "an op that nobody reads", edit(unused), harmful=False),
    Mutation("order", "independent ops exchanged", edit(independent_order), harmful=False),
    Mutation("bytes", "manifest indented", indent_manifest, harmful=False),
]


# Packages with the cache in states


def insert(program: Program, kind: str, name: str, like: Any, place: int, x: str, y: str) -> None:
    """An op on two scalars in front of a place."""
    op = program.operations.add()
    op.CopyFrom(like)
    op.type = kind
    op.outputs[0].name = name
    op.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    bind(op, "x", x)
    bind(op, "y", y)
    move(program, len(program.operations) - 1, place)


def late_positions(program: Program) -> None:
    """Rotate by one position less whenever something is in the cache."""
    place = next(number for number, op in enumerate(program.operations) if op.type == "range_1d")
    positions = program.operations[place]
    begin, one = bound(positions, "start"), bound(positions, "step")
    maker = type(positions).FromString(program.maker(begin).SerializeToString())
    assert maker.type == "sub"
    new = bound(maker, "y")
    for kind, name, x, y in (
        ("add", "late_end", "late_begin", new),
        ("maximum", "late_begin", "earlier", "zero"),
        ("sub", "earlier", begin, one),
        ("sub", "zero", one, one),
    ):
        insert(program, kind, name, maker, place, x, y)
    positions = program.ops("range_1d")[0]
    bind(positions, "start", "late_begin")
    bind(positions, "end", "late_end")


def cache_updates(program: Program) -> list[Any]:
    """Keys and values of layer 0, of layer 1, ..."""
    return program.ops("slice_update")


def keys_as_values(program: Program) -> None:
    """Keep the keys of layer 1 in the place of its values, too."""
    keys, values = cache_updates(program)[2:4]
    bind(values, "update", bound(keys, "update"))


def same_slot(program: Program) -> None:
    """Layer 1 writes its keys where layer 0 has them."""
    first, second = cache_updates(program)[0], cache_updates(program)[2]
    for key in ("begin", "end"):
        bind(second, key, bound(first, key))


def forget_update(program: Program) -> None:
    """Write back what was read: the keys of layer 0 never change."""
    update = cache_updates(program)[0]
    (write,) = (op for op in program.users(update.outputs[0].name) if op.type == "write_state")
    bind(write, "data", bound(update, "x"))


def smaller_state(program: Program) -> None:
    """Declare a cache for half of the positions."""
    for given in program.function.inputs:
        if given.type.WhichOneof("type") == "stateType":
            sizes = given.type.stateType.wrappedType.tensorType.dimensions
            sizes[2].constant.size //= 2


COREML_STATE_MUTATIONS = [
    Mutation("states", "off-by-one cache position", edit(late_positions), module="model.rotary_emb"),
    Mutation("states", "keys kept as values", edit(keys_as_values), module="model.layers.1.self_attn.v_proj"),
    Mutation("states", "keys of two layers in one place", edit(same_slot), module="model.layers.1.self_attn"),
    Mutation("states", "keys are not kept", edit(forget_update), module="model.layers.0.self_attn.k_proj"),
    Mutation("states", "states of half the length", edit(smaller_state)),
    Mutation("ops", "ops renamed", edit(rename_ops), harmful=False),
    Mutation("order", "summands exchanged", edit(turn_sums), harmful=False),
]
"""For packages with the interface swift-transformers."""
