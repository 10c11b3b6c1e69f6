"""The verification report: what was proved, with which threshold, and what was not run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pydantic

from edkm_export.artifact.metrics import Number, Perplexity, Record
from edkm_export.errors import InputError

__all__ = [
    "SCHEMA_VERSION",
    "Fault",
    "LayerError",
    "Report",
    "Rung",
    "Size",
    "TensorReport",
    "Verdict",
    "WeightPlot",
    "overall",
]

SCHEMA_VERSION = 4


class Verdict(str, Enum):
    """Outcome of a rung, or of the whole ladder. REPORTED: measured, but nothing is demanded of it."""

    PASS = "PASS"
    FAIL = "FAIL"
    REPORTED = "REPORTED"
    NOT_RUN = "NOT RUN"


class Rung(Record):
    """One rung of the ladder: `candidate` is compared with `reference`.

    Attributes:
        id: stable name for programs.
        reference: what is taken as true.
        candidate: what is checked against it.
        verdict: PASS, FAIL, REPORTED or NOT RUN.
        threshold: what had to hold, in words.
        why: the reason for that threshold.
        detail: what was found, or why it was not run.
        measures: what was measured, by name.
    """

    id: str
    reference: str
    candidate: str
    verdict: Verdict
    threshold: str
    why: str
    detail: str
    measures: dict[str, Any] = pydantic.Field(default_factory=dict)


class TensorReport(Record):
    """One palettized weight.

    Attributes:
        name: of the parameter.
        shape: dense shape.
        n_bits: bits of an index.
        groups: LUTs along output and input axis.
        dim: values of a LUT entry.
        lut_dtype: "float16", "int8" or "int4".
        used_centroids: entries that are selected, all LUTs together.
        centroids: entries there are.
        bits_per_weight: storage, LUTs included.
        bit_exact: indices and LUTs on disk equal the checkpoint's; None when they could not be read.
        index_entropy: bits of information in an index, given its LUT; at most `n_bits`.
        weight_snr_db: of the decoded weight against the original's; None without the original.
        output_snr_db: of what the layer computes from the original's activations with the decoded weight, against
            what it computes with the original one; None without the original, or for a weight of another kind.
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
    index_entropy: float
    weight_snr_db: Number | None
    output_snr_db: Number | None = None

    @property
    def dead_centroids(self) -> int:
        """LUT entries that no index selects."""
        return self.centroids - self.used_centroids


class Size(Record):
    """Bytes of one part of an artifact, as the recipe predicts and as they are; None: not known."""

    part: str
    predicted_bytes: int | None
    actual_bytes: int | None


class LayerError(Record):
    """Signal to noise ratio of the hidden states after a layer, in decibels."""

    layer: str
    snr_db: Number


class WeightPlot(Record):
    """Values of a weight that share a LUT, and the LUT.

    Attributes:
        name: of the parameter.
        group: (output, input) group.
        source: whose values: "original", or "decoded" where there is none.
        low: left edge of the first bin.
        high: right edge of the last one.
        counts: values in each of the equal bins.
        lut: entries of the LUT, sorted.
        used: indices that select each of them.
    """

    name: str
    group: tuple[int, int]
    source: str
    low: float
    high: float
    counts: list[int]
    lut: list[float]
    used: list[int]


class Fault(Record):
    """Where an executed artifact first leaves the tolerance.

    Attributes:
        execution: id of the rung.
        module: of the PyTorch model; empty when everything stayed within the tolerance.
        op: the operation of the artifact.
        what: what was compared there, in words.
        error: relative error found there.
        tolerance: what is allowed.
        candidates: the operations among which the fault lies, the last one first.
    """

    execution: str
    module: str
    op: str
    what: str
    error: Number
    tolerance: Number
    candidates: list[str] = []


class Report(Record):
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
    sizes: list[Size] = []
    tensors: list[TensorReport]
    layer_errors: dict[str, list[LayerError]] = {}
    weight_plots: list[WeightPlot] = []
    faults: list[Fault] = []
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        """One line: verdict, artifact, what was run."""
        passed = sum(rung.verdict is Verdict.PASS for rung in self.rungs)
        return (
            f"Report({self.verdict.value}, {self.artifact}, {self.bit_exact_tensors} of {len(self.tensors)} tensors "
            f"bit-exact, {passed} of {len(self.rungs)} comparisons passed, {len(self.not_run)} not run)"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict in a line, and the whole page in a frame of its own."""
        from edkm_export.verify.html import notebook_view

        return notebook_view(self)

    @property
    def passed(self) -> bool:
        """Whether everything that was demanded holds; what was not run is in `not_run`."""
        return self.verdict is Verdict.PASS

    def write(self, folder: str | Path) -> Path:
        """Write report.html, report.md and report.json into a folder, which is made if it is not there.

        Returns:
            Path of report.html.

        Raises:
            InputError: `folder` is a file.
        """
        from edkm_export.verify.write import write_report

        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{folder}: is a file; give a folder.") from error
        write_report(self, place)
        return place / "report.html"

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
