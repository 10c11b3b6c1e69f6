"""What int8 keys and values cost is a matter of quality, beside that of the palettes."""

from __future__ import annotations

import pytest

from edkm_export.artifact.metrics import Divergence, Perplexity
from edkm_export.artifact.thresholds import KV_CACHE_RATIO, QualityLimit
from edkm_export.verify.report import Rung, Verdict
from edkm_export.verify.rungs import kv_cache_rung, palettization_rung
from edkm_export.verify.verdicts import faithful_export, quality

CANDIDATE = "hard PyTorch, int8 keys and values"
DISTANCE = Divergence(
    tokens=9, kl_mean=0.1, kl_median=0.1, kl_p999=1, kl_max=1, top1_agreement=0.9, near_ties=0
)


def rungs(ratio: float, *, limited: bool = True) -> list[Rung]:
    values = {"original": 10.0, "hard PyTorch": 11.0, CANDIDATE: 11.0 * ratio}
    perplexities = {
        name: Perplexity(value=value, standard_error=0, tokens=9) for name, value in values.items()
    }
    return [
        palettization_rung(QualityLimit(1.7 if limited else None, "test"), "", DISTANCE, perplexities),
        kv_cache_rung(DISTANCE, perplexities, CANDIDATE, limited=limited),
    ]


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0, "WITHIN"), (1.049, "WITHIN"), (1.051, "BEYOND"), (9, "BEYOND")]
)
def test_it_decides_quality_alone(ratio, verdict):
    """Palettes within their limit do not make up for a cache beyond its own; what ships is both."""
    made = rungs(ratio)
    assert made[0].verdict is Verdict.WITHIN and made[1].verdict.value == verdict == quality(made).value
    assert made[1].measures["perplexity_ratio"] == pytest.approx(ratio)
    assert made[1].measures["perplexity_limit"] == KV_CACHE_RATIO
    assert faithful_export(made) is Verdict.NOT_RUN  # it says nothing of the export


def test_without_a_limit_it_is_reported():
    made = rungs(9.0, limited=False)
    assert {rung.verdict for rung in made} == {Verdict.REPORTED} and quality(made) is Verdict.REPORTED
