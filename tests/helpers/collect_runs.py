"""Run the collector on small question files, for tests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from PIL import Image

from rmsd_fast import collect
from rmsd_fast.collect_run.config import CollectConfig, load_collection, teachers
from rmsd_fast.collect_run.loop import Collection
from rmsd_fast.collect_run.progress import Progress, run_with_signals
from rmsd_fast.collect_run.requests import Messages
from rmsd_fast.collect_run.store import PoolStore
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question, load_questions
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


class PlainBuilder:
    """Build messages without media, so that tests of the loop do not start decoders."""

    def messages(self, question: Question, *, hinted: bool = False) -> Messages:
        parts = [{"type": "text", "text": question_text(question) + (" HINT" if hinted else "")}]
        return Messages(json.dumps([{"role": "user", "content": parts}]).encode(), 50)


def collect_plainly(questions: list[Question], urls: list[str], out: Path, *overrides: str) -> Collection:
    """Collect with PlainBuilder, and return the collection. Errors of the collection are raised."""

    async def work(collection: Collection) -> Collection:
        await collection.run()
        return collection

    return _collect(questions, urls, out, overrides, work)


def collect_with_signals(questions: list[Question], url: str, out: Path, *overrides: str) -> int:
    """Collect with PlainBuilder until a signal, and return its number."""

    async def work(collection: Collection) -> int:
        return await run_with_signals(collection, Progress(collection, CollectConfig(), 4 * len(questions), 0))

    return _collect(questions, [url], out, overrides, work)


def _collect(questions, urls, out, overrides, work):
    named = [f"collect.endpoint={json.dumps(urls)}", "collect.model=[m]", "collect.timeout_s=60"]
    settings = load_collection("", [*named, *overrides])
    models = teachers(settings.collect)

    async def start(store: PoolStore):
        return await work(Collection(questions, settings, store, PlainBuilder(), models, "qwen3_vl"))

    with PoolStore(out, questions, settings, models, "qwen3_vl") as store:
        return asyncio.run(start(store))


def plain_questions(folder: Path, count: int, **fields) -> list[Question]:
    return load_questions(write_questions(folder, count, **fields))
