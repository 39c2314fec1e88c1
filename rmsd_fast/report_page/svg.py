"""Draw curves and stacked times of the report as inline SVG.

The functions return markup and escape all text arguments. Curves are drawn at about their display size (360 units wide,
one column of a phone), so that the text keeps its size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from rmsd_fast.report_page.style import SERIES_COLORS

# Maximum number of points of a raw curve; the chart has fewer columns than that.
MAX_POINTS = 600
MAX_SMOOTH_POINTS = 180
MAX_BARS = 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 24


@dataclass(frozen=True)
class Series:
    """One curve: optimizer steps, or other places on the x axis, and values (NaN where the value was not finite)."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def number(value: float | None, digits: int = 3) -> str:
    """Return a readable number with `digits` significant digits, such as `12.3k` or `2e-06`; a dash if not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.{digits}g}".replace("e+0", "e") + suffix
    if size < 1e-3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace(".00e", "e").replace(".0e", "e")
    return f"{round(value):d}" if size >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers inside [low, high], in steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the centered moving mean over about a twelfth of the curve, without non-finite values.

    A trailing mean would shift every turn of the curve to the right. The window is truncated at both ends, and short
    curves are returned unchanged.
    """
    n = len(values)
    half = min(n // 24, 50)
    if half == 0:
        return list(values)
    total, count = [0.0], [0]
    for value in values:
        good = math.isfinite(value)
        total.append(total[-1] + (value if good else 0.0))
        count.append(count[-1] + good)
    out = []
    for i in range(n):
        low, high = max(i - half, 0), min(i + half + 1, n)
        seen = count[high] - count[low]
        out.append((total[high] - total[low]) / seen if seen else math.nan)
    return out


def thin(steps: Sequence[int], values: Sequence[float], limit: int) -> tuple[list[int], list[float]]:
    """Return at most `limit` points, with the lowest and highest value of every stretch, so that no spike is lost."""
    n = len(values)
    if n <= limit:
        return list(steps), list(values)
    size = math.ceil(n / (limit // 2))
    keep: list[int] = []
    for start in range(0, n, size):
        block = range(start, min(start + size, n))
        finite = [i for i in block if math.isfinite(values[i])]
        if finite:
            pair = {min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])}
            keep.extend(sorted(pair))
        else:
            keep.append(start)
    return [steps[i] for i in keep], [values[i] for i in keep]


def value_range(series: Sequence[Series], include: Sequence[float] = ()) -> tuple[float, float, str]:
    """Return the vertical range, and a remark if isolated spikes are outside of it."""
    finite = sorted(v for s in series for v in s.values if math.isfinite(v))
    if not finite:
        return 0.0, 1.0, ""
    low, high, remark = finite[0], finite[-1], ""
    if len(finite) >= 40:
        q_low, q_high = finite[len(finite) // 50], finite[-1 - len(finite) // 50]
        spread = max(q_high - q_low, 1e-12 * max(abs(q_high), 1.0))
        if high - q_high > 4 * spread:
            remark, high = f"highest value {number(high)} is outside the chart", q_high + 0.3 * spread
        if q_low - low > 4 * spread:
            remark += f"{'; ' if remark else ''}lowest value {number(low)} is outside the chart"
            low = q_low - 0.3 * spread
    low, high = min([low, *include]), max([high, *include])
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):
        pad = 0.5 * abs(high) or 0.5
    else:
        pad = 0.06 * (high - low)
    bottom = 0.0 if low >= 0 and low <= 0.3 * high else low - pad
    return bottom, high + pad, remark


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return a polyline's path data, with a gap at non-finite values; an isolated point is a dot (round line ends)."""
    out, pen_up = [], True
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen_up = True
            continue
        out.append(f"M{x:.1f} {y:.1f}h0" if pen_up else f"L{x:.1f} {y:.1f}")
        pen_up = False
    return "".join(out)


@dataclass(frozen=True)
class _Frame:
    """Plot area and ranges of both axes. x and y map values to drawing units; y clamps them to the area."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float
    whole: bool = True
    """Whether the x axis has whole numbers only."""

    @property
    def span(self) -> float:
        return self.width - _LEFT - _RIGHT

    def x(self, step: float) -> float:
        if self.x1 <= self.x0:
            return _LEFT + self.span / 2
        return _LEFT + (step - self.x0) / (self.x1 - self.x0) * self.span

    def y(self, value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        share = min(max((value - self.y0) / (self.y1 - self.y0), 0.0), 1.0)
        return _TOP + (1 - share) * (self.height - _TOP - _BOTTOM)

    def axes(self) -> str:
        out = []
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            out.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{self.width - _RIGHT}"/>')
            out.append(f'<text class="t" x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        bottom = self.height - _BOTTOM
        out.append(f'<path class="a" d="M{_LEFT} {bottom}H{self.width - _RIGHT}"/>')
        marks = [v for v in ticks(self.x0, self.x1, 5) if v == int(v) or not self.whole] or [self.x0]
        for value in marks:
            out.append(
                f'<text class="t" x="{self.x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{number(value)}</text>'
            )
        return "".join(out)

    def open_tag(self, label: str, plot: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label, quote=True)}"'
            f' data-plot="{escape(plot, quote=True)}">'
        )


def _plot_data(
    frame: _Frame, steps: Sequence[float], named: Sequence[tuple[str, Sequence[float]]], x_name: str = "step"
) -> str:
    """Return the data with which the page's script shows values at the pointer, as JSON (null = not finite)."""

    def rounded(values: Sequence[float]) -> list[float | None]:
        return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]

    data = {
        "width": frame.width,
        "left": _LEFT,
        "span": frame.span,
        "x0": frame.x0,
        "x1": frame.x1,
        "xName": x_name,
        "x": list(steps),
        "y": [{"name": name, "v": rounded(values)} for name, values in named],
    }
    return json.dumps(data, separators=(",", ":"))


def _swatch(index: int, filled: bool = False) -> str:
    if filled:
        return (
            f'<svg viewBox="0 0 22 10" aria-hidden="true"><rect class="f{index}" x="4" width="14" height="10"/></svg>'
        )
    return f'<svg viewBox="0 0 22 10" aria-hidden="true"><path class="l{index}" d="M2 5H20"/></svg>'


def _legend(entries: Sequence[tuple[str, str]], filled: bool = False) -> str:
    items = "".join(
        f"<li>{_swatch(i, filled)}{escape(name)} <b>{escape(value)}</b></li>"
        for i, (name, value) in enumerate(entries, 1)
    )
    return f'<ul class="legend">{items}</ul>'


def curve_svg(
    series: Sequence[Series],
    label: str,
    *,
    y_range: tuple[float, float] | None = None,
    include: Sequence[float] = (),
    warn: Sequence[tuple[float, str]] = (),
    smoothed: bool = True,
    x_name: str = "step",
    width: int = 360,
    height: int = 190,
) -> tuple[str, str]:
    """Return a chart of smoothed curves over faint raw ones, with warning lines, and a remark on values outside of it.

    `y_range` fixes the vertical axis. Without it, the axis covers the values and `include`. `x_name` names the places
    on the horizontal axis at the pointer.
    """
    low, high, remark = value_range(series, include)
    # Spikes outside of the chart must not affect the smoothed curve.
    calm = series if not remark else [_clamped(s, low, high) for s in series]
    if y_range is not None:
        calm, (low, high), remark = series, y_range, ""
    steps = sorted({step for s in series for step in s.steps})
    whole = all(isinstance(step, int) for step in steps)
    frame = _Frame(width, height, steps[0], steps[-1], low, high, whole)
    body = [frame.axes()]
    for value, text in warn:
        y = frame.y(value)
        body.append(f'<path class="w" d="M{_LEFT} {y:.1f}H{width - _RIGHT}"/>')
        edge = y - 4 if y > 26 else y + 12
        body.append(f'<text class="wt" x="{width - _RIGHT - 3}" y="{edge:.1f}" text-anchor="end">{escape(text)}</text>')
    faint, lines = [], []
    for i, (s, quiet) in enumerate(zip(series, calm, strict=True), 1):
        soft = smooth(quiet.values) if smoothed else list(quiet.values)
        if soft != list(quiet.values):
            xs, ys = thin(s.steps, s.values, MAX_POINTS)
            faint.append(f'<path class="r{i}" d="{_path([frame.x(v) for v in xs], [frame.y(v) for v in ys])}"/>')
        xs, ys = thin(s.steps, soft, MAX_SMOOTH_POINTS)
        lines.append(f'<path class="l{i}" d="{_path([frame.x(v) for v in xs], [frame.y(v) for v in ys])}"/>')
    cursor = f'<line class="cursor" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
    stride = math.ceil(len(steps) / MAX_POINTS)
    shown = steps[::stride]
    table = [dict(zip(s.steps, s.values, strict=True)) for s in series]
    named = [(s.name, [t.get(step, math.nan) for step in shown]) for s, t in zip(series, table, strict=True)]
    svg = (
        frame.open_tag(label, _plot_data(frame, shown, named, x_name))
        + "".join([*body, *faint, *lines, cursor])
        + "</svg>"
    )
    return svg, remark


def _clamped(series: Series, low: float, high: float) -> Series:
    return replace(series, values=tuple(min(max(v, low), high) if math.isfinite(v) else v for v in series.values))


def last_smoothed(series: Series) -> float:
    """Return the last finite value of the smoothed curve, with isolated spikes clamped as in the chart."""
    low, high, remark = value_range([series])
    finite = [v for v in smooth((_clamped(series, low, high) if remark else series).values) if math.isfinite(v)]
    return finite[-1] if finite else math.nan


def curve_chart(
    title: str,
    hint: str,
    series: Sequence[Series],
    *,
    y_range: tuple[float, float] | None = None,
    include: Sequence[float] = (),
    warn: Sequence[tuple[float, str]] = (),
    smoothed: bool = True,
    x_name: str = "step",
    legend_at: float | None = None,
) -> str:
    """Return a card with curves. If smoothed values are beyond a warning line, the card also has a warning text.

    The legend shows the last value of each curve, or, without smoothing, its value at `legend_at`.
    """
    series = list(series)[:SERIES_COLORS]
    svg, remark = curve_svg(
        series, _summary(title, series), y_range=y_range, include=include, warn=warn, smoothed=smoothed, x_name=x_name
    )
    places = [-1 if legend_at is None else s.steps.index(legend_at) for s in series]
    entries = [
        (s.name, number(last_smoothed(s) if smoothed else s.values[at])) for s, at in zip(series, places, strict=True)
    ]
    lost = sum(not math.isfinite(v) for s in series for v in s.values)
    if lost:
        remark += f"{'; ' if remark else ''}{lost} value{'s were' if lost > 1 else ' was'} not finite"
    alarms = []
    for value, _ in warn:
        for s in series:
            curve = smooth(s.values)
            beyond = sum((v > value) if value > 0 else (v < value) for v in curve)
            if beyond:
                side = "above" if value > 0 else "below"
                alarms.append(f"{s.name} is {side} {number(value)} on {beyond} of {len(curve)} steps (smoothed)")
    return (
        f'<figure class="card"><figcaption>{escape(title)}<span>{escape(hint)}</span></figcaption>'
        f"{_legend(entries)}{svg}"
        + "".join(f'<p class="warn">Warning: {escape(a)}</p>' for a in alarms)
        + (f'<p class="hint">{escape(remark)}</p>' if remark else "")
        + "</figure>"
    )


def _summary(title: str, series: Sequence[Series]) -> str:
    """Return the text of the chart for screen readers."""
    sentences = []
    for s in series:
        finite = [v for v in s.values if math.isfinite(v)]
        if finite:
            sentences.append(
                f"{s.name}: first {number(finite[0])}, last {number(finite[-1])}, "
                f"lowest {number(min(finite))}, highest {number(max(finite))}"
            )
    return f"{title}. " + "; ".join(sentences)


def stacked_chart(title: str, hint: str, series: Sequence[Series], *, width: int = 360, height: int = 190) -> str:
    """Return a card with stacked bars (means over several steps if there are many) and the share of each series."""
    series = list(series)[:SERIES_COLORS]
    steps = sorted({step for s in series for step in s.steps})
    size = math.ceil(len(steps) / MAX_BARS)
    tables = [dict(zip(s.steps, s.values, strict=True)) for s in series]
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]

    def mean(table: dict[int, float], group: Sequence[int]) -> float:
        values = [table.get(step, 0.0) for step in group]
        return sum(v for v in values if math.isfinite(v)) / len(group)

    bars = [[max(mean(table, group), 0.0) for group in groups] for table in tables]
    tops = [sum(bar[j] for bar in bars) for j in range(len(groups))]
    highest = max(tops) or 1.0
    frame = _Frame(width, height, steps[0] - 0.5, steps[-1] + 0.5, 0.0, highest * 1.05)
    base = [0.0] * len(groups)
    body = [frame.axes()]
    for i, bar in enumerate(bars, 1):
        path = []
        for j, group in enumerate(groups):
            left, right = frame.x(group[0] - 0.5), frame.x(group[-1] + 0.5)
            low, high = frame.y(base[j]), frame.y(base[j] + bar[j])
            if low - high > 0.05:
                path.append(f"M{left:.1f} {low:.1f}V{high:.1f}H{right:.1f}V{low:.1f}Z")
            base[j] += bar[j]
        body.append(f'<path class="f{i}" style="stroke:none" d="{"".join(path)}"/>')
    body.append(f'<line class="cursor" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    whole = sum(tops) or 1.0
    entries = [(s.name, f"{100 * sum(bar) / whole:.0f}%") for s, bar in zip(series, bars, strict=True)]
    plot = _plot_data(frame, [g[len(g) // 2] for g in groups], [(s.name, b) for s, b in zip(series, bars, strict=True)])
    label = f"{title}. " + "; ".join(f"{name}: {share}" for name, share in entries)
    return (
        f'<figure class="card"><figcaption>{escape(title)}<span>{escape(hint)}</span></figcaption>'
        f"{_legend(entries, filled=True)}{frame.open_tag(label, plot)}{''.join(body)}</svg></figure>"
    )
