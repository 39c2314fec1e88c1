"""Chart and table of shared prefixes from the JSON lines in a folder: cost against K, and measured against predicted.

    python -m bench.chart_sharing [--results bench/results] [--output bench/results/shared-prefix.svg]
    python -m bench.chart_sharing --table      # Markdown on the terminal

The chart: time of a whole stage-2 step over K, that of ours at K=1, N=8 set to 1, a panel per case. Nothing is drawn
that is not in the records.
"""

from __future__ import annotations

import argparse
import re
from html import escape
from pathlib import Path

from bench.measure import main_time
from bench.records import ROOT, load, sources
from rmsd_fast.report_page.style import svg_style
from rmsd_fast.report_page.svg import number, ticks

WAYS = {"shared": "ours: prompt once", "padded": "padded, video once", "copies": "a copy per response"}
ONE = "shared K=1 N=8"
_PANEL, _HEIGHT, _LEFT, _TOP, _GAP = 380, 230, 60, 96, 60


def points(record: dict, way: str) -> list[tuple[int, float]]:
    """(K, time over ours at K=1) of a way at N=8."""
    base = main_time(record["variants"][ONE])
    found = []
    for name, own in record["variants"].items():
        matched = re.fullmatch(rf"{way} K=(\d+) N=8", name)
        if matched:
            found.append((int(matched[1]), main_time(own) / base))
    return sorted(found)


def draw(records: list[dict]) -> str:
    """SVG text; records of the bench `step`, at least one."""
    if not records:
        raise ValueError("records: expected at least one of bench_step; run pytest bench/bench_step.py --record first")
    most = max(times for record in records for way in WAYS for _, times in points(record, way)) * 1.08
    width = _LEFT + len(records) * (_PANEL + _GAP)
    height = _TOP + _HEIGHT + 50
    body = [
        f'<rect class="board" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        '<text class="th" x="18" y="30">A whole stage-2 step against K, N = 8 rollouts; ours at K = 1 is 1</text>',
        f'<text class="t" x="18" y="48">{escape(sources(records))}; medians, lower is better</text>',
    ]
    body += [_legend(index, text) for index, text in enumerate(WAYS.values())]
    body += [_panel(record, _LEFT + index * (_PANEL + _GAP), most) for index, record in enumerate(records)]
    label = "; ".join(f"{record['case']}: " + _sentence(record) for record in records)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}"><style>{svg_style()}</style>{"".join(body)}</svg>\n'
    )


def _legend(index: int, text: str) -> str:
    x = 18 + index * 190
    return f'<path class="l{index + 1}" d="M{x} 64h24"/><text class="t" x="{x + 30}" y="68">{escape(text)}</text>'


def _panel(record: dict, x: float, most: float) -> str:
    shape = record["shape"]
    out = [f'<text class="tb" x="{x}" y="{_TOP - 8}">prompt {shape["P"]} tokens, responses {shape["R"]}</text>']

    def at(k: int, times: float) -> tuple[float, float]:
        return x + (k - 1) / 7 * (_PANEL - 40), _TOP + _HEIGHT * (1 - times / most)

    for value in ticks(0.0, most):
        _, y = at(1, value)
        out.append(f'<path class="g" d="M{x} {y:.1f}h{_PANEL}"/>')
        out.append(f'<text class="t" x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for k in (1, 2, 4, 8):
        out.append(f'<text class="t" x="{at(k, 0)[0]:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">K={k}</text>')
    for index, way in enumerate(WAYS, 1):
        places = [at(k, times) for k, times in points(record, way)]
        if len(places) > 1:
            out.append(f'<path class="l{index}" d="M' + "L".join(f"{px:.1f} {py:.1f}" for px, py in places) + '"/>')
        for (px, py), (_, times) in zip(places, points(record, way), strict=True):
            out.append(f'<circle class="f{index}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>')
            out.append(f'<text class="t" x="{px + 6:.1f}" y="{py - 6:.1f}">{times:.2f}</text>')
    return "".join(out)


def _sentence(record: dict) -> str:
    parts = [
        f"{text} " + ", ".join(f"{times:.2f} at K={k}" for k, times in points(record, way))
        for way, text in WAYS.items()
    ]
    return "; ".join(parts)


def markdown(steps: list[dict], passes: list[dict]) -> str:
    """Whole steps by phase, then single passes, each measured against predicted."""
    lines = [
        _line("prompt, response", "variant", "step", *_PHASES, "training", "predicted", "peak MiB"),
        _line(*["---"] * (6 + len(_PHASES))),
    ]
    for record in steps:
        base = record["variants"][ONE]
        for name, own in record["variants"].items():
            phases = [f"{own['phases_s'].get(phase, 0.0) / (main_time(base) / 1e3):.2f}" for phase in _PHASES]
            lines.append(
                _line(
                    f"{record['shape']['P']}, {record['shape']['R']}",
                    name,
                    f"{main_time(own) / main_time(base):.2f}",
                    *phases,
                    f"{own['training']['median_ms'] / base['training']['median_ms']:.2f}",
                    f"{own['predicted_s'] / base['predicted_s']:.2f}",
                    f"{own['peak_mib']:,.0f}" if "peak_mib" in own else "-",
                )
            )
    lines += [
        "",
        _line("prompt, response", "variant", "time", "predicted", "peak MiB beyond gradients", "rounds"),
        _line(*["---"] * 6),
    ]
    for record in passes:
        base = record["variants"][record["baseline"]]
        for name, own in record["variants"].items():
            memory = own.get("peak_beyond_gradients_mib")
            lines.append(
                _line(
                    f"{record['shape']['P']}, {record['shape']['R']}",
                    name,
                    f"{main_time(own) / main_time(base):.2f}",
                    f"{own['predicted_s'] / base['predicted_s']:.2f}",
                    "-" if memory is None else f"{memory:,.0f}",
                    str(own["rounds"]),
                )
            )
    legend = (
        f"First table: whole stage-2 steps; step and phases over the step of `{ONE}`, training (vision, discriminator, "
        f"reference, policy) and its prediction over those of `{ONE}`. Second: one forward and backward of the policy "
        "on one group; time and prediction over `shared M=12`. Predicted: counted FLOPs at the rates of matrix "
        "products and of attention measured in the same process. Medians. "
    )
    return "\n".join([*lines, "", f"{legend}{sources(steps + passes)}."]) + "\n"


_PHASES = ("vision", "rollout", "discriminator", "reference", "policy", "optimizer")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "shared-prefix.svg")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    parser.add_argument("--table", action="store_true", help="print the Markdown table instead of drawing")
    given = parser.parse_args()
    records = load(given.results, given.device, given.hardware)
    steps = [record for record in records if record["bench"] == "step"]
    if given.table:
        print(markdown(steps, [record for record in records if record["bench"] == "shared_prefix"]), end="")
        return
    # Those measured over K.
    given.output.write_text(draw([record for record in steps if len(points(record, "copies")) > 1]))
    print(given.output)


if __name__ == "__main__":
    main()
