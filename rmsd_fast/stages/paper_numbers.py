"""Scores that the paper reports, to show beside ours.

Source: R-MSD (arXiv 2603.11423), main table: students of 4B parameters, 64 frames, in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rmsd_fast.config import JUDGED
from rmsd_fast.data.benchmarks import published_counts
from rmsd_fast.data.errors import counted

# Title and scores of each benchmark, by the name in `meta.benchmark`.
PAPER: dict[str, tuple[str, dict[str, float]]] = {
    "videomme": ("VideoMME", {"Qwen3-VL-4B": 63.8, "SFT+RL, same budget": 64.0, "R-MSD": 65.3}),
    "videommmu": ("Video-MMMU", {"Qwen3-VL-4B": 55.4, "SFT+RL, same budget": 55.9, "R-MSD": 58.6}),
    "worldsense": ("WorldSense", {"Qwen3-VL-4B": 46.7, "SFT+RL, same budget": 46.3, "R-MSD": 49.2}),
    "longvideobench": ("LongVideoBench", {"Qwen3-VL-4B": 59.3, "SFT+RL, same budget": 57.2, "R-MSD": 58.8}),
    "mlvu": ("MLVU-MCQ", {"Qwen3-VL-4B": 72.4, "SFT+RL, same budget": 73.1, "R-MSD": 73.2}),
    "mathvista": ("MathVista", {"Qwen3-VL-4B": 69.5, "SFT+RL, same budget": 71.2, "R-MSD": 72.1}),
    "mathverse": ("MathVerse", {"Qwen3-VL-4B": 45.7, "SFT+RL, same budget": 46.8, "R-MSD": 49.3}),
    # Each text names tIoU (when) or IoU of boxes (where) of chain 1 and of chain 2, for the base model and R-MSD.
    "vstar": (
        "V-STaR",
        {
            "when, chain 1, Qwen3-VL-4B": 21.3,
            "when, chain 1, R-MSD": 25.2,
            "when, chain 2, Qwen3-VL-4B": 18.5,
            "when, chain 2, R-MSD": 23.4,
            "where, chain 1, Qwen3-VL-4B": 22.3,
            "where, chain 1, R-MSD": 24.8,
            "where, chain 2, Qwen3-VL-4B": 5.0,
            "where, chain 2, R-MSD": 7.0,
        },
    ),
}

# What of V-STaR the field scores with a language model. The paper's columns of V-STaR do not contain it.
_OF_PART = "what, and the means that contain it"


def scoring_mark(benchmark: str | None, reading: str, decided: Mapping[str, Any] | None) -> str:
    """Return who scored the answers of a benchmark, to stand beside its number; "" if rules do so in the field.

    Args:
        benchmark: name of the benchmark; None for other questions.
        reading: one of READINGS.
        decided: `decided` of the summary; None if an earlier version did not record it.
    """
    if benchmark not in JUDGED:
        return ""
    parts = [_OF_PART] if benchmark == "vstar" else []
    if decided:
        parts.append(f"{decided['rules_share']:.1%} of {counted(decided['answers'], 'answer')} decided by rules")
    if reading == "judged" and decided and decided.get("unclear"):
        parts.append(f"{counted(len(decided['unclear']), 'answer')} without a readable reply, counted as wrong")
    who = f"judged by {decided['model'] or 'rules'}" if reading == "judged" and decided else "rule-based"
    return f" ({who}{': ' if parts else ''}{'; '.join(parts)})"


def paper_lines(benchmark: str | None, numbers: Iterable[int], *, judged: bool = False) -> list[str]:
    """Return a line with the paper's scores of a benchmark, or nothing if the paper has none.

    Args:
        benchmark: name of the benchmark; None for other questions.
        numbers: number of questions of each student. If one is not the published one, the line says so instead.
        judged: whether a language model judged all students' answers. Otherwise, the line says if the paper's numbers
            are usually scored with one.
    """
    if benchmark not in PAPER:
        return []
    published = published_counts(benchmark)
    if other := [number for number in numbers if number not in published]:
        counts = " or ".join(f"{count:,}" for count in published)
        return [f"no comparison with the paper: {min(other):,} of {counts} questions"]
    title, scores = PAPER[benchmark]
    text = "; ".join(f"{name} {score:.1f}" for name, score in scores.items())
    how = (
        ", usually scored with a language model" if benchmark in JUDGED and benchmark != "vstar" and not judged else ""
    )
    return [f"the paper (arXiv 2603.11423) on {title}{how}, in percent: {text}"]
