"""How far the weights of a model are read."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["counting"]


def counting(total: int | None, show: Callable[[float], None] | None) -> Callable[[int], None] | None:
    """What counts values as they are read, and shows their share.

    Args:
        total: values in all, None for a form that is read in one go.
        show: called with the share that is read, 0 to 1; None: nobody looks.

    Returns:
        What `load_model` calls with numbers of values; None where there is nothing to count.
    """
    if not total or show is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        show(min(1.0, done / total))

    return advance
