"""Localization: the first value of an executed artifact that is not what hard PyTorch computes.

Values are matched by what they are, not by name: for each value of hard PyTorch the closest among all operations of the
artifact is found, in whatever layout. Some values of PyTorch an artifact never holds, because its decoder computes
otherwise; so the search first finds the part of the model in which things go wrong, by values that depend on
everything before them (the residual stream), and only then the first wrong one inside it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edkm_export.artifact.execution import AT_FAULT, Execution
from edkm_export.artifact.protocol import Artifact, Traceable, kv_cache_of
from edkm_export.artifact.thresholds import EXECUTION, LOCAL_TOLERANCE
from edkm_export.verify.report import Fault, Rung, Verdict
from edkm_export.verify.sites import Site, record_sites

__all__ = ["find_faults", "localize"]

_POSITIONS = 24  # enough to see a wrong rotation, few enough to compare everything with everything
_CANDIDATES = 12
_STREAM_SCALE = (
    3  # smallest power of two by which a whole stream may be scaled; a fault rarely hits one exactly
)


@dataclass
class _Match:
    """How close the operations of an artifact come to a site.

    Attributes:
        errors: by place of the operation, of each whose output has the right size.
    """

    errors: dict[int, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Of the closest one."""
        return min(self.errors.values(), default=math.inf)

    def closest(self, start: int = 0, stop: int = sys.maxsize) -> int | None:
        """Place of the closest operation within a range of places."""
        able = {place: error for place, error in self.errors.items() if start <= place < stop}
        return min(able, key=able.__getitem__) if able else None


def localize(
    model: Any, artifact: Traceable, execution: str, precision: str, tokens: Tensor, cached: int = 0
) -> Fault:
    """Find where an artifact first leaves hard PyTorch.

    Args:
        model: hard PyTorch.
        artifact: can show its intermediate values.
        execution: id of the execution to look into.
        precision: "float32" or "rounded": how much a value may be off.
        tokens: int64 [positions]; the first 24 are used.
        cached: so many of them are in the cache already, and are not looked at.

    Returns:
        The module and the operation; no module when every value is within the tolerance.

    Raises:
        PackageError: the artifact cannot be run.
    """
    text = tokens[:_POSITIONS]
    search = _Search(record_sites(model, text, cached, kv_cache_of(artifact)))
    artifact.trace(execution, text, search.observe, cached)
    if not search.comparable and cached < len(text) - 1:
        # An interface that takes one token at a time never holds a value of all positions.
        return localize(model, artifact, execution, precision, text, len(text) - 1)
    return search.fault(execution, LOCAL_TOLERANCE[precision])


def find_faults(model: Any, artifact: Artifact, rungs: Sequence[Rung], tokens: Tensor) -> list[Fault]:
    """Localize what failed: the strictest execution that did, or decoding when only that failed.

    A fault that shows in float32 is the same in coarser arithmetic, where it is only harder to see.

    Args:
        model: hard PyTorch.
        artifact: what was run.
        rungs: what came of it.
        tokens: int64 [positions].
    """
    failed = {rung.id for rung in rungs if rung.verdict is Verdict.FAIL}
    if not isinstance(artifact, Traceable):
        return []
    executions = [one for one in artifact.executions if one.execute is not None]
    suspects = [one for one in executions if one.id in failed]
    if failed & {"prefill-decode", "continuation"}:
        suspects += executions[:1]
    if not suspects:
        return []
    new = min(_POSITIONS, len(tokens))
    # A fault that needs a cache to show is looked for with half of the text cached, then with all but its last token.
    places = [0, new // 2, new - 1] if _has_cache(artifact) else [0]
    for cached in places:
        fault = _fault(model, artifact, suspects[0], tokens, cached)
        if fault.module:
            break
    return [fault]


def _has_cache(artifact: Artifact) -> bool:
    try:
        return artifact.session() is not None
    except AT_FAULT:
        return False


def _fault(model: Any, artifact: Any, execution: Execution, tokens: Tensor, cached: int) -> Fault:
    strict = execution.threshold.median_kl <= EXECUTION["float32"].median_kl
    try:
        return localize(model, artifact, execution.id, "float32" if strict else "rounded", tokens, cached)
    except AT_FAULT as error:
        return Fault(
            execution=execution.id,
            module="",
            op="",
            what=f"it cannot be run: {error}",
            error=math.inf,
            tolerance=0.0,
        )


class _Search:
    """Matches the values of an artifact with sites while it runs."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites = sites
        self._matches = [_Match() for _ in sites]
        self._operations: list[str] = []
        self._overflow: str = ""
        # By number of values at one position, which no layout changes.
        self._by_width: dict[int, list[int]] = {}
        for place, site in enumerate(sites):
            self._by_width.setdefault(site.value.numel() // _positions(site.value), []).append(place)

    def observe(self, operation: str, value: Tensor) -> None:
        """Compare the output of one operation with every site that it could be."""
        self._operations.append(operation)
        if not value.is_floating_point():
            return
        if not self._overflow and not bool(torch.isfinite(value).all()):
            self._overflow = operation
        place = len(self._operations) - 1
        for width, sites in self._by_width.items():
            if value.numel() % width == 0:
                for number in sites:
                    error = _error(value, self._sites[number].value)
                    if error is not None:
                        self._matches[number].errors[place] = error

    @property
    def comparable(self) -> bool:
        """Whether the artifact holds anything of the size of the first value of PyTorch, the embedding."""
        return bool(self._matches[0].errors)

    def fault(self, execution: str, tolerance: float) -> Fault:
        """Conclude, when the artifact has run."""
        first, last = self._stretch(tolerance)
        absent = self._absent(first, tolerance)
        wrong = [
            number
            for number in range(first, last + 1)
            if self._matches[number].error > tolerance and self._sites[number].role not in absent
        ]
        if last < 0 or not wrong:
            return Fault(
                execution=execution,
                module="",
                op="",
                what="every value that could be compared is within the tolerance",
                error=max((m.error for m in self._matches if m.error <= tolerance), default=0.0),
                tolerance=tolerance,
            )
        number = wrong[0]
        candidates = self._candidates(number, tolerance)
        what = f"{self._sites[number].words} is wrong"
        if self._overflow:
            what += f"; the first value that is not finite is made by {self._overflow}"
        return Fault(
            execution=execution,
            module=self._sites[number].module,
            op=candidates[0] if candidates else "",
            what=what,
            error=self._matches[number].error,
            tolerance=tolerance,
            candidates=candidates,
        )

    def _candidates(self, number: int, tolerance: float) -> list[str]:
        """Operations that may have caused the fault of a site: after the last right one before it, up to its own."""
        right = [m.closest() for m in self._matches[:number] if m.error <= tolerance]
        start = max((place for place in right if place is not None), default=-1) + 1
        later = [m.closest(start) for m in self._matches[number + 1 :] if m.error <= tolerance]
        stop = min((place for place in later if place is not None), default=start + _CANDIDATES)
        own = self._matches[number].closest(start, stop)
        return self._operations[start : stop if own is None else own + 1][::-1]

    def _stretch(self, tolerance: float) -> tuple[int, int]:
        """Sites after the last right stem up to the first wrong one; last -1: none is wrong."""
        first = 0
        for number, site in enumerate(self._sites):
            if site.stem:
                if self._matches[number].error > tolerance:
                    return first, number
                first = number + 1
        return first, -1

    def _absent(self, first: int, tolerance: float) -> set[str]:
        """Roles that the artifact does not hold even in layers that are right."""
        right = {s.role for s, m in zip(self._sites, self._matches, strict=True) if m.error <= tolerance}
        return {site.role for site in self._sites[:first]} - right


def _positions(value: Tensor) -> int:
    return value.shape[-2]


def _error(found: Tensor, expected: Tensor) -> float | None:
    """Relative error of the closest layout; None when none fits.

    Args:
        found: of the artifact, any rank; it may hold more positions, before or after.
        expected: float32 [positions, channels] or [heads, positions, channels].
    """
    positions = _positions(expected)
    best: list[float] = []
    shape = [size for size in found.shape if size > 1] if positions > 1 else list(found.shape)
    flat = found.reshape(shape).float()
    forms = [expected]
    if expected.dim() == 3:  # heads next to each other, as a projection leaves them
        forms.append(expected.transpose(0, 1).reshape(positions, -1))
    for form in forms:
        if positions == 1:
            if flat.numel() == form.numel():
                best.append(_distance(flat.reshape(-1), form.reshape(-1)))
            continue
        wanted = [size for size in form.shape if size > 1]
        axis = [size for size in form.shape if size > 1].index(positions) if positions in wanted else 0
        for order in itertools.permutations(range(flat.dim())):
            turned = flat.permute(order)
            if turned.dim() != len(wanted) or turned.shape[axis] < positions:
                continue
            if all(place == axis or turned.shape[place] == size for place, size in enumerate(wanted)):
                target = form.reshape(wanted)
                for start in {0, turned.shape[axis] - positions}:
                    best.append(_distance(turned.narrow(axis, start, positions), target))
    return min(best, default=None)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite when it is not a number.

    A decoder may hold its residual stream smaller by a large power of two, for the sake of float16: that is no error.
    """
    size = float(expected.norm().clamp_min(1e-30))
    ratio = float(found.norm()) / size
    if 0 < ratio < math.inf and abs(exponent := round(math.log2(ratio))) >= _STREAM_SCALE:
        found = found * 2.0**-exponent
    error = float((found - expected).norm()) / size
    return error if math.isfinite(error) else math.inf
