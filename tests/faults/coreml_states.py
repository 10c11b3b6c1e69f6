"""Faults in the cache of packages that keep it in states."""

from __future__ import annotations

from typing import Any

from tests.faults.coreml_program import Program, bind, bound, insert


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
