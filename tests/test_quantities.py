import pytest

from edkm_export.quantities import bit_range, short_count, short_size


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"), (999, "999"), (1000, "1.00K"), (999_499, "999K"), (999_500, "1.00M"), (134_515_008, "135M"),
        (7_240_000_000, "7.24B"), (1_300_000_000_000, "1,300B"),
    ],
)  # fmt: skip
def test_counts(count, words):
    assert short_count(count) == words


def test_sizes_and_bits():
    assert [short_size(size) for size in (12, 1234, 76_900_000, 1.2e9)] == [
        "12 bytes", "1.2 kB", "76.9 MB", "1,200.0 MB",
    ]  # fmt: skip
    assert [bit_range(bits) for bits in ([4, 4], [8, 2, 4], [1])] == ["4 bits", "2-8 bits", "1 bit"]
