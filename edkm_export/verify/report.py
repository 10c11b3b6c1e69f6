"""The verification report: what was proved, with which threshold, and what was not run."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pydantic

__all__ = ["SCHEMA_VERSION", "Divergence", "Perplexity", "Report", "Rung", "TensorReport", "Verdict"]

SCHEMA_VERSION = 1


class Verdict(str, Enum):
    """Outcome of a rung, or of the whole ladder."""

    PASS = "PASS"
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"


class _Record(pydantic.BaseModel):
    # Infinity is a legal measurement (an output that is not finite); JSON has no number for it.
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Perplexity(_Record):
    """Perplexity of a model on the evaluation text."""

    value: float
    standard_error: float
    tokens: int


class Divergence(_Record):
    """Distance between the next-token distributions of two models; KL in nats.

    `near_ties` counts the disagreements on the top token at which the reference holds both equally likely.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    near_ties: int

    @property
    def settled_agreement(self) -> float:
        """Top-1 agreement, near ties counted as agreeing."""
        return self.top1_agreement + self.near_ties / self.tokens


class Rung(_Record):
    """One step of the ladder: `candidate` is compared with `reference`.

    Attributes:
        id: stable name for programs.
        reference: what is taken as true.
        candidate: what is checked against it.
        verdict: PASS, FAIL or NOT RUN.
        threshold: what had to hold, in words.
        why: the reason for that threshold.
        detail: what was found, or why it was not run.
        measures: the numbers behind it.
    """

    id: str
    reference: str
    candidate: str
    verdict: Verdict
    threshold: str
    why: str
    detail: str
    measures: dict[str, Any] = pydantic.Field(default_factory=dict)


class TensorReport(_Record):
    """One palettized weight.

    Attributes:
        name: of the parameter.
        shape: dense shape.
        n_bits: bits of an index.
        groups: LUTs along output and input axis.
        dim: values of a LUT entry.
        lut_dtype: "float16" or "int8".
        used_centroids: entries that are selected, all LUTs together.
        centroids: entries there are.
        bits_per_weight: storage, LUTs included.
        bit_exact: indices and LUTs on disk equal the checkpoint's; None when they could not be read.
        weight_snr_db: of the decoded weight against the original's; None without the original.
    """

    name: str
    shape: list[int]
    n_bits: int
    groups: tuple[int, int]
    dim: int
    lut_dtype: str
    used_centroids: int
    centroids: int
    bits_per_weight: float
    bit_exact: bool | None
    weight_snr_db: float | None


class Report(_Record):
    """Everything that `report.json` holds."""

    schema_version: int = SCHEMA_VERSION
    artifact: str
    kind: str
    verdict: Verdict
    not_run: list[str]
    rungs: list[Rung]
    perplexities: dict[str, Perplexity]
    parameters: int
    palettized_parameters: int
    bits_per_weight: float
    size_bytes: int
    predicted_size_bytes: int
    tensors: list[TensorReport]
    provenance: dict[str, Any]

    @property
    def bit_exact_tensors(self) -> int:
        """Palettized weights that are equal bit for bit on disk."""
        return sum(tensor.bit_exact is True for tensor in self.tensors)


def overall(rungs: list[Rung]) -> Verdict:
    """FAIL if any rung failed; PASS if something was run and none failed."""
    verdicts = [rung.verdict for rung in rungs]
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.NOT_RUN
