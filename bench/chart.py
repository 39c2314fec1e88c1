"""Chart and table of the fused losses from the JSON lines in a folder: time against the bare GEMMs, and peak memory.

    python -m bench.chart [--results bench/results] [--output bench/results/fused-losses.svg]
    python -m bench.chart --table      # Markdown on the terminal, times as ratios alone

The chart shows of each loss and dtype the longest case with a trainable head, nothing masked and a random softmax,
forward and backward; the table all cases. Bars that would not fit are cut and carry their number. Nothing is drawn that
is not in the records.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from bench.measure import EAGER, GEMMS, OURS, main_time
from bench.records import ROOT, load, sources
from rmsd_fast.report_page.style import svg_style
from rmsd_fast.report_page.svg import number, ticks

# Benches that chart_sharing.py draws.
SHARING = ("shared_prefix", "step")
BENCHES = ("linear_cross_entropy", "linear_policy_loss", "linear_logprob")
_WIDTH, _LABEL, _BAR, _ROW, _GAP, _TOP = 880, 190, 300, 19, 46, 108
_RIGHT = _LABEL + _BAR + 60
# Times beyond this multiple of the bare GEMMs are cut.
_MOST_TIMES = 4.0


def chosen(records: list[dict], benches: tuple[str, ...] = BENCHES) -> list[dict]:
    """The longest plain case of each loss and dtype, in the order of `benches`."""
    plain = [
        r
        for r in records
        if r["bench"] in benches
        and not r["case"].endswith("-conditions")
        and (r["mask_percent"], r["softmax"], r["head"]) == (0, "random", "trainable")
    ]
    longest: dict[tuple, dict] = {}
    for record in sorted(plain, key=lambda r: (r["shape"]["D"], r["shape"]["T"])):
        longest[record["bench"], record["dtype"]] = record
    return sorted(longest.values(), key=lambda r: (benches.index(r["bench"]), r["dtype"]))


def draw(records: list[dict]) -> str:
    """SVG text; records as `chosen` gives them, at least one."""
    if not records:
        raise ValueError("records: expected at least one plain case of a linear loss; run pytest bench/ --record first")
    body, y = [], _TOP
    for record in records:
        body.append(_group(record, y))
        y += len(_bars(record)) * _ROW + _GAP
    height = y - 10
    head = [
        f'<rect class="board" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="10"/>',
        '<text class="th" x="18" y="30">Fused losses: forward and backward, V = 151,936</text>',
        f'<text class="t" x="18" y="48">{escape(sources(records))}</text>',
        '<text class="t" x="18" y="64">medians, lower is better; * one call without warm-up</text>',
        f'<text class="tb" x="{_LABEL}" y="88">time, bare GEMMs = 1</text>',
        f'<text class="tb" x="{_RIGHT}" y="88">peak memory beyond gradients, MiB</text>',
    ]
    label = "; ".join(_sentence(record) for record in records)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}"><style>{svg_style()}</style>{"".join(head)}{"".join(body)}</svg>\n'
    )


def _bars(record: dict) -> list[tuple[str, float, float | None]]:
    """(name, time / bare GEMMs, MiB), ours first, then by time; a star at the name where that is one cold call."""
    variants = record["variants"]
    base = main_time(variants[GEMMS])
    rows = [
        (name + " *" * own.get("memory_pass_only", False), main_time(own) / base, own.get("peak_beyond_gradients_mib"))
        for name, own in variants.items()
        if name != GEMMS
    ]
    return sorted(rows, key=lambda row: (row[0] != record["baseline"], row[1]))


def _group(record: dict, y: float) -> str:
    rows, shape = _bars(record), record["shape"]
    title = f"{record['bench']}, {record['dtype']}, T = {shape['T']}, D = {shape['D']}"
    most_times = min(_MOST_TIMES, max(times for _, times, _ in rows) * 1.1)
    most_mib = max((mib or 0.0 for _, _, mib in rows), default=0.0) * 1.1 or 1.0
    height = len(rows) * _ROW
    out = [f'<text class="tb" x="18" y="{y + 6:.1f}">{escape(title)}</text>']
    y += 14
    out += [_grid(_LABEL, y, height, most_times), _grid(_RIGHT, y, height, most_mib)]
    for index, (name, times, mib) in enumerate(rows):
        top, colour = y + index * _ROW, 1 if name == record["baseline"] else 6
        out.append(
            f'<text class="t" x="{_LABEL - 8}" y="{top + 13:.1f}" text-anchor="end">{escape(name)}</text>'
            + _bar(_LABEL, top, times / most_times, f"{times:.2f}" if times < 10 else f"{times:.0f}", colour)
        )
        if mib is not None:
            out.append(_bar(_RIGHT, top, mib / most_mib, number(mib), colour))
    # The GEMMs themselves, over the bars.
    out.append(f'<path class="fl" d="M{_LABEL + _BAR / most_times:.1f} {y}v{height}"/>')
    return "".join(out)


def _grid(x: float, y: float, height: float, most: float) -> str:
    """Vertical lines at round values."""
    out = []
    for value in ticks(0.0, most):
        at = x + value / most * _BAR
        out.append(f'<path class="g" d="M{at:.1f} {y}V{y + height:.1f}"/>')
        out.append(
            f'<text class="t" x="{at:.1f}" y="{y + height + 12:.1f}" text-anchor="middle">{number(value)}</text>'
        )
    return "".join(out)


def _bar(x: float, top: float, share: float, text: str, colour: int) -> str:
    """A bar of a share of the full length; beyond it, cut with an open end."""
    width = min(share, 1.0) * _BAR
    shape = f'<rect class="f{colour}" x="{x:.1f}" y="{top + 3:.1f}" width="{max(width, 1.0):.1f}" height="{_ROW - 6}"/>'
    if share > 1.0:
        shape += f'<path class="g" style="stroke-width:3" d="M{x + _BAR - 14:.1f} {top + _ROW - 1:.1f}l8 {2 - _ROW}"/>'
    return shape + f'<text class="t" x="{x + width + 5:.1f}" y="{top + 13:.1f}">{text}</text>'


def _sentence(record: dict) -> str:
    """What a reader who cannot see the bars is told."""
    parts = [f"{name} {times:.2f}" for name, times, _ in _bars(record)]
    return f"{record['bench']} {record['dtype']} T={record['shape']['T']}: time over bare GEMMs: " + ", ".join(parts)


_HEADINGS = (
    ("loss", "case", "GEMMs' rate", "eager", "fastest peer", "peak, ours / eager MiB", "beyond gradients", "rounds"),
    ("loss", "case", "50% masked", "90% masked", "peaked", "frozen head", "rounds"),
)


def markdown(records: list[dict]) -> str:
    """Two tables, all cases and ours by condition, and the line that says what the numbers are."""
    compared = [_compared(record) for record in records if not record["case"].endswith("-conditions")]
    conditions = [_conditions(record) for record in records if record["case"].endswith("-conditions")]
    lines = []
    for headings, rows in zip(_HEADINGS, (compared, conditions), strict=True):
        lines += [_line(headings), _line(["---"] * len(headings)), *map(_line, rows), ""]
    legend = (
        "GEMMs' rate: share of the rate of the bare matrix products in the same rounds (8TDV for divergences: the "
        "teacher has a head too). Eager and the fastest peer (torch.compile or a library; one cold call does not "
        "count): their time, ours = 1. Peak: memory that a call adds, then the same less the gradients that both "
        "sides produce. Conditions: time, without = 1. Rounds: of ours. Medians: forward and backward, or scoring. "
    )
    lines.append(f"{legend}{sources(records)}.")
    return "\n".join(lines) + "\n"


def _compared(record: dict) -> list[str]:
    variants = record["variants"]
    ours = variants[OURS]
    peers = {
        name: main_time(own) / main_time(ours)
        for name, own in variants.items()
        if name not in (GEMMS, EAGER) and not name.startswith(OURS) and not own.get("memory_pass_only")
    }
    fastest = min(peers, key=peers.get, default=None)
    eager = variants.get(EAGER)
    memory = [
        f"{ours[key]:,.0f} / {eager[key]:,.0f} ({ours[key] / max(eager[key], 1e-9):.2f})"
        if eager and key in ours and key in eager
        else "-"
        for key in ("peak_mib", "peak_beyond_gradients_mib")
    ]
    return [
        *_names(record),
        f"{ours['share_of_gemms']:.0%}" if "share_of_gemms" in ours else "-",
        f"{main_time(eager) / main_time(ours):.2f}" if eager else "-",
        f"{peers[fastest]:.2f} ({fastest})" if fastest else "-",
        *memory,
        str(ours["rounds"]),
    ]


def _conditions(record: dict) -> list[str]:
    variants = record["variants"]
    times = [f"{variants[name]['times_base']:.2f}" for name in _HEADINGS[1][2:-1]]
    return [*_names(record), *times, str(variants[OURS]["rounds"])]


def _names(record: dict) -> tuple[str, str]:
    """Loss and case in words; what is usual (nothing masked, random softmax, trainable head) is not said."""
    words = [record["dtype"], *(f"{axis} {size}" for axis, size in record["shape"].items() if axis != "V")]
    words += [f"{record['mask_percent']}% masked"] if record.get("mask_percent") else []
    words += [record["softmax"]] if record.get("softmax", "random") != "random" else []
    words += (
        [{"frozen": "frozen head", "score": "scoring"}[record["head"]]]
        if record.get("head", "trainable") != "trainable"
        else []
    )
    words += [record[key] for key in ("kind", "mode") if key in record]
    return record["bench"].removeprefix("linear_").replace("_", " "), ", ".join(words)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fused-losses.svg")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    parser.add_argument("--table", action="store_true", help="print the Markdown table instead of drawing")
    given = parser.parse_args()
    records = [r for r in load(given.results, given.device, given.hardware) if r["bench"] not in SHARING]
    if given.table:
        print(markdown(records), end="")
        return
    given.output.write_text(draw(chosen(records)))
    print(given.output)


if __name__ == "__main__":
    main()
