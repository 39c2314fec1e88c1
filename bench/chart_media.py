"""Table of the media path from the JSON lines in a folder, with every goal and its verdict.

    python -m bench.chart_media --table [--results bench/results]      # Markdown on the terminal

Nothing is in it that is not in the records.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from bench.records import ROOT, sources
from bench.video_goals import CUDA_GOALS, GOALS, load, verdicts

TITLES = {
    "decode": "A file's chosen frames",
    "preprocess": "720p frames to patches",
    "file": "File to patches",
    "ahead": "What a step waits for its data",
    "epochs": "Data of an epoch",
    "flat": "Many videos through one reader",
    "cuda": "File to patches on CUDA",
}


def part_table(part: str, records: list[dict]) -> list[str]:
    """Lines of the table of one part; records of that part, at least one."""
    if part == "ahead":
        return _ahead_table(records)
    if part == "epochs":
        return _epochs_table(records)
    if part == "flat":
        return _flat_table(records)
    lines = _head("case", "variant", "CPU s", "p20..p80", "wall s", "/ ours", "MiB beside output", "difference", "n")
    for record in records:
        base = record["variants"]["ours"]["cpu_s"]["median"]
        for name, own in record["variants"].items():
            lines.append(
                _line(
                    _case(record),
                    name,
                    f"{own['cpu_s']['median']:.3f}",
                    f"{own['cpu_s']['p20']:.3f}..{own['cpu_s']['p80']:.3f}",
                    f"{own['wall_s']['median']:.3f}",
                    f"{own['cpu_s']['median'] / base:.2f}",
                    f"{own['beyond_output_mib']:,.1f}" if "beyond_output_mib" in own else "-",
                    _difference(record["differences"].get(name)),
                    str(own["rounds"]),
                )
            )
    return lines


def _ahead_table(records: list[dict]) -> list[str]:
    lines = _head("case", "variant", "first step", "epoch 1", "epoch 2", "step's own work", "n")
    for record in records:
        for name, own in record["variants"].items():
            keys = ("first_wait_s", "epoch_1_wait_s", "epoch_2_wait_s", "compute_s")
            seconds = [f"{own[key]['median']:.3f} s" for key in keys]
            lines.append(_line(_case(record), name, *seconds, str(own["rounds"])))
    return lines


def _epochs_table(records: list[dict]) -> list[str]:
    lines = _head("case", "variant", "epoch 1", "epoch 2", "times faster", "n")
    for record in records:
        for name, own in record["variants"].items():
            one, two = (own[f"epoch_{number}_s"]["median"] for number in (1, 2))
            cells = (f"{one:.3f} s", f"{two:.3f} s", f"{one / two:.1f}", str(own["rounds"]))
            lines.append(_line(_case(record), name, *cells))
    return lines


def _flat_table(records: list[dict]) -> list[str]:
    lines = _head("videos", "process MiB", "workers MiB", "descriptors", "processes")
    for record in records:
        (own,) = record["variants"].values()
        for mark in own["marks"]:
            sizes = [f"{mark[key]:.0f}" for key in ("own_mib", "workers_mib", "descriptors", "processes")]
            lines.append(_line(str(mark["videos"]), *sizes))
    return lines


def _difference(own: dict | None) -> str:
    if own is None:
        return "-"
    if "worst_frame" in own:
        return f"mean {own['mean']:.2f}, worst frame {own['worst_frame']:.2f} levels"
    return f"{own['levels']} levels, {own['values']:.1e}"


def _case(record: dict) -> str:
    return ", ".join(f"{value} {key}" if key != "GOP" else f"GOP {value}" for key, value in record["shape"].items())


def _head(*cells: str) -> list[str]:
    return [_line(*cells), _line(*["---"] * len(cells))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(records: list[dict]) -> str:
    """A table for each part, those that did not run, the goals, and what the numbers are."""
    if not records:
        raise ValueError("records: expected at least one; run pytest bench/bench_video.py --record bench/results first")
    lines: list[str] = []
    for part, title in TITLES.items():
        own = [record for record in records if record["part"] == part]
        if own:
            lines += [f"**{title}**", "", *part_table(part, own), ""]
    missing = sorted({(name, why) for record in records for name, why in record["not_run"].items()})
    lines += [f"- {name}: not run: {why}" for name, why in missing] + [""] * bool(missing)
    lines += ["**Goals**", "", *_head("verdict", "case", "found")]
    on_cuda = any(record["device"] == "cuda" for record in records)
    found = list(verdicts(records, GOALS + CUDA_GOALS if on_cuda else GOALS))
    lines += [_line(*verdict) for verdict in found]
    counts = Counter(status for status, _, _ in found)
    lines += ["", ", ".join(f"{count} {status}" for status, count in counts.items()) + "."]
    if not on_cuda:
        names = ", ".join(name for name, _ in CUDA_GOALS)
        lines[-1] += f" Prepared, and not measured without a CUDA device: {names}."
    libraries = sorted({text for record in records for text in record["libraries"].values() if text})
    legend = (
        "CPU s: of all threads and processes, one thread where a library lets itself be told so; medians over n rounds "
        "in turned order, each variant in a process of its own that has its imports done. MiB beside output: peak of a "
        "call in all its processes, less the frames or patches that it returns. Difference: of decoders, the mean over "
        "a frame against ours in levels of 256; of patches, the largest against ours before and after normalisation. "
    )
    return "\n".join([*lines, "", f"{legend}{sources(records)}; {'; '.join(libraries)}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    parser.add_argument("--quick", action="store_true", help="the records of --quick")
    parser.add_argument("--table", action="store_true", help="print the Markdown table (there is no drawing)")
    given = parser.parse_args()
    print(markdown(load(given.results, given.hardware, quick=given.quick)), end="")


if __name__ == "__main__":
    main()
