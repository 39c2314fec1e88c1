"""Test that a run reads all input files first and reports all their faults in a fixed order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from material import WORLD, tiny_settings

from rmsd_fast.config import DataConfig, EvaluateConfig, RunConfig, SettingsError, TeacherConfig
from rmsd_fast.data.errors import DataError
from rmsd_fast.made.labels import keep_labels
from rmsd_fast.made.meaning import meaning_score
from rmsd_fast.method.answers import CLOSED_TASKS, parse_answer
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.inputs import _describe_passes, read_inputs
from rmsd_fast.stages.material import prepare_material

GOOD = {"question": "What is poured?", "task_type": "mcq", "options": ["tea", "milk"], "answer": "B"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path / "train.jsonl", *(GOOD | {"id": f"q{i}", "videos": ["a.mp4"]} for i in range(4)))
    write(tmp_path / "heldout.jsonl", *(GOOD | {"id": f"h{i}", "videos": ["b.mp4"]} for i in range(4)))
    answer = "<think>White.</think><answer>B</answer>"
    write(tmp_path / "pool.jsonl", *({"id": f"q{i}", "k": 0, "text": answer, "model": "m"} for i in range(4)))
    return tmp_path


def write(path: Path, *records: dict) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(folder: Path, *roles: str, **data):
    roles = roles or ("heldout", "pool", "train")
    settings = RunConfig(data=DataConfig(**data), teacher=TeacherConfig(responses=1))
    return read_inputs(settings, {role: str(folder / f"{role}.jsonl") for role in roles}, dict.fromkeys(roles, ""))


def test_all_inputs_are_read_and_summarized(folder):
    inputs = read(folder)
    assert [q.id for q in inputs.train] == ["q0", "q1", "q2", "q3"] and len(inputs.heldout) == 4
    assert inputs.scores["q0"][0].quality == 1.0 and not inputs.simulated
    assert inputs.statistics["all"]["valid_share"] == 1.0 and inputs.statistics["teacher_simulated"] is False
    assert inputs.summary.lines[0] == "questions: 4 (mcq 4)" and inputs.summary.lines[1] == "held out: 4 (mcq 4)"
    # An evaluation reads only the held-out questions.
    alone = read(folder, "heldout")
    assert len(alone.heldout) == 4 and alone.train == [] and alone.statistics == {}


def test_held_out_questions_of_a_benchmark(folder):
    rows = [
        {"question_id": f"{n}", "videoID": "b", "question": "What?", "options": ["A. x", "B. y"], "answer": "B"}
        for n in range(4)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    files = {"heldout": str(folder / "rows.json")}
    settings = RunConfig(data=DataConfig(heldout=files["heldout"]), evaluate=EvaluateConfig(benchmark="videomme"))
    (first, *_) = read_inputs(settings, files, {"heldout": ""}).heldout
    assert first.videos == (str(folder / "b.mp4"),) and first.meta["benchmark"] == "videomme"
    settings.evaluate.max_questions = 2
    assert len(read_inputs(settings, files, {"heldout": ""}).heldout) == 2
    # Generated questions are not a benchmark.
    settings.data.heldout = ""
    with pytest.raises(SettingsError, match="evaluate.benchmark=videomme: expected data.heldout, the benchmark's"):
        read_inputs(settings, files, {"heldout": ""})


def test_faults_of_all_files_are_reported_at_once_in_order(folder):
    box = {"id": "b", "videos": ["a.mp4"], "question": "Where?", "task_type": "spatial"}
    write(folder / "train.jsonl", box | {"answer": [0, 0, 1920, 1080]}, box | {"id": "c", "answer": [0, 0, 0.5, 0.5]})
    write(folder / "heldout.jsonl", GOOD | {"id": "h", "videos": ["b.mp4"], "answer": "C"})
    write(folder / "pool.jsonl", {"id": "q0", "k": -1, "text": ""})
    with pytest.raises(DataError) as caught:
        read(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and lines[0].endswith("train.jsonl: 2 of 2 records cannot be used:")
    # Errors for ground truths that only the metric refused used to name no line, and only the first was reported.
    assert "train.jsonl:1: field 'answer': expected 'x1,y1,x2,y2'" in lines[1] and "1000 * pixels / width" in lines[1]
    assert "train.jsonl:2: field 'answer'" in lines[2] and "multiply them by 1000" in lines[2]
    assert "heldout.jsonl:1: field 'answer'" in lines[3] and "pool.jsonl:1: field 'k'" in lines[4]


def test_missing_media_and_a_pool_of_other_questions_are_reported_at_once(folder):
    (folder / "a.mp4").unlink()
    (folder / "b.mp4").unlink()
    write(folder / "pool.jsonl", {"id": "x", "k": 0, "text": "B"})
    with pytest.raises(DataError) as caught:
        read(folder)
    train, heldout, pool = str(caught.value).splitlines()
    assert "train.jsonl: 1 of 1 media files are missing, for 4 of 4 questions (first: " in train
    assert "heldout.jsonl: 1 of 1 media files are missing, for 4 of 4 questions" in heldout and "b.mp4" in heldout
    assert pool.startswith("teacher pool: expected responses to all questions, got them for 0 of 4")
    # Up to a limit, missing media are replaced in training and count as 0 in an evaluation.
    (folder / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"heldout\.jsonl: 1 of 1 media files are missing"):
        read(folder, "heldout")
    assert len(read(folder, "heldout", max_bad_share=1.0).heldout) == 4


def test_only_the_questions_that_are_evaluated_need_their_media(folder):
    last = GOOD | {"id": "h9", "videos": ["gone.mp4"]}
    with (folder / "heldout.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    files = {"heldout": str(folder / "heldout.jsonl")}
    settings = RunConfig(evaluate=EvaluateConfig(max_questions=4))
    assert len(read_inputs(settings, files, {"heldout": ""}).heldout) == 4
    with pytest.raises(DataError, match="for 1 of 5 questions"):
        read_inputs(RunConfig(), files, {"heldout": ""})


def test_a_pool_with_few_usable_answers_stops_a_run_with_a_table(folder):
    refusal = "I'm sorry, I can't view videos."
    write(folder / "pool.jsonl", *({"id": f"q{i}", "k": 0, "text": refusal} for i in range(4)))
    with pytest.raises(DataError) as caught:
        read(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "teacher pool: 0.0% of 4 answers are valid, and 0.0% of the questions have one of quality above 0: expected "
        "most in both cases. Reasons: refusal 4"
    )
    check = f"python -m rmsd_fast.pool check {folder / 'pool.jsonl'} {folder / 'train.jsonl'}"
    assert lines[-1] == f"  examples of invalid answers: {check}"
    assert any(line.startswith("  mcq           4        4   0.0%") for line in lines)


def test_a_task_type_that_no_record_asks_for_is_refused(folder):
    with pytest.raises(SettingsError, match=r"data\.task_type=ocr has no effect: .*train\.jsonl and .*heldout\.jsonl"):
        read(folder, task_type="ocr")
    turns = [{"from": "human", "value": "What is written?"}, {"from": "gpt", "value": "EXIT"}]
    write(folder / "heldout.jsonl", {"id": "h", "video": "b.mp4", "conversations": turns})
    # Only one of the files needs the task type.
    assert [q.task_type for q in read(folder, task_type="ocr").heldout] == ["ocr"]
    # A damaged file is reported as damaged.
    (folder / "train.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1: expected"):
        read(folder, task_type="ocr")


def test_training_questions_may_lack_the_ground_truth_on_request(folder):
    bare = {key: value for key, value in GOOD.items() if key != "answer"}
    asked = [GOOD | {"id": "q0"}, *(bare | {"id": f"q{i}"} for i in (1, 2, 3))]
    write(folder / "train.jsonl", *(question | {"videos": ["a.mp4"]} for question in asked))
    said = [(f"q{i}", k, answer) for i in range(4) for k, answer in enumerate("BBA")]
    texts = ({"id": i, "k": k, "text": f"<think>t</think><answer>{answer}</answer>"} for i, k, answer in said)
    write(folder / "pool.jsonl", *texts)
    files = {role: str(folder / f"{role}.jsonl") for role in ("train", "heldout", "pool")}
    with pytest.raises(DataError) as caught:
        read_inputs(RunConfig(teacher=TeacherConfig(responses=3)), files, dict.fromkeys(files, ""))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("train.jsonl: 3 of 4 records cannot be used:")
    assert "train.jsonl:2: field 'answer': expected one option letter such as 'B', since mcq is a closed" in lines[1]
    assert lines[1].endswith(
        "got nothing; add the ground truth, set task_type to open, or, for training questions only, set "
        "teacher.unlabeled=agreement"
    )
    settings = RunConfig(teacher=TeacherConfig(responses=3, unlabeled="agreement"))
    inputs = read_inputs(settings, files, dict.fromkeys(files, ""))
    assert [answer.quality for answer in inputs.scores["q0"]] == [1, 1, 0]
    assert [answer.quality for answer in inputs.scores["q1"]] == [0.5, 0.5, 0]
    assert inputs.statistics["all"]["unlabeled"] == 3
    # Evaluations always need ground truths.
    write(folder / "heldout.jsonl", bare | {"id": "h", "videos": ["b.mp4"]})
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: field 'answer': expected one option letter"):
        read_inputs(settings, files, dict.fromkeys(files, ""))


def test_requesting_more_answers_than_the_pool_has_is_refused(folder):
    files = {role: str(folder / f"{role}.jsonl") for role in ("train", "pool")}
    with pytest.raises(SettingsError, match=r"teacher\.responses: expected at most 1, .*pool\.jsonl, got 4"):
        read_inputs(RunConfig(), files, dict.fromkeys(files, ""))


def test_generated_material_follows_its_settings(tmp_path):
    changes = ["made.tasks=[open,temporal]", "made.questions_per_clip=2", "made.teacher=biased"]
    material = prepare_material(tiny_settings(tmp_path, *changes, "made.wording=paraphrased"), WORLD)
    assert [q.task_type for q in material.train].count("open") == 12 and len(material.train) == 24
    assert {q.task_type for q in material.heldout} == {"open", "temporal"}
    # Of 48 intervals, 5% are exact and 10% break the format.
    exact = [a.quality == 1 for q in material.train if q.task_type == "temporal" for a in material.scores[q.id]]
    assert len(exact) == 48 and sum(exact) < 12
    answers = [(q, parse_answer(a.text, "open")) for q in material.train if q.task_type == "open"
               for a in material.scores[q.id] if a.valid]  # fmt: skip
    right = [text for q, text in answers if meaning_score(text, q.meta["made"])]
    assert 0 < len(right) < len(answers) and all(" at the " not in text for text in right)
    # Another teacher has its own pool next to the same clips.
    other = prepare_material(tiny_settings(tmp_path, *changes), WORLD)
    assert other.files["train"] == material.files["train"] and other.files["pool"] != material.files["pool"]


def test_a_share_of_the_generated_questions_keeps_its_ground_truth(tmp_path):
    whole = prepare_material(tiny_settings(tmp_path / "a"), WORLD)
    names = sorted(path.name for path in (tmp_path / "a").rglob("*"))
    same = prepare_material(tiny_settings(tmp_path / "b", "made.label_share=1.0"), WORLD)
    assert sorted(path.name for path in (tmp_path / "b").rglob("*")) == names
    for role in ("train", "heldout", "pool"):
        assert Path(same.files[role]).read_bytes() == Path(whole.files[role]).read_bytes()
    unlabeled = ("made.label_share=0.25", "teacher.unlabeled=agreement")
    some = prepare_material(tiny_settings(tmp_path / "a", *unlabeled), WORLD)
    # The teacher, which was simulated from all ground truths, and the student are the same.
    assert {role for role in whole.files if some.files[role] != whole.files[role]} == {"train"}
    assert some.model_path == whole.model_path
    assert sorted({path.name for path in (tmp_path / "a").rglob("*")} - set(names)) == ["train-labels-0.25.jsonl"]
    kept = {}
    for task in CLOSED_TASKS:
        asked = [(a, b) for a, b in zip(whole.train, some.train, strict=True) if a.task_type == task]
        kept[task] = {b.id for _, b in asked if b.has_truth}
        assert len(kept[task]) == round(0.25 * len(asked)) and len(asked) >= 4
        assert all(b == a if b.has_truth else b == replace(a, answer=None) for a, b in asked)
    assert [q for q in some.train if q.task_type == "open"] == [q for q in whole.train if q.task_type == "open"]
    assert some.heldout == whole.heldout and some.statistics["all"]["unlabeled"] == sum(
        q.is_unlabeled for q in some.train
    )
    # A larger share keeps the same ground truths and more, and another seed keeps others.
    half = keep_labels(whole.train, share=0.5, seed=0)
    assert set().union(*kept.values()) < {q.id for q in half if q.has_truth}
    assert half == keep_labels(whole.train, share=0.5, seed=0) != keep_labels(whole.train, share=0.5, seed=1)
    assert not any(q.has_truth for q in keep_labels(whole.train, share=0.0, seed=0))
    # The run with fewer labels did not write a second pool for the same material.
    assert prepare_material(tiny_settings(tmp_path / "a"), WORLD).train == whole.train


def test_passes_over_the_questions_are_stated() -> None:
    sizes = ["sft.steps=3", "sft.batch_size=2", "distill.steps=2", "distill.batch_size=5"]
    summary = _describe_passes(4, load_settings("quickstart", ["stages=[sft,distill]", *sizes]))
    assert summary.lines == ["passes over the 4 questions, at least: sft 1.5, distill 2.5"]
    (warning,) = summary.warnings
    assert warning.startswith("distill.batch_size=5 is more than the 4 training questions, so a step sees some of them")
