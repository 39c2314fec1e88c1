"""Write a run folder like that of a training run for the tests of the report, and read its page."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

from rmsd_fast.config import RunConfig, TeacherConfig
from rmsd_fast.data.records import load_questions
from rmsd_fast.made.teacher import SimulatedTeacher, simulate_teacher
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES
from rmsd_fast.settings import to_yaml
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.scores import score_pool

VOID = {"meta", "br", "img", "input", "link", "hr"}
STUDENTS = ("untrained", "stage1", "stage2")
EVIL = '<script>alert("pwned")</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Check that tags are balanced, and collect tags with attributes, ids, and the text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"tags never closed: {self.stack}"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]} at {self.getpos()}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_nothing_is_fetched(text: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "audio", "video")
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not re.search(r"url\s*\(|@import", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def made_metrics(rng: random.Random, steps: dict[str, int]) -> list[dict]:
    """Return lines of metrics.jsonl like those of a run."""
    rows = []
    for step in range(1, steps.get("sft", 0) + 1):
        fall = math.exp(-step / (0.25 * steps["sft"]))
        work = {"tokens": rng.randint(1500, 1900), "lr": 2e-3 * min(step / 30, 1.0)}
        rows.append(
            {"stage": "sft", "step": step, "loss": 0.35 + 2.6 * fall + rng.gauss(0, 0.06), **work}
            | {"grad_norm": 0.8 + fall + abs(rng.gauss(0, 0.2)), "rate/tokens_per_s": rng.gauss(5600, 240)}
            | {"seconds/data": 0.02, "seconds/policy": 0.25 + rng.random() * 0.05, "seconds/optimizer": 0.02}
            | {"seconds/step": 0.32, "memory/peak_mib": 812.0, "samples/bad": 0, "samples/skipped_steps": 0}
        )
    for stage in ("warm_up", "distill"):
        for step in range(1, steps.get(stage, 0) + 1):
            rows.append({"stage": stage, "step": step, **made_discriminator_metrics(rng, stage, step)})
            if stage == "distill":
                rows[-1] |= made_policy_metrics(rng, step / steps[stage])
    return rows


def made_discriminator_metrics(rng: random.Random, stage: str, step: int) -> dict:
    accuracy = min(0.99, 0.5 + (0.012 * step if stage == "warm_up" else 0.32) + rng.gauss(0, 0.03))
    student = rng.gauss(-0.4, 0.1)
    return {
        "discriminator/loss": 0.6 - 0.3 * (accuracy - 0.5) + rng.gauss(0, 0.02),
        "discriminator/pair_accuracy": accuracy,
        "discriminator/margin": 2 * (accuracy - 0.5) + rng.gauss(0, 0.05),
        "discriminator/length_correlation": rng.gauss(0.12 if stage == "warm_up" else 0.36, 0.08),
        "discriminator/grad_norm": abs(rng.gauss(1.4, 0.4)),
        "discriminator/score_student": student,
        "discriminator/score_teacher": student + 2 * (accuracy - 0.5),
        "seconds/rollout": 1.6 + rng.random() * 0.4,
        "seconds/vision": 0.05,
        "seconds/matching": 0.004,
        "seconds/discriminator": 0.4,
        "seconds/step": 3.2,
        "tokens": 4200,
        "tokens_computed": 1750,
        "rate/tokens_per_s": rng.gauss(1300, 80),
        "rate/computed_tokens_per_s": rng.gauss(540, 40),
        "rate/shared_prefix_ratio": 2.4,
        "memory/peak_mib": 1204.0,
        "samples/bad": 2 if stage == "distill" and step > 30 else 0,
        "samples/skipped_steps": 0,
    }


def made_policy_metrics(rng: random.Random, share: float) -> dict:
    raw = {
        "discriminator": rng.gauss(-0.4, 0.1),
        "outer": min(1.0, 0.93 + 0.05 * share + rng.gauss(0, 0.01)),
        "task": min(1.0, 0.9 + 0.07 * share + rng.gauss(0, 0.015)),
        "content": min(1.0, 0.52 + 0.12 * share + rng.gauss(0, 0.05)),
    }
    rewards = {f"reward/{name}/raw": value for name, value in raw.items()}
    weights = {"discriminator": 0.4, "outer": 0.1, "task": 0.1, "content": 0.4}
    rewards |= {f"reward/{name}/weighted": weights[name] * value for name, value in raw.items()}
    return rewards | {
        "reward/total": sum(weights[name] * value for name, value in raw.items()),
        "policy/loss": rng.gauss(0.0, 0.02),
        "policy/kl": 0.012 * share + abs(rng.gauss(0, 0.002)),
        "policy/entropy": 0.9 - 0.2 * share + rng.gauss(0, 0.02),
        "policy/importance_ratio": rng.gauss(1.0, 0.001),
        "policy/engine_kl": rng.gauss(0.0, 0.001),
        # The page must mention this spike, and it must not flatten the curve.
        "policy/grad_norm": 60.0 if 0.5 < share <= 0.5085 else abs(rng.gauss(0.8, 0.2)),
        "policy/logp": rng.gauss(-0.8, 0.05),
        "advantage/zero_share": abs(rng.gauss(0.1, 0.03)),
        "teacher/quality": rng.gauss(0.71, 0.02),
        "teacher/valid_share": rng.gauss(0.97, 0.01),
        "teacher/kept_share": rng.gauss(0.72, 0.03),
        "teacher/empty_share": rng.choice([0.0, 0.0, 0.03]),
        "rollout/tokens_mean": 38 + 6 * share + rng.gauss(0, 1),
        "rollout/repeated_4grams": abs(rng.gauss(0.06, 0.02)),
        "rollout/length_ratio": rng.gauss(1.0, 0.03),
        "rollout/truncated_share": abs(rng.gauss(0.02, 0.01)),
        "rollout/valid_share": rng.gauss(0.95, 0.01),
        "rollout/banned_mass": abs(rng.gauss(0.001, 0.0005)),
        "seconds/reference": 0.3,
        "seconds/policy": 0.7,
        "seconds/optimizer": 0.05,
        "extra/of_a_later_version": rng.random(),
    }


def made_evaluation(students: tuple[str, ...] = STUDENTS, n: int = 75) -> dict:
    levels = {"untrained": 0.0, "stage1": 0.72, "stage2": 0.735}
    floors = {"mcq": 0.29, "temporal": 0.46, "spatial": 0.36, "numeric": 0.23, "ocr": 0.25, "open": 1.0}
    answers = {"mcq": "B", "temporal": "1.00 to 5.00", "spatial": "250,250,750,750", "numeric": "3", "ocr": "ABC"}
    shift = dict(zip(TASK_TYPES, (0.12, 0.08, 0.2, -0.05, -0.48, 0.2), strict=True))

    def entry(mean: float, count: int) -> dict:
        mean = min(max(mean, 0.0), 1.0)
        half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.01) / count)
        return {"mean": mean, "low": max(mean - half, 0), "high": min(mean + half, 1), "n": count, "valid_share": 0.97}

    def student(name: str) -> dict:
        level = levels[name]
        tasks = {task: entry(level + (shift[task] if level else 0.01), n) for task in TASK_TYPES}
        closed = sum(tasks[task]["mean"] for task in CLOSED_TASKS) / len(CLOSED_TASKS)
        return {"tasks": tasks, "closed": entry(closed, 5 * n), "all": entry(closed, 6 * n)}

    measured = {name: student(name) for name in students}

    def difference(after: str, before: str) -> dict:
        def pair(a: dict, b: dict) -> dict:
            mean = a["mean"] - b["mean"]
            return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04, "n": a["n"]}

        tasks = {t: pair(measured[after]["tasks"][t], measured[before]["tasks"][t]) for t in TASK_TYPES}
        return {"tasks": tasks, "closed": pair(measured[after]["closed"], measured[before]["closed"])}

    return {
        "questions": 6 * n,
        "teacher_simulated": True,
        "seed": 0,
        "floors": {t: {"score": floors[t], "answer": answers.get(t, "any text"), "n": n} for t in TASK_TYPES},
        "students": measured,
        "differences": {f"{b}-{a}": difference(b, a) for a, b in zip(students, students[1:], strict=False)},
    }


def made_run(folder: Path, material, *, steps: dict[str, int] | None = None) -> Path:
    """Write a complete run folder with generated clips, statistics of a simulated teacher, and noisy curves."""
    rng = random.Random(7)
    folder.mkdir(parents=True)
    config = RunConfig(name="quickstart")
    config.made.enabled = True
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = made_metrics(rng, steps or {"sft": 200, "warm_up": 20, "distill": 120})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps(made_evaluation()))
    train, heldout = load_questions(material.train), load_questions(material.heldout)
    responses = simulate_teacher(train, k=4, seed=0, teacher=SimulatedTeacher())
    pool: dict[str, list] = {}
    for response in responses:
        pool.setdefault(response.id, []).append(response)
    cfg = TeacherConfig(parse="strict")
    statistics = pool_statistics(score_pool(pool, train, cfg), train, cfg, simulated=True)
    (folder / "teacher.json").write_text(json.dumps(statistics))
    answers = {r.id: r.text for r in simulate_teacher(heldout, k=1, seed=3, teacher=SimulatedTeacher(error_rate=0.3))}
    lines = []
    for name in STUDENTS:
        for i, question in enumerate(heldout):
            text = answers[question.id] if name != "untrained" else "the the<answer> red red red"
            score = 0.0 if name == "untrained" else (1.0, 0.0, 0.62)[i % 3]
            lines.append(
                {"student": name, "id": question.id, "task_type": question.task_type, "question": question.question}
                | {"options": question.options, "answer": question.answer, "videos": list(question.videos)}
                | {"images": [], "response": text, "score": score, "valid": name != "untrained", "truncated": False}
            )
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "recipe": "quickstart",
        "started": "2026-01-01T12:00:00",
        "finished": "2026-01-01T12:05:42",
        "world_size": 2,
        "hardware": "CPU, 2 cores",
        "versions": {"rmsd_fast": "0.1.0", "torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(info))
    return folder
