"""Decoded constants, of all packages of a model and of all their functions, in a limited amount of memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

__all__ = ["DecodedWeights"]


class DecodedWeights:
    """Keeps what there is room for.

    A program uses its weights in a circle, once for each token or piece of text. To keep what was used last would keep
    nothing of use then; so what came first stays, and what does not fit is decoded at each use.

    Args:
        room_bytes: for all of them, what is being decoded included; None: no limit.

    Attributes:
        SMALL_BYTES: up to this size a constant stays: a program has thousands of them, which take nothing.
    """

    SMALL_BYTES = 1 << 16

    def __init__(self, room_bytes: int | None = None) -> None:
        self._room = room_bytes
        self._kept: dict[Hashable, Tensor] = {}
        self._native = False
        self._bytes = self._largest = 0

    @property
    def limited(self) -> bool:
        """Whether there is a limit: then nobody else may hold what is not small."""
        return self._room is not None

    def get(self, key: Hashable, native: bool, decode: Callable[[], Tensor]) -> Tensor:
        """A weight.

        Args:
            key: equal for equal values; also of those that are held otherwise, so that these are known.
            native: whether it is held in float16. Nobody computes in both ways at once: where memory is limited, those
                of the other way are dropped.
            decode: makes it.

        Returns:
            The tensor, which is not to be written to.
        """
        found = self._kept.get((native, key))
        if found is not None:
            return found
        if self.limited and native != self._native:
            self._kept = {key: value for key, value in self._kept.items() if _size(value) <= self.SMALL_BYTES}
            self._native, self._bytes = native, sum(map(_size, self._kept.values()))
        value = decode()
        size = _size(value)
        self._largest = max(self._largest, size)
        # room for the largest one so far, and for what decoding it takes
        if (
            self._room is None
            or size <= self.SMALL_BYTES
            or self._bytes + size + 3 * self._largest <= self._room
        ):
            self._kept[native, key] = value
            self._bytes += size
        return value


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()
