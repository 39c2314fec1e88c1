"""Records of benchmarks' annotations, and functions that write and load them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from rmsd_fast.data.benchmarks import load_benchmark
from rmsd_fast.data.records import Question

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
OPTIONS = ["A. Apples.", "B. Candles.", "C. Berries.", "D. All."]


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as pandas writes TSV: lists as Python writes them, missing values as empty cells."""
    lines = ["\t".join(rows[0])]
    for row in rows:
        cells = ["" if value is None else str(value) for value in row.values()]
        lines.append("\t".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    return path


def load(name: str, path: Path, **kwargs) -> list[Question]:
    return load_benchmark(name, path, check_count=False, **kwargs)


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def videomme_rows() -> list[dict]:
    base = {
        "domain": "Knowledge",
        "sub_category": "Geography",
        "url": "https://example.com",
        "task_type": "OCR Problems",
    }
    return [
        base
        | {
            "video_id": f"00{number}",
            "duration": duration,
            "videoID": f"clip{number}",
            "question_id": f"00{number}-1",
            "question": "Which decoration is most frequent?",
            "options": OPTIONS,
            "answer": letter,
        }
        for number, (duration, letter) in enumerate([("short", "C"), ("medium", "A"), ("long", "D")], start=1)
    ]


def vstar_record(**changes) -> dict:
    boxes = [
        {"timestamp": t, "frame_index": 25 * t, "xmin": 128, "ymin": 72, "xmax": 640, "ymax": 360} for t in (4, 5, 6)
    ]
    record = {"vid": "v1", "domain": "Sports", "fps": 25.0, "width": 1280, "height": 720, "frame_count": 751}
    record |= {"question": "What does he hold?", "chain": "<think>x<think>", "object": "cup", "answer": "A red cup"}
    record |= {"temporal_question": "When does he hold it?", "timestamps": [3.2, 6.9], "bboxes": boxes}
    record |= {"spatial_question": "Where is the cup?", "spatial_question_2": "Where is it?"}
    return record | changes


ASKED = {"question": "Which?", "answer": "B", "candidates": ["A. x", "B. y"]}
ROWS = {
    "videomme": videomme_rows()[0],
    "worldsense": ASKED | {"video": "a", "video_path": "a.mp4", "task_type": "x", "audio_class": ["x"]},
    "longvideobench": {
        "id": "a",
        "question": "Which?",
        "video_path": "v.mp4",
        "correct_choice": 1,
        "duration_group": 60,
    }
    | {"option0": "x", "option1": "y"},
    "mlvu": {"video_name": "a.mp4", "question": "Which?\n(A) x\n(B) y", "answer": "B", "task_type": "count"},
    "videommmu": {
        "id": "dev_Art_1",
        "question": "Which?",
        "options": ["x", "y"],
        "answer": "B",
        "category": "Perception",
    },
    "mathvista": {
        "pid": "1",
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": "y",
        "question_type": "multi_choice",
    }
    | {"answer_type": "text", "query": "Which?", "image": "i.png", "metadata": {"task": "x", "skills": ["a"]}},
    "mathverse": {
        "sample_index": "1",
        "problem_index": 3,
        "problem_version": "Text Lite",
        "question": "x?",
        "answer": "B",
        "image": "i.png",
    }
    | {"question_type": "multi-choice", "query_wo": "P", "metadata": {"subject": "x"}},
    "vstar": vstar_record(),
}
