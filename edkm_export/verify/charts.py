"""Plots of the report as inline SVG. Colours come from classes, so that the page decides on light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edkm_export.artifact.metrics import KL_DECADES
from edkm_export.verify.report import LayerError, WeightPlot

__all__ = ["Point", "kl_histogram", "layer_lines", "size_against_quality", "weight_histogram"]

# One SVG unit is about one pixel on a phone, so that text is never scaled below what can be read.
_WIDTH, _HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 40
_THROUGH = 16  # up to so many LUT entries are also drawn through the histogram; more would cover it


@dataclass(frozen=True)
class Point:
    """One artifact in the plot of size against quality."""

    label: str
    size_bytes: float
    perplexity: float
    standard_error: float


@dataclass(frozen=True)
class _Scale:
    """Maps a range of values to a range of SVG units, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _across(low: float, high: float) -> _Scale:
    return _Scale(low, high, _LEFT, _WIDTH - _RIGHT)


def _up(low: float, high: float) -> _Scale:
    return _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)


def kl_histogram(name: str, counts: Sequence[int], median: float, threshold: float | None) -> str:
    """Share of positions by KL divergence, on a logarithmic axis.

    Args:
        name: what was compared, for the accessible name.
        counts: `Divergence.kl_histogram`.
        median: nats.
        threshold: largest allowed median; None: there is none.
    """
    low, high = KL_DECADES
    total = max(1, sum(counts))
    shares = [count / total for count in counts]
    x, y = _across(low, high), _up(0, max(shares, default=1) or 1)
    parts = [
        *_vertical_axis(y, _ticks(0, y.high, 3), lambda value: f"{value:.0%}"),
        *(
            _text(x(decade), y.start + 16, f"1e{decade}", "tick", "middle")
            for decade in range(low, high + 1, 4 if high - low > 8 else 2)
        ),
        _text((x.start + x.end) / 2, _HEIGHT - 6, "KL divergence of a position, nats", "label", "middle"),
    ]
    for place, share in enumerate(shares):
        if share:
            left, right = x(low + place / 2), x(low + (place + 1) / 2)
            said = f"{_decade(low + place / 2)} to {_decade(low + (place + 1) / 2)} nats: {counts[place]} positions"
            parts.append(_bar(left, y(share), right - left, y.start - y(share), "bar", said))
    marks = [(median, "mark", "median")]
    if threshold is not None:
        marks.append((threshold, "limit", "most allowed median"))
    for value, style, words in marks:
        if value > 0:
            place_x = x(min(max(math.log10(value), low), high)) if math.isfinite(value) else x(high)
            parts.append(_line(place_x, y.start, place_x, y.end, style, f"{words} {value:.2g} nats"))
    told = f"Distribution of the KL divergence over {total:,} tokens, {name}: median {median:.2g} nats"
    return _svg(told, parts)


def layer_lines(series: Mapping[str, Sequence[LayerError]]) -> str:
    """Signal to noise ratio of the hidden states, layer by layer; a line for each series."""
    values = [row.snr_db for rows in series.values() for row in rows if math.isfinite(row.snr_db)]
    count = max((len(rows) for rows in series.values()), default=0)
    low, high = _padded(min(values, default=0.0), max(values, default=1.0))
    x, y = _across(0, max(1, count - 1)), _up(low, high)
    parts = [
        *_vertical_axis(y, _ticks(low, high, 5), lambda value: f"{value:g}"),
        *(_text(x(place), y.start + 16, str(place), "tick", "middle") for place in _places(count)),
        _text((x.start + x.end) / 2, _HEIGHT - 6, f"layer, 0 to {count - 1}", "label", "middle"),
        _text(_LEFT - 38, _TOP - 2, "dB", "label", "start"),
    ]
    for number, (name, rows) in enumerate(series.items()):
        points = [(x(place), y(row.snr_db)) for place, row in enumerate(rows) if math.isfinite(row.snr_db)]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        parts.append(f'<polyline class="line line{number}" points="{path}"/>')
        for (left, top), row in zip(points, (r for r in rows if math.isfinite(r.snr_db)), strict=True):
            said = f"{row.layer}: {row.snr_db:.1f} dB ({name})"
            parts.append(
                f'<circle class="dot dot{number}" cx="{left:.1f}" cy="{top:.1f}" r="3">{_title(said)}</circle>'
            )
    worst = min(values, default=math.nan)
    told = (
        f"Signal to noise ratio of the hidden states after layers 0 to {count - 1}: {', '.join(series)}; "
        f"lowest {worst:.1f} dB"
    )
    return _svg(told, parts)


def weight_histogram(plot: WeightPlot) -> str:
    """Values of a weight that share a LUT, and the entries of that LUT as lines."""
    x, y = _across(plot.low, plot.high), _up(0, max(plot.counts) or 1)
    width = (x.end - x.start) / len(plot.counts)
    parts = [
        *(
            _text(x(value), y.start + 22, f"{value:.3g}", "tick", anchor)
            for value, anchor in ((plot.low, "start"), (plot.high, "end"))
        ),
        _text((x.start + x.end) / 2, _HEIGHT - 6, "weight value", "label", "middle"),
        _line(x.start, y.start, x.end, y.start, "axis", ""),
    ]
    for place, count in enumerate(plot.counts):
        if count:
            edge = plot.low + (plot.high - plot.low) * place / len(plot.counts)
            parts.append(
                _bar(
                    x.start + place * width,
                    y(count),
                    width,
                    y.start - y(count),
                    "bar",
                    f"{count} near {edge:.3g}",
                )
            )
    through = len(plot.lut) <= _THROUGH
    for value, used in zip(plot.lut, plot.used, strict=True):
        said = f"LUT entry {value:.4g}, selected {used:,} times" if used else f"LUT entry {value:.4g}, dead"
        if through:
            parts.append(_line(x(value), y.start, x(value), y.end, "through", ""))
        parts.append(_line(x(value), y.start + 10, x(value), y.start, "entry" if used else "dead", said))
    dead = sum(not used for used in plot.used)
    told = (
        f"{plot.name}, LUT {plot.group[0]}, {plot.group[1]}: histogram of {sum(plot.counts):,} {plot.source} weights "
        f"with the {len(plot.lut)} LUT entries as lines, {dead} of them dead"
    )
    return _svg(told, parts)


def size_against_quality(points: Sequence[Point]) -> str:
    """Perplexity over size, one numbered point for each artifact, with its standard error as a bar."""
    known = [point for point in points if math.isfinite(point.perplexity)]
    sizes = [point.size_bytes / 1e6 for point in known] or [0.0]
    spread = [value for point in known for value in _interval(point)] or [0.0, 1.0]
    logarithmic = min(spread) > 0 and max(spread) / min(spread) > 20
    transform = math.log10 if logarithmic else float
    x = _across(*_padded(min(sizes), max(sizes), 0.15))
    y = _up(*_padded(transform(min(spread)), transform(max(spread)), 0.15))
    parts = [
        *_vertical_axis(
            y,
            _ticks(y.low, y.high, 4),
            lambda value: f"{10**value if logarithmic else value:.3g}",
        ),
        *(
            _text(x(value), y.start + 16, f"{value:g}", "tick", "middle")
            for value in _ticks(x.low, x.high, 4)
        ),
        _text((x.start + x.end) / 2, _HEIGHT - 6, "size, MB", "label", "middle"),
    ]
    for number, point in enumerate(points):
        if not math.isfinite(point.perplexity):
            continue
        left, (low, high) = x(point.size_bytes / 1e6), _interval(point)
        said = (
            f"{point.label}: {point.size_bytes / 1e6:.1f} MB, "
            f"perplexity {point.perplexity:.2f} ± {point.standard_error:.2f}"
        )
        parts.append(_line(left, y(transform(low)), left, y(transform(high)), "spread", ""))
        top = y(transform(point.perplexity))
        parts.append(
            f'<circle class="dot dot{number % 4}" cx="{left:.1f}" cy="{top:.1f}" r="4.5">{_title(said)}</circle>'
        )
        parts.append(_text(left + 8, top - 6, str(number + 1), "label", "start"))
    told = "Perplexity against size: " + "; ".join(
        f"{point.label} {point.size_bytes / 1e6:.1f} MB, {point.perplexity:.2f}" for point in points
    )
    return _svg(told, parts)


def _interval(point: Point) -> tuple[float, float]:
    """One standard error to either side; at least a thousandth of the value, for a logarithm."""
    error = point.standard_error if math.isfinite(point.standard_error) else 0.0
    return max(point.perplexity - error, point.perplexity * 1e-3), point.perplexity + error


def _padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    margin = (high - low) * share or max(1.0, abs(high)) * share
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / spacing)
    return [round(place * spacing, 12) for place in range(first, math.floor(high / spacing) + 1)]


def _places(count: int) -> list[int]:
    """Layers that the axis names, counted from 0: about eight, and the last one."""
    apart = max(1, math.ceil(count / 8))
    last = count - 1
    return [place for place in range(0, count, apart) if last - place >= apart / 2 or place == last] + (
        [last] if count > 1 and last % apart else []
    )


def _decade(exponent: float) -> str:
    return f"{10.0**exponent:.1g}"


def _vertical_axis(y: _Scale, ticks: Sequence[float], words: object) -> list[str]:
    assert callable(words)
    parts = []
    for value in ticks:
        parts.append(_line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid", ""))
        parts.append(_text(_LEFT - 6, y(value) + 4, words(value), "tick", "end"))
    return parts


def _svg(name: str, parts: Sequence[str]) -> str:
    escaped = html.escape(name, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped}">{"".join(parts)}</svg>'


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""


def _text(x: float, y: float, words: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str, said: str) -> str:
    return (
        f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{_title(said)}</line>'
    )


def _bar(x: float, y: float, width: float, height: float, style: str, said: str) -> str:
    # a hair narrower than its bin, so that neighbours can be told apart
    return (
        f'<rect class="{style}" x="{x + 0.3:.1f}" y="{y:.1f}" width="{max(width - 0.6, 0.5):.1f}" '
        f'height="{max(height, 0.5):.1f}">{_title(said)}</rect>'
    )
