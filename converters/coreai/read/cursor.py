"""Reading numbers and bytes from one after another, never beyond the end."""

from __future__ import annotations

from edkm_export.errors import PackageError

__all__ = ["Cursor"]


class Cursor:
    """A place in a stretch of bytes.

    Args:
        data: the whole file.
        start, end: the stretch; end None: to the end of the file.
        what: its name, for messages.

    Raises:
        PackageError: from every method, when the stretch ends early or holds what it must not.
    """

    __slots__ = ("data", "end", "position", "what")

    def __init__(self, data: memoryview, start: int, end: int | None, what: str) -> None:
        self.data, self.position, self.what = data, start, what
        self.end = len(data) if end is None else end

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return self.end - self.position

    def byte(self) -> int:
        """One byte."""
        if self.position >= self.end:
            self.fail("ends early")
        self.position += 1
        return self.data[self.position - 1]

    def take(self, size: int) -> memoryview:
        """So many bytes, not copied."""
        if not 0 <= size <= self.left:
            self.fail(f"ends early: {size} bytes are wanted, {self.left} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        """An unsigned number in MLIR's encoding: zero bits at the low end of the first byte count further bytes."""
        position = self.position
        if position >= self.end:
            self.fail("ends early")
        first = self.data[position]
        self.position = position + 1
        if first & 1:
            return first >> 1
        if first & 2 and position + 2 <= self.end:  # these two are nearly all there are, by the million
            self.position = position + 2
            return (first | self.data[position + 1] << 8) >> 2
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        more = (first & -first).bit_length() - 1
        return (first | int.from_bytes(self.take(more), "little") << 8) >> (more + 1)

    def signed(self) -> int:
        """A signed number: the lowest bit is the sign."""
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def count(self) -> int:
        """A number of things that follow, each of one byte or more."""
        value = self.varint()
        if value > self.left:
            self.fail(f"is said to hold {value} things in {self.left} bytes")
        return value

    def text(self) -> str:
        """Text up to a zero byte."""
        place = self.position
        while self.byte():
            pass
        return self.decode(self.data[place : self.position - 1])

    def decode(self, raw: memoryview) -> str:
        """UTF-8 of bytes."""
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self.fail("holds text that is not UTF-8")
            raise AssertionError from None

    def align(self, alignment: int, filler: int | None = None) -> None:
        """Skip to a multiple of `alignment` in the file; what is skipped must be `filler`."""
        if not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            self.fail(f"has an alignment of {alignment}")
        while self.position % alignment:
            if self.byte() != filler and filler is not None:
                self.fail("has padding that is none")

    def fail(self, message: str) -> None:
        """Raise PackageError."""
        raise PackageError(f"{self.what} {message} (byte {self.position}).")
