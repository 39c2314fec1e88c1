"""Test the comparison of agreement with the metric for simulated teachers, and that the manual has its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.teacher.agreement import COUNTS, HEAD, TASKS, compare, made_questions, markdown
from rmsd_fast.config import TEACHERS

ROOT = Path(__file__).resolve().parents[2]


def test_all_teachers_are_compared(tmp_path) -> None:
    questions = made_questions(tmp_path, 12)
    assert sorted(question.task_type for question in questions) == sorted(TASKS * 12)
    results = compare(questions)
    assert list(results) == list(TEACHERS)
    for by_count in results.values():
        assert [check["responses"] for check in by_count.values()] == list(COUNTS)
        assert all(set(check["tasks"]) == set(TASKS) for check in by_count.values())
    # Independent errors can be found by agreement, and errors that the answers share cannot.
    noisy, biased = (results[kind]["8"]["tasks"] for kind in ("noisy", "biased"))
    assert noisy["mcq"]["recovered"]["value"] > 0.6 and noisy["mcq"]["precision"]["value"] > 0.9
    assert biased["numeric"]["precision"]["value"] < 0.2
    lines = markdown(results).splitlines()
    assert len(lines) == 2 + len(TEACHERS) * len(TASKS) and all(line.count("|") == len(HEAD) + 1 for line in lines)


@pytest.mark.slow
def test_the_manual_has_the_numbers_of_300_clips(tmp_path) -> None:
    table = markdown(compare(made_questions(tmp_path, 300)))
    assert table in (ROOT / "docs" / "pool_report.md").read_text(), "run python -m bench.teacher.agreement"
