"""Counts and sizes in a word or two, for one line about an object."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["bit_range", "short_count", "short_size"]


def short_count(count: int) -> str:
    """Three digits: 999, 1.23K, 135M, 7.24B."""
    if count < 1000:
        return str(count)
    value, suffix = count / 1e3, "K"
    for larger in "MB":
        if value >= 999.5:
            value, suffix = value / 1e3, larger
    return (f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}") + suffix


def short_size(size_bytes: float) -> str:
    """Decimal units, as app stores count: 12 bytes, 3.4 kB, 76.9 MB, 1,200.0 MB."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"


def bit_range(bits: Iterable[int]) -> str:
    """Bits of several weights: "4 bits", "2-8 bits"."""
    found = sorted(set(bits))
    ends = f"{found[0]}-{found[-1]}" if len(found) > 1 else f"{found[0]}"
    return f"{ends} bit{'s' if ends != '1' else ''}"
