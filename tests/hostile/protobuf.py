"""Changes anywhere in a protobuf message, by its own description."""

from __future__ import annotations

import random
from typing import Any

from tests.hostile.oddities import NUMBERS, TEXTS

__all__ = ["change_message"]

_WHOLE = (3, 4, 5, 13, 6, 7, 15, 16, 17, 18)  # FieldDescriptor.type
_BOUNDS = {
    5: 31, 15: 31, 17: 31, 13: 32, 7: 32, 3: 63, 16: 63, 18: 63, 4: 64, 6: 64,
}  # fmt: skip


def change_message(draw: random.Random, message: Any) -> str:
    """Change one place; says which."""
    path: list[str] = []
    while True:
        present = [field for field, _ in message.ListFields()]
        if not present:
            return f"{'.'.join(path)}: empty"
        field = draw.choice(present)
        path.append(field.name)
        value = getattr(message, field.name)
        if _is_map(field):
            inner = _map_entry(draw, field, value)
            if inner is None:
                return f"{'.'.join(path)}: map"
            message = inner
            continue
        if field.is_repeated if hasattr(field, "is_repeated") else field.label == 3:
            place = draw.randrange(len(value))
            path[-1] += f"[{place}]"
            if draw.random() < 0.15:
                return f"{'.'.join(path)}: {_rearrange(draw, field, value, place)}"
            if field.type == 11:
                message = value[place]
                continue
            value[place] = _odd(draw, field, value[place])
            return f"{'.'.join(path)}: set to {str(value[place])[:40]!r}"
        if field.type == 11 and draw.random() < 0.95:
            message = value
            continue
        if field.type == 11 or draw.random() < 0.1:
            message.ClearField(field.name)
            return f"{'.'.join(path)}: cleared"
        setattr(message, field.name, _odd(draw, field, value))
        return f"{'.'.join(path)}: set to {str(getattr(message, field.name))[:40]!r}"


def _is_map(field: Any) -> bool:
    return field.type == 11 and field.message_type.GetOptions().map_entry


def _map_entry(draw: random.Random, field: Any, value: Any) -> Any:
    """A message in a map to go on in; None when the map itself was changed."""
    key = draw.choice(sorted(value))
    kind = field.message_type.fields_by_name["value"]
    if kind.type == 11:
        if draw.random() < 0.1:
            del value[key]
            return None
        return value[key]
    if draw.random() < 0.2:
        del value[key]
    else:
        value[key] = _odd(draw, kind, value[key])
    return None


def _rearrange(draw: random.Random, field: Any, value: Any, place: int) -> str:
    how = draw.choice(("drop", "repeat", "swap"))
    if how == "drop":
        del value[place]
    elif field.type == 11:
        other = draw.randrange(len(value))
        held = type(value[place])()
        held.CopyFrom(value[place])
        if how == "swap":
            value[place].CopyFrom(value[other])
            value[other].CopyFrom(held)
        else:
            value.add().CopyFrom(held)
    else:
        value.append(value[place])
    return how


def _odd(draw: random.Random, field: Any, value: Any) -> Any:
    if field.type in _BOUNDS:
        bits, signed = _BOUNDS[field.type], field.type not in (13, 7, 4, 6)
        found = draw.choice(
            [value + 1, value - 1, value * 2, *(int(n) for n in NUMBERS if isinstance(n, int))]
        )
        top = 1 << bits
        found = found % top
        return -found if signed and draw.random() < 0.2 else found
    if field.type in (1, 2):
        return draw.choice([float(number) for number in NUMBERS if abs(number) < 1e38 or number != number])
    if field.type == 8:
        return not value
    if field.type == 14:
        return draw.choice([each.number for each in field.enum_type.values])
    if field.type == 12:
        data = bytearray(value)
        if data and draw.random() < 0.8:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(data)
        return draw.choice((b"", b"\xff\xfe", bytes(data[:-1]), bytes(data) + b"\0"))
    return draw.choice([text for text in TEXTS if text != "\ud800"])
