"""Test groups, unusable questions, sampled answers and clusters in the scores of an evaluation."""

from __future__ import annotations

import json

import pytest

from rmsd_fast.config import EvaluateConfig, RunConfig
from rmsd_fast.data.benchmarks import published_counts
from rmsd_fast.data.records import Question
from rmsd_fast.stages.answer_records import NOT_FINITE, answer_record, clusters_of, reason_of, votes_of, with_samples
from rmsd_fast.stages.evaluation_batches import plan_batches
from rmsd_fast.stages.evaluation_files import read_predictions, write_evaluation, write_predictions
from rmsd_fast.stages.evaluation_table import benchmark_lines, format_table
from rmsd_fast.stages.paper_numbers import paper_lines
from rmsd_fast.stages.summaries import compare, count_unusable, summarize
from rmsd_fast.stages.summary_rows import detail_rows, entry_at

RIGHT, WRONG = "<think>x</think><answer>A</answer>", "<think>x</think><answer>B</answer>"


def question(name: str, *videos: str, task: str = "mcq", **others) -> Question:
    options = ("a", "b") if task == "mcq" else None
    return Question(name, "?", task, videos=videos or (f"{name}.mp4",), options=options, answer="A", **others)


def test_questions_that_share_a_medium_are_one_cluster():
    asked = [
        question("1", "a", "b"),
        question("2", "c"),
        question("3", "b", "d"),
        question("4", "d"),
        question("5", "e"),
    ]
    text = Question("6", "?", "open")
    clusters = clusters_of([*asked, text])
    assert clusters["1"] == clusters["3"] == clusters["4"]
    assert len({clusters[name] for name in "1256"}) == 4 and clusters["6"] == "6"
    # Parts of the same video are about the same video.
    parts = [question("p", "a", spans=((0.0, 2.0),)), question("q", "a", spans=((5.0, 9.0),))]
    assert len(set(clusters_of(parts).values())) == 1


def test_a_named_cluster_is_preferred():
    """The versions of a problem have different images, or share one with another problem."""
    asked = [
        question("1", "a", meta={"benchmark": "mathverse", "cluster": "7"}),
        question("2", "b", meta={"benchmark": "mathverse", "cluster": "7"}),
        question("3", "a", meta={"benchmark": "mathverse", "cluster": "8"}),
        question("4", "a"),
        question("5", "7", meta={"cluster": ["7"]}),
        question("6", "c", meta={"cluster": "7"}),
        question("7", "/7", meta={"cluster": ""}),
    ]
    assert clusters_of(asked) == {
        **{"1": "mathverse:7", "2": "mathverse:7", "3": "mathverse:8", "4": "a", "5": "7", "6": "cluster:7"},
        "7": "/7",
    }
    # Three answers about two problems are two clusters.
    records = [answer_record(q, clusters_of(asked)[q.id], RIGHT, RunConfig()) for q in asked[:3]]
    assert summarize(records)["closed"]["clusters"] == 2


@pytest.mark.parametrize(
    ("task", "answers", "votes"),
    [
        ("exact", ["Blue", None, "blue.", "3", "3.0", "red"], ["Blue", None, "Blue", "3", "3", "red"]),
        # Rounding to the decimals of one of them does not make two numbers equal.
        ("exact", ["3.04", "3.0", "14", "a boat"], ["3.04", "3.0", "14", "a boat"]),
        ("ocr", ["Exit \u201cA\u201d", 'exit  "a".', "exit b"], ['exit "a"', 'exit "a"', "exit b"]),
        ("numeric", [3.0, 2.5], ["3.0", "2.5"]),
        ("boxes", [{"2": ((0.0, 1.0, 2.0, 3.0),), "1": ((4.0, 4.0, 5.0, 5.0), (1.0, 1.0, 2.0, 2.0))}], None),
    ],
)
def test_answers_that_the_metric_does_not_distinguish_vote_together(task, answers, votes):
    if votes is None:
        (first,) = answers
        second = {"1": tuple(reversed(first["1"])), "2": first["2"]}
        assert len(set(votes_of([first, second], task))) == 1
        assert len(set(votes_of([first, {"1": first["1"]}], task))) == 2
    else:
        assert votes_of(answers, task) == votes


def test_a_majority_of_equal_answers_in_other_words_wins():
    asked = Question("1", "Which color?", "exact", images=("a.png",), answer="blue")
    texts = [f"<think>x</think><answer>{answer}</answer>" for answer in ("red", "red", "Blue", "blue", "blue.")]
    record = with_samples(
        answer_record(asked, "a", texts[0], RunConfig()), asked, [(text, False, True) for text in texts], RunConfig()
    )
    # Three of five answers are blue in one spelling or another; with exact spellings, red would win.
    assert summarize([record])["sampled"]["majority"]["5"]["mean"] == 1.0


def test_groups_and_readings_of_closed_questions():
    asked = [
        question("1", "a", meta={"groups": {"duration": "short"}}),
        question("2", "a", meta={"groups": {"duration": "long", "domain": "art"}}),
        question("3", "b", meta={"groups": {"duration": "short"}, "benchmark": "videomme"}),
        question("4", "c", task="open", meta={"groups": {"duration": "short"}}),
    ]
    texts = [RIGHT, "The answer is A.", WRONG, RIGHT]
    settings, clusters = RunConfig(), clusters_of(asked)
    records = [answer_record(q, clusters[q.id], t, settings) for q, t in zip(asked, texts, strict=True)]
    assert records[1]["groups"] == {"duration": "long", "domain": "art"} and records[2]["benchmark"] == "videomme"
    result = summarize(records)
    # Open questions have no metric and are not in the groups.
    assert {k: (e["mean"], e["n"], e["clusters"]) for k, e in result["groups"]["duration"].items()} == {
        "short": (0.5, 2, 2),
        "long": (0.0, 1, 1),
    }
    assert list(result["groups"]) == ["duration", "domain"]
    assert result["closed"]["mean"] == result["strict"]["closed"]["mean"] == pytest.approx(1 / 3)
    assert result["lenient"]["closed"]["mean"] == pytest.approx(2 / 3)
    assert result["closed"]["only_lenient_share"] == pytest.approx(1 / 3) and "usable" not in result
    lenient = RunConfig(evaluate=EvaluateConfig(parse="lenient"))
    after = [answer_record(q, clusters[q.id], t, lenient) for q, t in zip(asked, texts, strict=True)]
    difference = compare(after, records)
    assert difference["groups"]["duration"]["long"]["mean"] == 1.0 and difference["lenient"]["closed"]["mean"] == 0.0
    table = format_table({"students": {"model": result}, "floors": {}, "differences": {}, "benchmark": "videomme"})
    assert any(line.split()[:4] == ["duration:", "short", "-", "0.500"] for line in table.splitlines())
    assert "model: 33.3% of the answers could only be read leniently" in table
    assert table.endswith("\nno comparison with the paper: 4 of 2,700 questions")
    (paper,) = paper_lines("videomme", [2700])
    assert paper.endswith("VideoMME, in percent: Qwen3-VL-4B 63.8; SFT+RL, same budget 64.0; R-MSD 65.3")


def test_unusable_questions_are_counted_by_reason_and_scored_apart():
    asked = [question(str(i)) for i in range(4)]
    faults = [
        "v.mp4: no such file; check the path",
        "question '2': a prompt of 9 tokens exceeds data.max_prompt_tokens=8",
    ]
    texts = [(RIGHT, ""), (WRONG, ""), ("", faults[0]), (RIGHT, NOT_FINITE)]
    records = [answer_record(q, q.id, t, RunConfig(), error=e) for q, (t, e) in zip(asked, texts, strict=True)]
    result = summarize(records)
    assert (result["closed"]["mean"], result["usable"]["closed"]["mean"]) == (0.25, 0.5)
    assert (result["closed"]["n"], result["usable"]["closed"]["n"]) == (4, 2)
    counts = count_unusable(records)
    assert (counts["count"], counts["reasons"]) == (2, {"missing_media": 1, "not_finite": 1})
    assert counts["questions"][0] == {"id": "2", "reason": "missing_media", "error": faults[0]}
    assert reason_of(faults[1], of_prompt=True) == "prompt_too_long"
    assert reason_of("question '2': expected plain text", of_prompt=True) == "refused_question"
    assert reason_of("v.mp4: the file is empty") == "unreadable_media"
    evaluation = {"students": {"m": result}, "floors": {}, "differences": {}, "unusable": {"m": counts}}
    table = format_table(evaluation)
    assert "m: 2 questions could not be used and got score 0 (1 because media files are missing, 1 because the" in table
    evaluation["unusable"]["m"] = count_unusable(records[:3])
    assert "m: 1 question could not be used and got score 0 (1 because media" in format_table(evaluation)
    # If nothing can be used, there is no mean over usable questions.
    assert summarize(records[2:])["usable"] == {"tasks": {}}


def test_sampled_answers_have_pass_and_majority():
    asked = question("1")
    record = answer_record(asked, "v", RIGHT, RunConfig())
    texts = [RIGHT, WRONG, "(A)", RIGHT]
    ended = [(text, False, True) for text in texts[:3]] + [(texts[3], False, False)]
    sampled = with_samples(record, asked, ended, RunConfig())
    assert sampled["samples"] == {
        "score": [1.0, 0.0, 0.0, 0.0],
        "strict": [1.0, 0.0, 0.0, 0.0],
        "lenient": [1.0, 0.0, 1.0, 0.0],
        # The strict reading has no answer in the third text, and logits that are not finite give none.
        "answers": ["A", "B", None, None],
    }
    assert sampled["sampled"] == 0.25 and json.loads(json.dumps(sampled)) == sampled
    result = summarize([sampled, {**sampled, "id": "2", "cluster": "w"}])["sampled"]
    # One of four is right: C(3, 2) / C(4, 2) of the pairs hold only wrong ones.
    assert {k: e["mean"] for k, e in result["pass"].items()} == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert result["majority"]["4"]["mean"] == 0.5 and result["pass"]["4"]["clusters"] == 2


def test_rows_of_groups_and_samples_of_all_students():
    short, long = ({"groups": {"duration": {name: {"mean": 0.5}}}} for name in ("short", "long"))
    sampled = {"sampled": {"pass": {"1": {}, "8": {}}, "majority": {"8": {"mean": 1.0}}}}
    rows = detail_rows([short, long | sampled, short])
    assert rows == [
        ("duration: short", ("groups", "duration", "short")),
        ("duration: long", ("groups", "duration", "long")),
        ("majority@8", ("sampled", "majority", "8")),
        ("pass@1", ("sampled", "pass", "1")),
        ("pass@8", ("sampled", "pass", "8")),
    ]
    assert [entry_at(sampled, path) for _, path in rows[2:4]] == [{"mean": 1.0}, {}]
    assert entry_at(short, rows[1][1]) is None and entry_at({"groups": "x"}, ("groups", "duration", "short")) is None
    assert detail_rows([{"groups": None, "sampled": {"pass": []}}, None]) == []


@pytest.mark.parametrize(
    ("name", "mark", "paper"),
    [
        ("mathvista", "mathvista (rule-based), lenient, in percent: ", "on MathVista, usually scored with a language"),
        ("mathverse", "mathverse (rule-based), lenient, in percent: ", "on MathVerse, usually scored with a language"),
        (
            "vstar",
            "vstar (rule-based: what, and the means that contain it), lenient, in percent: ",
            "on V-STaR, in per",
        ),
        ("mlvu", "mlvu, lenient, in percent: ", "on MLVU-MCQ, in percent: "),
    ],
)
def test_scores_by_rules_are_marked_beside_the_number(name, mark, paper):
    student = {"benchmark": {"lenient": {"mean": 0.125, "score": 0.5, "chain1": {"tiou": 0.25}}}}
    (line,) = benchmark_lines("m", name, student)
    assert line == f"m, {mark}mean 12.5, score 50.0; chain1: tiou 25.0"
    assert paper in paper_lines(name, published_counts(name))[0]
    counts = " or ".join(f"{count:,}" for count in published_counts(name))
    assert paper_lines(name, [published_counts(name)[0], 9]) == [
        f"no comparison with the paper: 9 of {counts} questions"
    ]


def test_questions_about_a_video_are_in_one_batch():
    asked = [question(f"{v}{i}", f"{v}.mp4") for i in range(3) for v in "abc"] + [Question("t", "?", "open")]
    names = [[q.id for q in batch] for batch in plan_batches(asked, 7, 1)]
    assert names == [["a0", "a1", "a2", "b0", "b1", "b2"], ["c0", "c1", "c2", "t"]]
    # A video with more questions than fit continues in the next batch.
    assert [len(batch) for batch in plan_batches(asked, 2, 1)] == [2, 1, 2, 1, 2, 2]
    # Ten questions give each of four processes some.
    assert all(len(batch) <= 3 for batch in plan_batches(asked, 16, 4))
    assert plan_batches([], 4, 2) == []


def test_predictions_of_earlier_versions_are_scored_again(tmp_path, caplog):
    asked = [question("1", "a"), question("2", "a")]
    old = [
        {"id": "1", "task_type": "mcq", "response": RIGHT, "score": 1.0, "valid": True, "truncated": False},
        {"id": "2", "task_type": "mcq", "response": "It is A.", "score": 0.0, "valid": False, "truncated": False},
    ]
    write_predictions(tmp_path, "stage1", [{**record, "sampled": 0.5} for record in old])
    records = read_predictions(tmp_path, "stage1", asked, RunConfig())
    assert [(r["strict"], r["lenient"], r["cluster"], r["sampled"]) for r in records] == [
        (1.0, 1.0, "a", 0.5),
        (0.0, 1.0, "a", 0.5),
    ]
    result = write_evaluation(tmp_path, asked, RunConfig(), simulated=False)
    assert "pass" not in result["students"]["stage1"]["sampled"] and result["videos"] == 1
    # Both questions are about one video, which says nothing about others.
    assert result["students"]["stage1"]["closed"]["low"] is None
    assert "stage1: there is no interval, because all 2 questions are about one video" in format_table(result)
    assert not caplog.records
