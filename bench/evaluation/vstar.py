"""Score the same predictions with V-STaR's published script and with the evaluation's own functions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from bench.core.report import table
from rmsd_fast.data.benchmarks.aggregates import aggregate
from rmsd_fast.data.benchmarks.load import load_benchmark
from rmsd_fast.data.benchmarks.vstar import ASKS
from rmsd_fast.data.records import Question
from rmsd_fast.method.lenient import lenient_response
from rmsd_fast.method.quality import quality_score

# The file that the script reads, in the working directory.
PREDICTIONS = "results/qwen2_5/qwen2-5-32B_answer_update.json"
RECORDS = 500
# Names of the predictions and of the item scores in the script, by ask.
FIELDS = {
    "when1": "answer_temporal",
    "when2": "answer_temporal_2",
    "where1": "answer_spatial",
    "where2": "answer_spatial_2",
}
SCORES = {"when1": "temporal_IoU", "when2": "temporal_IoU_2", "where1": "spatial_mIoU", "where2": "spatial_mIoU_2"}


class _Judge(dict):
    """Stand in for the script's language model and tokenizer, and reply with known grades."""

    device = None
    input_ids = ()

    def __init__(self, grades: Iterator[int]) -> None:
        self.grades = grades

    def from_pretrained(self, *args: object, **kwargs: object) -> _Judge:
        return self

    __call__ = to = from_pretrained

    def apply_chat_template(self, *args: object, **kwargs: object) -> str:
        return ""

    def generate(self, **kwargs: object) -> tuple:
        return ()

    def batch_decode(self, *args: object, **kwargs: object) -> list[str]:
        return [str(next(self.grades))]


def made_records(count: int, seed: int) -> list[dict]:
    """Return records in the format of the annotation, with random predictions and a grade, as the script reads them."""
    rng = random.Random(seed)
    records = []
    for index in range(count):
        width, height = rng.choice([(1280, 720), (640, 360), (854, 480)])
        start = round(rng.uniform(2, 60), 1)
        end = round(start + rng.uniform(1.5, 12), 1)
        seconds = range(int(start) + 1, int(end) + 1)
        boxes = [{"timestamp": second, **_box(rng, width, height)} for second in seconds]
        record = {"vid": f"v{index}", "domain": "Sports", "fps": 25.0, "width": width, "height": height}
        record |= {"frame_count": rng.randint(2000, 6000), "question": "What is it?", "answer": "A cup"}
        record |= {"temporal_question": "When?", "timestamps": [start, end], "bboxes": boxes}
        record |= {"spatial_question": "Where is it?", "spatial_question_2": "Where?", "answer_vqa": "a cup"}
        for ask, name in FIELDS.items():
            if rng.random() < 0.1:
                record[name] = None
            elif ask.startswith("when"):
                record[name] = sorted(round(time + rng.gauss(0, 3), 1) % 90 for time in (start, end))
            else:
                predicted = (box for box in boxes if rng.random() < 0.8)
                record[name] = {str(box["timestamp"]): _near(rng, box) for box in predicted} or None
        records.append(record | {"grade": rng.randint(0, 3)})
    return records


def _box(rng: random.Random, width: int, height: int) -> dict:
    x, y = rng.uniform(0, width - 80), rng.uniform(0, height - 80)
    sides = (rng.uniform(20, width - x), rng.uniform(20, height - y))
    return {"xmin": round(x, 1), "ymin": round(y, 1), "xmax": round(x + sides[0], 1), "ymax": round(y + sides[1], 1)}


def _near(rng: random.Random, box: dict) -> list[float]:
    return [round(box[name] + rng.uniform(-40, 40), 1) for name in ("xmin", "ymin", "xmax", "ymax")]


def published_scores(folder: Path, records: list[dict]) -> tuple[list[dict], str]:
    """Run V-STaR's script on the records. Return its records with the scores of items, and what it prints."""
    script = folder.absolute() / "eval.py"
    if not script.is_file():
        raise SystemExit(
            f"--vstar: expected a folder with eval.py, got no file {script}; check out V-STaR-Bench/V-STaR"
        )
    judge = _Judge(iter([record["grade"] for record in records]))
    transformers = ModuleType("transformers")
    transformers.AutoModelForCausalLM = transformers.AutoTokenizer = judge
    bar = ModuleType("tqdm")
    bar.tqdm = lambda items, **kwargs: items
    before, printed = Path.cwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, PREDICTIONS)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(records))
        Path(place, "metrics").mkdir()
        try:
            os.chdir(place)
            with mock.patch.dict(sys.modules, transformers=transformers, tqdm=bar), contextlib.redirect_stdout(printed):
                runpy.run_path(str(script))
        finally:
            os.chdir(before)
        scored = json.loads(next(Path(place, "metrics").glob("*.json")).read_text())
    return scored, printed.getvalue()


def own_scores(records: list[dict]) -> list[tuple[Question, float]]:
    """Return the questions of the records as the evaluation reads them, and the scores of the predictions as texts."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "V_STaR_test.json")
        ours = {*FIELDS.values(), "answer_vqa", "grade"}
        path.write_text(json.dumps([{name: of[name] for name in of.keys() - ours} for of in records]))
        questions = load_benchmark("vstar", path, check_count=False)
    scores = []
    for number, question in enumerate(questions):
        ask, record = question.meta["groups"]["ask"], records[number // len(ASKS)]
        if ask == "what":
            scores.append((question, float(record["grade"] >= 2)))
            continue
        text = _text(record[FIELDS[ask]], (record["width"], record["height"]))
        read = lenient_response(text, question.task_type)
        scores.append((question, quality_score(read or text, question.task_type, question.answer)))
    return scores


def _text(prediction: list | dict | None, size: tuple[int, int]) -> str:
    """Return a prediction as the text of an answer, boxes from 0 to 1000."""
    if prediction is None:
        return "I cannot tell."
    if isinstance(prediction, list):
        return f"{prediction[0]} to {prediction[1]}"
    boxes = {
        second: [1000 * x / side for x, side in zip(box, size * 2, strict=True)] for second, box in prediction.items()
    }
    return json.dumps(boxes)


def compare_vstar(folder: Path, seed: int) -> str:
    """Return a table of the scores by the published script and by the evaluation."""
    records = made_records(RECORDS, seed)
    scored, printed = published_scores(folder, records)
    scores = own_scores(records)
    overall = printed.partition("Overall Statistics:")[2].partition("Video Length:")[0]
    numbers = {name: float(value) for name, value in re.findall(r"\b(mAM|mLGM|Accuracy): ?([\d.]+)", overall)}
    rows = []
    for ask, name in SCORES.items():
        ours = [score for question, score in scores if question.meta["groups"]["ask"] == ask]
        theirs = [item[name] for item in scored]
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        means = (f"{sum(of) / len(of):.6f}" for of in (theirs, ours))
        rows.append((f"{'tIoU' if ask.startswith('when') else 'vIoU'} of `{ask}`", *means, f"{largest:.1e}"))
    result = aggregate("vstar", [(question.meta["groups"], score) for question, score in scores])
    for name, key in (("Accuracy", "accuracy"), ("mAM", "mam"), ("mLGM", "mlgm")):
        rows.append((name, f"{numbers[name]:.4f}", f"{result[key]:.4f}", "4 decimals printed"))
    return f"{RECORDS} records with random predictions.\n\n" + table(
        ("score", "published script", "rmsd_fast", "largest difference of an item"), rows
    )
