"""Test intervals, differences and the files of the run folder."""

from __future__ import annotations

import json

import pytest
from material import WORLD, tiny_material, tiny_settings

from rmsd_fast.config import EvaluateConfig, RunConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.records import Question
from rmsd_fast.models.students import load_student
from rmsd_fast.stages import answer_records
from rmsd_fast.stages.answer_records import answer_record, asked_hash
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_files import read_predictions, write_evaluation, write_predictions
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.progress import describe_progress, interim_steps, measure_progress, warn_if_behind
from rmsd_fast.stages.summaries import compare, summarize


def records(scores, task="mcq"):
    """Return records of questions about different videos."""
    return [
        {
            **{"id": f"{task}{i}", "task_type": task, "cluster": f"{task}{i}.mp4", "response": ""},
            **{"score": s, "strict": s, "lenient": s, "valid": s > 0, "readable": s > 0, "truncated": False},
        }
        for i, s in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("parse", "text", "truncated", "score"),
    [
        ("strict", "B. milk", False, 0.0),
        ("lenient", "B. milk", False, 1.0),
        # The field reads the first of two letters.
        ("lenient", "A or B", False, 0.0),
        ("lenient", "B or A", False, 1.0),
        # Of a truncated response, only a letter at its start counts.
        ("lenient", "B. milk", True, 1.0),
        ("lenient", "It is B", True, 0.0),
        ("strict", "<think>a</think><answer>B</answer>", False, 1.0),
        ("lenient", "<think>a</think><answer>B</answer>", False, 1.0),
    ],
)
def test_answers_are_read_strictly_and_leniently(parse, text, truncated, score):
    question = Question("q", "?", "mcq", videos=("v",), options=("tea", "milk"), answer="B")
    settings = RunConfig(evaluate=EvaluateConfig(parse=parse))
    record = answer_record(question, "v", text, settings, truncated=truncated)
    assert (record["score"], record["response"]) == (score, text) and record[parse] == score
    # Both scores are there, and whether the format is followed is a separate result.
    is_strict = text.startswith("<think>")
    assert record["valid"] == is_strict and record["strict"] == float(is_strict)
    assert record["lenient"] == float(is_strict or text[0] == "B")
    assert record["readable"] == (text != "It is B")


def test_wilson_interval_by_hand():
    result = summarize(records([1.0] * 8 + [0.0] * 2))["tasks"]["mcq"]
    # The Wilson score interval of 8 in 10 at 95% is 0.490 to 0.943.
    assert (result["mean"], result["n"], result["valid_share"]) == (0.8, 10, 0.8)
    assert result["low"] == pytest.approx(0.4902, abs=1e-4)
    assert result["high"] == pytest.approx(0.9433, abs=1e-4)


def test_an_interval_always_has_a_width():
    none, all_right = (summarize(records([s] * 20))["tasks"]["mcq"] for s in (0.0, 1.0))
    assert none["low"] == 0 and none["high"] == pytest.approx(0.1611, abs=1e-4)
    assert all_right["high"] == 1 and all_right["low"] == pytest.approx(0.8389, abs=1e-4)


def test_closed_score_excludes_open_questions():
    result = summarize(records([1.0, 0.0]) + records([1.0, 1.0], "open"))
    assert result["closed"]["mean"] == 0.5 and result["closed"]["n"] == 2
    assert result["all"]["mean"] == 0.75
    assert "closed" not in summarize(records([1.0], "open"))


def test_paired_difference():
    before, after = records([0.0, 0.5, 1.0] * 30), records([0.5, 1.0, 1.0] * 30)
    result = compare(after, list(reversed(before)))["tasks"]["mcq"]
    assert result["mean"] == pytest.approx(1 / 3)
    # The standard error of the mean of (0.5, 0.5, 0) x 30 is 0.2357 / sqrt(90) = 0.0248.
    assert result["low"] == pytest.approx(1 / 3 - 1.96 * 0.0248, abs=0.01)
    assert result["high"] == pytest.approx(1 / 3 + 1.96 * 0.0248, abs=0.01)
    assert compare(before, before)["closed"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 90, "clusters": 90}


def test_files_of_the_run_folder(tmp_path):
    clip = {"spans": ((1.5, None),), "duration": 8.0}
    questions = [
        Question(id=f"mcq{i}", question="?", task_type="mcq", videos=("v.mp4",), options=("a", "b"), answer="A", **clip)
        for i in range(4)
    ]
    settings = RunConfig()
    settings.evaluate.samples = 2
    write_predictions(tmp_path, "stage1", records([0.0, 1.0, 1.0, 0.0]))
    assert read_predictions(tmp_path, "stage2", questions, settings) is None
    first = write_evaluation(tmp_path, questions, settings, simulated=True)
    assert first["differences"] == {} and first["floors"]["mcq"] == {"score": 1.0, "answer": "A", "n": 4}
    write_predictions(tmp_path, "stage2", records([1.0, 1.0, 1.0, 0.0]))
    write_evaluation(tmp_path, questions, settings, simulated=True)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["students"]) == ["stage1", "stage2"] and result["teacher_simulated"] is True
    assert result["differences"]["stage2-stage1"]["closed"]["mean"] == 0.25
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["student"] for s in samples] == ["stage1"] * 2 + ["stage2"] * 2
    assert samples[0]["videos"] == ["v.mp4"] and samples[0]["options"] == ["a", "b"]
    assert samples[0]["spans"] == [[1.5, None]] and samples[0]["duration"] == 8.0
    table = format_table(result)
    assert "0.500" in table and "stage2-stage1, closed tasks: +0.250" in table
    protocol = result["protocol"]
    assert (protocol["decoding"], protocol["seed"], protocol["evaluate"]["max_new_tokens"]) == ("greedy", 0, 1024)
    assert protocol["video"]["num_frames"] == 16 and set(protocol["versions"]) >= {"torch", "rmsd-fast"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_sampled_scores_stand_beside_the_greedy_ones():
    before = [{**r, "sampled": 0.25} for r in records([0.0, 1.0])]
    after = [{**r, "sampled": s} for r, s in zip(records([1.0, 1.0]), (0.5, 1.0), strict=True)]
    result = summarize(after)
    assert result["sampled"]["closed"]["mean"] == result["sampled"]["tasks"]["mcq"]["mean"] == 0.75
    assert "valid_share" in result["closed"] and "valid_share" not in result["sampled"]["closed"]
    difference = compare(after, before)
    assert (difference["closed"]["mean"], difference["sampled"]["closed"]["mean"]) == (0.5, 0.5)
    students = {"stage1": summarize(before), "stage2": result}
    table = format_table({"students": students, "floors": {}, "differences": {"stage2-stage1": difference}})
    assert "\nsampled       -    0.250" in table and "stage2-stage1, closed tasks, sampled: +0.500" in table
    # If one of the students lacks them, there is no difference.
    assert "sampled" not in compare(after, records([0.0, 1.0])) and "sampled" not in summarize(records([1.0]))


def test_sampled_answers_do_not_depend_on_the_batch(tmp_path):
    material = tiny_material(tmp_path)
    student = load_student(material.model_path, dtype="float32")

    def answers(*overrides):
        settings = tiny_settings(tmp_path, "evaluate.max_new_tokens=6", "rollout.temperature=2", *overrides)
        with MediaReader(settings.data, WORLD.device) as media:
            return answer_questions(student, material.heldout, settings, WORLD, media, name="x")

    greedy = answers()
    assert all("sampled" not in record for record in greedy)
    # A student that has learned nothing would score 0, so the score here is the share of even lengths.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_records, "quality_score", lambda text, *args, **kwargs: float(len(text) % 2 == 0))
        sampled = answers("evaluate.rollouts=4", "evaluate.prompts_per_batch=64")
        other_batch = answers("evaluate.rollouts=4", "evaluate.prompts_per_batch=2")
        other_seed = answers("evaluate.rollouts=4", "seed=5")
    assert [record.get("samples") for record in sampled] == [record.get("samples") for record in other_batch]
    scores = [record.pop("sampled") for record in sampled]
    assert scores == [record["sampled"] for record in other_batch] != [record["sampled"] for record in other_seed]
    assert len(set(scores)) > 1 and set(scores) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert [record["response"] for record in sampled] == [record["response"] for record in greedy]


def test_an_answer_with_an_error_counts_0():
    question = Question(id="q", question="?", task_type="mcq", videos=("v.mp4",), options=("a", "b"), answer="A")
    right = "<think>x</think><answer>A</answer>"
    assert answer_record(question, "v", right, RunConfig())["score"] == 1.0
    record = answer_record(question, "v", right, RunConfig(), error="the student's logits are not finite")
    assert record["score"] == 0.0 and record["valid"] is False and record["error"].startswith("the student")


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "other ids", "fewer", "no score", "other texts", "half a character", "a folder"]
)
def test_unusable_predictions_are_generated_again(tmp_path, damage, caplog):
    questions = [
        Question(id=f"mcq{i}", question="?", task_type="mcq", videos=("v.mp4",), options=("a", "b"), answer="A")
        for i in range(3)
    ]
    good = records([0.0, 1.0, 0.5])
    write_predictions(tmp_path, "stage1", good)
    assert read_predictions(tmp_path, "stage1", questions, RunConfig()) == good
    hashed = [{**record, "asked_hash": asked_hash(q)} for record, q in zip(good, questions, strict=True)]
    write_predictions(tmp_path, "stage1", hashed)
    assert read_predictions(tmp_path, "stage1", questions, RunConfig()) == hashed
    path = tmp_path / "predictions" / "stage1.jsonl"
    text = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": text[:-20],
                "empty": b"",
                "other ids": text.replace(b"mcq1", b"mcq7"),
                "fewer": text[: text.rindex(b"{")],
                "no score": text.replace(b'"score"', b'"points"'),
                "other texts": text.replace(b'"asked_hash": "', b'"asked_hash": "0'),
                "half a character": text[:40] + b"\xe4" + text[40:],
            }[damage]
        )
    assert read_predictions(tmp_path, "stage1", questions, RunConfig()) is None
    assert "stage1.jsonl: the file cannot be used" in caplog.text


def test_meaning_of_open_answers_about_generated_clips():
    content = {"color": "red", "shape": "block", "place": "top left"}
    question = Question("q", "?", "open", videos=("v",), answer="A red block at the top left.", meta={"made": content})

    def record(text, question=question, **kwargs):
        return answer_record(question, "v", text, RunConfig(), **kwargs)

    right = record("<think>x</think><answer>In the upper left: a block, colored red.</answer>")
    assert right == {
        "id": "q",
        "asked_hash": asked_hash(question),
        "task_type": "open",
        "cluster": "v",
        "response": "<think>x</think><answer>In the upper left: a block, colored red.</answer>",
        "score": 1.0,
        "strict": 1.0,
        "lenient": 1.0,
        "valid": True,
        "readable": True,
        "truncated": False,
        "meaning": 1.0,
    }
    assert record("<think>x</think><answer>A blue block at the top left.</answer>")["meaning"] == 0.0
    # The reasoning does not count, and neither does an answer without the format.
    assert record("<think>A red block at the top left.</think><answer>I cannot tell.</answer>")["meaning"] == 0.0
    assert record("A red block at the top left.")["meaning"] == 0.0
    assert record(right["response"], error="the media cannot be used")["meaning"] == 0.0
    # Other questions have no such score.
    for meta in ({}, {"made": "2020"}):
        other = Question("q", "?", "open", videos=("v",), meta=meta)
        assert "meaning" not in record(right["response"], other)
    closed = Question("q", "?", "ocr", videos=("v",), answer="x", meta={"made": content})
    assert "meaning" not in record(right["response"], closed)


def test_summary_and_table_of_meanings(tmp_path):
    rows = records([1.0] * 10, "open")
    assert "meaning" not in summarize(rows)
    for row, meaning in zip(rows, [1.0] * 8 + [0.0] * 2, strict=True):
        row["meaning"] = meaning
    result = summarize(rows + records([0.0]))
    # Wilson score interval of 8 in 10 at 95%, as above. The other fields stay as they are.
    assert result["meaning"] == {
        "mean": 0.8,
        "low": pytest.approx(0.4902, abs=1e-4),
        "high": pytest.approx(0.9433, abs=1e-4),
        "n": 10,
        "clusters": 10,
    }
    assert set(result) == {"tasks", "all", "closed", "meaning", "strict", "lenient"}
    assert result["tasks"]["open"]["mean"] == 1.0
    evaluation = {"students": {"stage1": result, "stage2": summarize(records([0.5]))}, "floors": {}, "differences": {}}
    lines = format_table(evaluation).splitlines()
    rows = ["task", "mcq", "open", "meaning", "closed", "strict", "lenient"]
    assert [line.split()[0] for line in lines[:7]] == rows
    no_interval = "there is no interval, because there is only one question"
    assert lines[7:] == [f"stage1: {no_interval}", f"stage2: {no_interval}"]
    assert lines[3].split() == ["meaning", "-", "0.800", "[0.49,", "0.94]", "-"]


def test_progress_by_hand(tmp_path):
    scores = {"stage1": [0.0, 0.0], "control@5": [1.0, 1.0], "stage2@5": [0.0, 0.5], "control": [0.5, 0.5]}
    answers = {name: records(values) for name, values in scores.items()}
    write = {name: write_predictions(tmp_path, name, rows) for name, rows in answers.items()}
    assert len(write) == 4 and interim_steps(tmp_path) == [5]
    entries = measure_progress([5], 8, answers.get)
    assert [entry["step"] for entry in entries] == [0, 5, 8]
    means = [{name: s["closed"]["mean"] for name, s in entry["students"].items()} for entry in entries]
    assert means == [{"stage2": 0, "control": 0}, {"stage2": 0.25, "control": 1}, {"control": 0.5}]
    assert {key: d["closed"]["mean"] for key, d in entries[1]["differences"].items()} == {
        "stage2-control": -0.75,
        "stage2-stage1": 0.25,
        "control-stage1": 1.0,
    }
    assert list(entries[2]["differences"]) == ["control-stage1"] and entries[0]["differences"] == {}
    head, *differences, warning = describe_progress(entries, "distill", 5, judged=True)
    assert head == "distill step 5, held-out: greedy 0.250"
    assert differences[0].startswith("  stage2-control: greedy -0.750 [-1.000, ")
    assert "WARNING: stage 2 is behind more imitation (the control) in greedy answers" in warning
    assert "lower reward.alpha" in warning
    (unjudged,) = warn_if_behind(entries[1]["differences"], judged=False)
    assert "reward.alpha" not in unjudged
    assert warn_if_behind({"stage2-control": compare(answers["control@5"], answers["control"])}, judged=True) == []
    assert describe_progress(entries, "distill", 8, judged=True) == []
    assert measure_progress([], 8, answers.get) == []


def test_meaning_of_greedy_and_sampled_answers_is_compared():
    def open_records(meanings, sampled):
        pairs = zip(records([1.0] * len(meanings), "open"), meanings, sampled, strict=True)
        return [{**r, "meaning": m, "sampled": 1.0, "sampled_meaning": s} for r, m, s in pairs]

    before, after = open_records([0.0, 1.0], [0.25, 0.5]), open_records([1.0, 1.0], [0.5, 1.0])
    result, difference = summarize(after), compare(after, before)
    assert (result["meaning"]["mean"], result["sampled"]["meaning"]["mean"]) == (1.0, 0.75)
    assert (difference["meaning"]["mean"], difference["sampled"]["meaning"]["mean"]) == (0.5, 0.375)
    # The greedy meaning does not stand in for a missing one of sampled answers.
    lacking = [{name: value for name, value in r.items() if name != "sampled_meaning"} for r in after]
    assert "meaning" not in summarize(lacking)["sampled"] and "meaning" not in compare(lacking, before)["sampled"]
    assert "meaning" in compare(lacking, before)
