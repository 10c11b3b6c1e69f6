from __future__ import annotations

import pytest

from edkm_export.reference.load_progress import counting


def test_shares_of_what_is_read():
    shown: list[float] = []
    advance = counting(8, shown.append)
    for count in (2, 4, 2):
        advance(count)
    assert shown == [0.25, 0.75, 1.0]


@pytest.mark.parametrize(("total", "show"), [(None, print), (0, print), (8, None)])
def test_nothing_to_count(total, show):
    assert counting(total, show) is None
