"""Draw the chart of a lab as SVG for light and dark pages: one dot per training run, mean and 95% interval per arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rmsd_fast.report_page.style import svg_style
from rmsd_fast.report_page.svg import number, ticks

_LEFT, _PANEL, _GAP, _RIGHT, _ROW, _TOP = 150, 290, 30, 20, 30, 92


def chart(result: dict, values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the SVG text.

    Args:
        result: content of `lab.json`.
        values: scores of the training runs by kind (`greedy`, `sampled`) and arm. Kinds without values get no panel.
    """
    kinds = [kind for kind, by_arm in values.items() if by_arm]
    arms = list(result["arms"])
    width = _LEFT + len(kinds) * (_PANEL + _GAP) - _GAP + _RIGHT
    bottom = _TOP + _ROW * len(arms)
    simulated = "simulated teacher; " if result["teacher_simulated"] else ""
    title = f"{Path(result['plan']).stem}: held-out score by arm"
    source = f"{simulated}dots: single training runs; diamonds and lines: means with 95% t intervals over runs"
    body = [
        f'<rect class="board" x="0.5" y="0.5" width="{width - 1}" height="{bottom + 33}" rx="10"/>',
        f'<text class="th" x="18" y="30">{escape(title)}</text><text class="t" x="18" y="50">{escape(source)}</text>',
    ]
    for row, name in enumerate(arms):
        y = _TOP + _ROW * (row + 0.5) + 4
        body.append(f'<text class="tb" x="{_LEFT - 12}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
    for column, kind in enumerate(kinds):
        left = _LEFT + column * (_PANEL + _GAP)
        body.append(f'<text class="tb" x="{left}" y="{_TOP - 12}">{kind}</text>')
        body.append(_panel(left, bottom, kind, arms, result["arms"], values[kind]))
    shown = [(name, kind) for name in arms for kind in kinds if kind in result["arms"][name]]
    summary = "; ".join(f"{name} {kind} {number(result['arms'][name][kind]['mean'])}" for name, kind in shown)
    label = escape(f"{title}: {summary}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 34}" role="img" '
        f'aria-label="{label}"><style>{svg_style()}</style>{"".join(body)}</svg>\n'
    )


def _panel(
    left: float, bottom: float, kind: str, arms: Sequence[str], means: dict, values: Mapping[str, Sequence[float]]
) -> str:
    shown = [value for by_seed in values.values() for value in by_seed]
    for name in values:
        shown += [bound for bound in (means[name][kind]["low"], means[name][kind]["high"]) if bound is not None]
    pad = 0.06 * (max(shown) - min(shown)) or 0.05
    # A t interval over a few runs may be much wider than the range of scores.
    low, high = max(min(shown) - pad, -0.02), min(max(shown) + pad, 1.02)

    def x(value: float) -> float:
        return left + min(max((value - low) / (high - low), 0.0), 1.0) * _PANEL

    out = []
    for tick in ticks(low, high):
        out.append(f'<path class="g" d="M{x(tick):.1f} {_TOP}V{bottom}"/>')
        out.append(f'<text class="t" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{number(tick)}</text>')
    for row, name in enumerate(arms):
        if name not in values:
            continue
        y, mean = _TOP + _ROW * (row + 0.5), means[name][kind]
        dots = [f'<circle class="f6" cx="{x(value):.1f}" cy="{y + 6:.1f}" r="3"/>' for value in values[name]]
        text = f"{name}: {number(mean['mean'])}"
        line = ""
        if mean["low"] is not None:
            text += f" [{number(mean['low'])}, {number(mean['high'])}]"
            line = f'<path class="i1" d="M{x(mean["low"]):.1f} {y - 4:.1f}H{x(mean["high"]):.1f}"/>'
        diamond = f'<path class="f1" d="M{x(mean["mean"]) - 5:.1f} {y - 4:.1f}l5 -5l5 5l-5 5Z"/>'
        out.append(f"<g><title>{escape(text)}</title>{''.join(dots)}{line}{diamond}</g>")
    return "".join(out)
