"""Run the collector on small question files, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from rmsd_fast import collect
from rmsd_fast.teacher.pool import TeacherResponse, load_pool

FAST = ["collect.timeout_s=5", "data.cache_mib=16", "data.decode_threads=1"]


def write_questions(folder: Path, count: int, **fields) -> Path:
    """Write mcq questions about one picture; the answer is always B. Return the path of the file."""
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "picture.png")
    record = {"images": ["picture.png"], "task_type": "mcq", "options": ["tea", "milk"], "answer": "B"} | fields
    lines = [json.dumps({"id": f"q{i}", "question": f"What is poured in {i}?"} | record) for i in range(count)]
    path = folder / "questions.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run(questions: Path, url: str, out: Path, *arguments: str, model: str = "m") -> int:
    """Run the collector in this process. Return its exit code."""
    return collect.main([str(questions), "--endpoint", url, "--model", model, "--out", str(out), *FAST, *arguments])


def answers(out: Path) -> dict[tuple[str, int], TeacherResponse]:
    """Return the answers of a pool by id and k."""
    return {(r.id, r.k): r for responses in load_pool(out).values() for r in responses}


def expected(count: int, k: int = 4) -> set[tuple[str, int]]:
    return {(f"q{i}", number) for i in range(count) for number in range(k)}
