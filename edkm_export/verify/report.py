"""The verification report: two verdicts, what was proved with which threshold, and what was not run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pydantic

from edkm_export.artifact.metrics import Number, Perplexity, Record
from edkm_export.errors import InputError
from edkm_export.local_paths import without_folders
from edkm_export.verify.older_reports import upgrade

__all__ = [
    "SCHEMA_VERSION",
    "Fault",
    "LayerError",
    "MemoryUse",
    "PromptTexts",
    "Report",
    "Rung",
    "Size",
    "TaskAnswers",
    "TaskResult",
    "TensorReport",
    "TimeBudget",
    "Verdict",
    "WeightPlot",
]

SCHEMA_VERSION = 6


class Verdict(str, Enum):
    """Outcome of a rung, or one of the two of the report.

    PASS, FAIL: the artifact computes what was trained, or not. WITHIN, BEYOND: the limit of the quality. REPORTED:
    measured, but nothing is demanded of it. NOT RUN: not measured, and the rung says why.
    """

    PASS = "PASS"
    FAIL = "FAIL"
    WITHIN = "WITHIN"
    BEYOND = "BEYOND"
    REPORTED = "REPORTED"
    NOT_RUN = "NOT RUN"

    @property
    def is_bad(self) -> bool:
        """FAIL or BEYOND."""
        return self in (Verdict.FAIL, Verdict.BEYOND)

    @property
    def is_good(self) -> bool:
        """PASS or WITHIN."""
        return self in (Verdict.PASS, Verdict.WITHIN)


class Rung(Record):
    """One rung of the ladder: `candidate` is compared with `reference`.

    Attributes:
        id: stable name for programs.
        reference: what is taken as true.
        candidate: what is checked against it.
        verdict: PASS, FAIL, REPORTED or NOT RUN; of `palettization` WITHIN, BEYOND, REPORTED or NOT RUN.
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


class PromptTexts(Record):
    """A prompt with the greedy continuations of the float model and of the palettized one.

    Attributes:
        prompt: the prompt.
        tokens: tokens of each continuation.
        original: the original's; None without the original.
        palettized: that of hard PyTorch.
        shared_tokens: so many tokens the two begin with alike; None without the original.
    """

    prompt: str
    tokens: int
    original: str | None
    palettized: str
    shared_tokens: int | None


class TaskAnswers(Record):
    """What each model answered to an item.

    Attributes:
        item: its place in the task, from 1 on.
        asked: the end of what was asked.
        original, palettized, artifact: answers; None: not run.
        right: which of them are right.
    """

    item: int
    asked: str
    original: str | None
    palettized: str
    artifact: str | None
    right: list[str]


class TaskResult(Record):
    """How many items of a task each model got right.

    Attributes:
        task: its name.
        items: that all models answered.
        left_out: items that are too long for the artifact, or that the time did not reach.
        original, palettized, artifact: right answers; None: not run.
        answers: to some of the items on which models differ.
    """

    task: str
    items: int
    left_out: int
    original: int | None
    palettized: int
    artifact: int | None
    answers: list[TaskAnswers] = []


class TimeBudget(Record):
    """What a limit of the time left out.

    Attributes:
        minutes: that the verification was given.
        cut: what was compared on less than was asked for, or not at all, in words.
    """

    minutes: float
    cut: list[str]


class MemoryUse(Record):
    """How models were run that the memory does not hold whole.

    Attributes:
        budget: memory that there was, in words.
        models: {model of transformers: how its weights were read, in words}.
    """

    budget: str
    models: dict[str, str]


class Report(Record):
    """Everything that `report.json` holds.

    No absolute path of this machine is in it: construction calls `without_folders`. Reports of schema versions 2 to 5
    are read, too.

    Attributes:
        date: when the verification ended, ISO 8601 in UTC; None in reports before version 5.
        faithful_export: PASS, FAIL or NOT RUN: does the artifact compute what was trained?
        quality: WITHIN, BEYOND, REPORTED or NOT RUN: how far did palettization move the model from the original?
        not_run: what was not run, with the reason.
        continuations: of each prompt, side by side.
        tasks: right answers by task; empty: none were asked for, as before version 6.
        time_budget: None: there was no limit of the time.
        memory: None: every model was in memory whole, or nothing is known of it.
    """

    schema_version: int = SCHEMA_VERSION
    artifact: str
    kind: str
    date: str | None = None
    faithful_export: Verdict
    quality: Verdict
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
    continuations: list[PromptTexts] = []
    tasks: list[TaskResult] = []
    time_budget: TimeBudget | None = None
    memory: MemoryUse | None = None
    provenance: dict[str, Any]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _prepared(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return _without_local_paths(upgrade(_plain(given), SCHEMA_VERSION))

    def __repr__(self) -> str:
        """One line: both verdicts, the artifact, and what was proved."""
        from edkm_export.verify.verdicts import one_line

        return f"Report({one_line(self)})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdicts in a line, and the whole page in a frame of its own."""
        from edkm_export.verify.html import notebook_view

        return notebook_view(self)

    @property
    def failed(self) -> bool:
        """Whether a command ends with status 1: the export is not proved faithful, or the quality is BEYOND."""
        return self.faithful_export is not Verdict.PASS or self.quality is Verdict.BEYOND

    @property
    def passed(self) -> bool:
        """Whether the export is proved faithful and the quality within its limit, if there is one to compare with."""
        return not self.failed

    def write(self, folder: str | Path) -> Path:
        """Write report.html, report.md and report.json into a folder, which is made if it is not there.

        Returns:
            Path of report.html.

        Raises:
            InputError: `folder` is a file.
        """
        from edkm_export.atomic import made_folder
        from edkm_export.verify.write import write_report

        place = Path(folder)
        try:
            with made_folder(place):
                write_report(self, place)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{folder}: is a file; give a folder.") from error
        return place / "report.html"

    @property
    def bit_exact_tensors(self) -> int:
        """Palettized weights that are equal bit for bit on disk."""
        return sum(tensor.bit_exact is True for tensor in self.tensors)

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions at which the palettized model has the original's most likely token."""
        return _number(self._of_palettization("top1_agreement"))

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity of the palettized model over that of the original."""
        return _number(self._of_palettization("perplexity_ratio"))

    @property
    def perplexity_limit(self) -> float | None:
        """Largest allowed `perplexity_ratio`; None: there is none."""
        return _number(self._of_palettization("perplexity_limit"))

    @property
    def perplexity_limit_source(self) -> str:
        """Who set the limit, in words; empty in reports before version 5."""
        return str(self._of_palettization("perplexity_limit_source") or "")

    @property
    def embeds(self) -> bool:
        """Whether it is of an embedding model: what was measured are cosines."""
        return any("cosine_mean" in rung.measures for rung in self.rungs)

    @property
    def nearness(self) -> dict[str, Any] | None:
        """What was measured of an embedding model against the original; None of a language model, or not measured."""
        found = next((rung.measures for rung in self.rungs if rung.id == "palettization"), {})
        return found if "cosine_mean" in found else None

    def _of_palettization(self, name: str) -> Any:
        return next((rung.measures.get(name) for rung in self.rungs if rung.id == "palettization"), None)

    def html(self) -> str:
        """The page of report.html, one self-contained document."""
        from edkm_export.verify.html import report_page  # it needs this module

        return report_page(self)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _plain(value: Any) -> Any:
    """Records as dicts, however deep."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _without_local_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Names in place of paths; what models wrote is left as it is, since a `/usr/bin` in it is theirs."""
    rungs = given.get("rungs")
    listed = rungs if isinstance(rungs, list) else []
    texts = {place: rung for place, rung in enumerate(listed) if _tells_texts(rung)}
    written = {name: given[name] for name in ("continuations", "tasks") if name in given}
    if isinstance(rungs, list):
        given = {**given, "rungs": [None if place in texts else rung for place, rung in enumerate(rungs)]}
    named = without_folders({key: value for key, value in given.items() if key not in written})
    for place, rung in texts.items():
        named["rungs"][place] = rung
    return {**named, **written}


def _tells_texts(rung: Any) -> bool:
    if not isinstance(rung, dict):
        return False
    return rung.get("id") == "tasks-artifact" or bool((rung.get("measures") or {}).get("continuations"))
