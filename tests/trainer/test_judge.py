"""Test which answers a judge decides, how its replies are read, and that no reply is lost or requested twice."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from benchmark_records import PNG, load, vstar_record, write_json
from material import WORLD, tiny_material
from safetensors.torch import load_file, save_file
from teacher_server import Act, TeacherServer, completion, error
from tokenizers import Tokenizer
from train_runs import environment
from warm_process import run_program

from rmsd_fast import evaluate, evaluate_judge
from rmsd_fast.config import JudgeConfig, SettingsError
from rmsd_fast.data.records import Question
from rmsd_fast.evaluate_judge import JudgeError, client_settings, judge_answers
from rmsd_fast.method.exact import is_decided
from rmsd_fast.method.lenient import lenient_response, stated_letter
from rmsd_fast.runtime import stop_signal
from rmsd_fast.runtime.stop_signal import Stopped, StopSignal
from rmsd_fast.setting_rules.evaluation import refuse_evaluation_only
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import evaluation_vllm
from rmsd_fast.stages.answer_records import answer_record
from rmsd_fast.stages.evaluation_checks import check_predictions
from rmsd_fast.stages.evaluation_compare import Evaluation, compare_evaluations, format_comparison
from rmsd_fast.stages.evaluation_table import benchmark_lines
from rmsd_fast.stages.judge import judging, needs_judge, read_reply, rules_decide
from rmsd_fast.stages.paper_numbers import paper_lines
from rmsd_fast.stages.protocol import differences_of, evaluation_identity, protocol_of
from rmsd_fast.stages.summaries import compare, summarize

OF_JUDGE = ["data.heldout=x", "evaluate.benchmark=mathvista", "evaluate.parse=lenient"]
OF_JUDGE += ["evaluate.judge.endpoint=http://localhost:1/v1", "evaluate.judge.model=m"]


@pytest.mark.parametrize(
    ("answer", "truth", "decided"),
    [
        # A number decides if it is the only one, whether it is right or wrong.
        ("3 apples", "3", True),
        ("4", "3", True),
        ("1.2", "1.20", True),
        ("3 of 4", "3", False),
        ("1/2", "0.5", False),
        ("not 3", "3", False),
        ("three", "3", False),
        ("", "3", False),
        # Otherwise a number is wrong for sure only if it stands alone.
        ("The answer is **13**.", "12", True),
        ("Answer: 1,300", "12", True),
        ("$13$", "12", True),
        (".5", "0.25", True),
        ("40°", "30", True),
        ("40 degrees", "30", True),
        ("90°", "1.57", False),
        ("There are 3 rows of four, so twelve in total.", "12", False),
        ("2 dozen", "12", False),
        ("The 1 box holds a dozen.", "12", False),
        ("The answer is 1 dozen", "12", False),
        ("50%", "0.5", False),
        ("5 thousand", "5000", False),
        ("5!", "120", False),
        ("2 hours", "120", False),
        ("twice 6", "12", False),
        ("0.5 m", "50", False),
        ("$5", "500", False),
        ("13 or so", "12", False),
        ("No, that is right", "yes", False),
        ("yes", "no", True),
        ("It may be open", "no", False),
        # A text that is not the reference may be a paraphrase.
        ("a red cup", "A red cup", True),
        ("a cup", "A red cup", False),
        ("[2007, 2008]", "[2007, 2008]", True),
        ("2007 and 2008", "[2007, 2008]", False),
    ],
)
def test_rules_decide_what_is_clear(answer, truth, decided):
    assert is_decided(answer, truth) == decided


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**Answer: B**", "B"),
        ("It is the sky. The correct answer is **B. blue**.", "B"),
        ("Blue.", "B"),
        ("a red cup", "A"),
        (r"\boxed{B}", "B"),
        ("The answer is option (B)", "B"),
        ("A right triangle, hence the second option", None),
        (r"The sky has it. Therefore, $\boxed{B}$.", "B"),
        (r"\boxed{B} or C", None),
        (r"Not \boxed{B}", None),
        ("The answer is A. No, B.", None),
        ("A. blue", None),
        ("blue or green", None),
        ("D", None),
    ],
)
def test_options_that_are_stated_alone(text, letter):
    assert stated_letter(text, ("A red cup", "blue", "green")) == letter
    if letter:
        assert stated_letter(text, ("A. A red cup", "B. blue", "C. green")) == letter


@pytest.mark.parametrize(
    ("response", "truth", "decided"),
    [
        (r"3 + 9 makes a few more. Thus $\boxed{13}$.", "12", True),
        (r"The final answer is: \(\boxed{13}\)", "12", True),
        (r"x = \boxed{13^\circ}", "12", True),
        (r"\boxed{12} or so", "12", True),
        ("<think>2?</think>The answer is 13.", "12", True),
        # The box is a part of the answer.
        (r"\boxed{2} dozen", "24", False),
        (r"So it is $\boxed{2}$ hours", "120", False),
        (r"\boxed{13}^2", "169", False),
        (r"2\boxed{3}", "23", False),
        (r"\frac{1}{2}\cdot\boxed{13}", "6.5", False),
        ("The answer is 2 hours.", "120", False),
        ("The final answer is $2$ dozen", "24", False),
    ],
)
def test_whole_answers_that_rules_decide(response, truth, decided):
    question = Question("1", "How many?", "exact", answer=truth)
    assert rules_decide(question, response, lenient_response(response, "exact")) == decided


@pytest.mark.parametrize(("text", "letter"), [("C", "C"), ("(C)", "C"), ("A circle", None), ("Angle B is 30", None)])
def test_letters_of_options_that_are_in_the_picture(text, letter):
    assert stated_letter(text, None) == letter


@pytest.mark.parametrize(
    ("kind", "reply", "read"),
    [
        ("extract", "Answer:\n12", "12"),
        ("extract", "**Answer:**\n\n**12**", "12"),
        ("extract", "The final answer is\n12", "12"),
        ("extract", "The answer is 12", "12"),
        ("extract", "The answer is not given.\nAnswer: NONE", ""),
        ("grade", "2 - right in the main", 2),
        ("grade", "2 or 3", None),
        ("grade", "Score: 1 or 2", None),
        ("grade", "Score: 1/2", None),
        ("grade", "Score: 3/10", None),
        ("grade", "2/3", 2),
        ("grade", "Score: 2 out of 3", 2),
        ("grade", "Score: 10", None),
        ("score", "Score: 1.0", 1),
        ("score", "0/1", 0),
        ("extract", "Answer: 12", "12"),
        ("extract", "**Answer:** 12", "12"),
        ("extract", "It says so twice.\nAnswer: -3\nFinal answer: -3", "-3"),
        ("extract", "<think>Answer: 7?</think>\nAnswer: B", "B"),
        ("extract", "x = \\frac{1}{2}", "x = \\frac{1}{2}"),
        ("extract", "Answer: NONE", ""),
        ("extract", "null.", ""),
        ("extract", "Answer: 3\nAnswer: 4", None),
        ("extract", "The response is long.\nIt is unclear.", None),
        ("extract", "Answer:", None),
        ("extract", "", None),
        ("extract", "<think>Answer: 7", None),
        ("grade", "3", 3),
        ("grade", "Score: 2", 2),
        ("grade", "**Score:** 0.", 0),
        ("grade", "The core is right.\n\nScore: 2", 2),
        ("grade", "Score: 2/3", 2),
        ("grade", '{"score": 1}', 1),
        ("grade", "Score: 4", None),
        ("grade", "Score: -1", None),
        ("grade", "-1", None),
        ("grade", "Score: 2.5", None),
        ("grade", "Score: 0, or Score: 1", None),
        ("grade", "I cannot say.", None),
        ("grade", "The answer has 2 parts.", None),
        ("score", "1", 1),
        ("score", "Score: 0", 0),
        ("score", "Score: 2", None),
    ],
)
def test_replies_are_read_or_not(kind, reply, read):
    assert read_reply(kind, reply) == read


def mathvista(folder: Path, *rows: dict) -> list[Question]:
    """Return questions of MathVista, by default one with options, one about a number and one about a list."""
    (folder / "i.png").write_bytes(PNG)
    base = {"image": "i.png", "query": "Hint: say it.\nQuestion: How many?", "metadata": {"task": "x"}}
    typical = [
        {"question_type": "multi_choice", "choices": ["red", "blue"], "answer": "blue", "answer_type": "text"},
        {"question_type": "free_form", "answer": "12", "answer_type": "integer"},
        {"question_type": "free_form", "answer": "[1, 2]", "answer_type": "list"},
    ]
    rows = [base | row | {"pid": str(number)} for number, row in enumerate(rows or typical)]
    return load("mathvista", write_json(folder / "testmini.json", rows))


def mathverse(folder: Path, **row) -> Question:
    (folder / "i.png").write_bytes(PNG)
    base = {"sample_index": "1", "problem_index": 3, "problem_version": "Vision Only", "question": "", "image": "i.png"}
    base |= {"query_wo": "Answer the question.", "question_for_eval": "What is {x}?", "question_type": "free-form"}
    (question,) = load("mathverse", write_json(folder / "mathverse.json", [base | row]))
    return question


def vstar(folder: Path, count: int = 1) -> list[Question]:
    """Return the questions `what` of V-STaR, and one `when1`."""
    (folder / "v1.mp4").write_bytes(b"x")
    rows = [vstar_record(question=f"What does he hold in scene {i}?") for i in range(count)]
    questions = load("vstar", write_json(folder / "V_STaR_test.json", rows))
    return [question for i, question in enumerate(questions) if i % 5 == 0] + questions[1:2]


def settings_of(benchmark: str, *overrides: str):
    return load_settings("", [*OF_JUDGE, f"evaluate.benchmark={benchmark}", *overrides])


def predictions(questions, responses, benchmark: str, truncated: bool = False) -> list[dict]:
    settings = settings_of(benchmark)
    pairs = zip(questions, responses, strict=True)
    return [answer_record(q, q.id, response, settings, truncated=truncated) for q, response in pairs]


def verdict(question: Question, response: str, *readings) -> tuple[list[str], dict]:
    """Return the kinds of the requests about an answer, and the verdict after these readings."""
    steps, kinds = judging(question, response), []
    request = next(steps)
    try:
        for reading in readings:
            kinds.append(request.kind)
            request = steps.send(reading)
    except StopIteration as end:
        return kinds, end.value
    raise AssertionError(f"not the end, but {request}")


def test_mathvista_is_judged_where_rules_cannot_decide(tmp_path):
    option, number, listed = mathvista(tmp_path)
    long = "The first colour is out. I would go for the colour of the sky."
    records = predictions([option, number, listed], ["B", "There are 12.", "1 and then 2"], "mathvista")
    assert [needs_judge(q, r) for q, r in zip((option, number, listed), records, strict=True)] == [False, False, True]
    (record,) = predictions([option], [long], "mathvista")
    assert needs_judge(option, record) and record["lenient"] == 0.0
    # A reasoning that was cut off, and an empty answer, have nothing to extract.
    for response, truncated in (("<think>3 + 9", True), ("", False), ("<think>x</think>", False)):
        (record,) = predictions([number], [response], "mathvista", truncated)
        assert record["decided"] and not needs_judge(number, record)
    # Rules score what the judge has copied: a letter, the text of an option, a number, a list.
    assert verdict(option, long, "B") == (["extract"], {"score": 1.0, "extracted": "B"})
    assert verdict(option, long, "blue")[1]["score"] == 1.0 and verdict(option, long, "red")[1]["score"] == 0.0
    assert verdict(number, "x", "12")[1]["score"] == 1.0 and verdict(number, "x", "13")[1]["score"] == 0.0
    assert verdict(listed, "x", "[1,2]")[1]["score"] == 1.0 and verdict(listed, "x", "1")[1]["score"] == 0.0
    # Neither a word that may be an article, nor a number in another form, is scored.
    (article,) = predictions([option], ["A right guess, hence the colour of the sky"], "mathvista")
    assert article["decided"] is False and needs_judge(option, article)
    assert verdict(option, "x", "(A) red")[1]["score"] == 0.0 and verdict(option, "x", "B: the sky")[1]["score"] == 1.0
    assert verdict(number, "x", "") == (["extract"], {"score": 0.0, "extracted": ""})
    # The judge sees the prompt, the form and the answer without its reasoning, but not the reference.
    (_, message) = next(judging(number, "<think>11?</think>I count {x} dozens.")).messages
    assert "Question: How many?" in message["content"] and "a whole number" in message["content"]
    assert "I count {x} dozens." in message["content"] and "11?" not in message["content"]
    assert "12" not in message["content"]


def test_mathverse_is_extracted_and_then_scored(tmp_path):
    fraction = mathverse(tmp_path, answer="\\frac{1}{2}")
    response = "Half of it, that is 1/2."
    (record,) = predictions([fraction], [response], "mathverse")
    assert needs_judge(fraction, record)
    # What equals the reference by rules is not compared by the judge.
    assert verdict(fraction, response, "\\frac{1}{2}") == (["extract"], {"score": 1.0, "extracted": "\\frac{1}{2}"})
    kinds, result = verdict(fraction, response, "1/2", 1)
    assert kinds == ["extract", "score"] and result == {"score": 1.0, "extracted": "1/2", "grade": 1}
    assert verdict(fraction, response, "1/3", 0)[1]["score"] == 0.0
    steps = judging(fraction, response)
    next(steps)
    content = steps.send("1/2").messages[1]["content"]
    # Also where the image shows the question, the judge reads it.
    assert "What is {x}?" in content and "Reference answer: \\frac{1}{2}\nAnswer: 1/2\n" in content
    option = mathverse(tmp_path, answer="C", question_type="multi-choice")
    assert verdict(option, "x", "C")[1]["score"] == 1.0 and verdict(option, "x", "B")[1]["score"] == 0.0
    for text in ("2 cm", "A circle", "Angle B is 30"):
        assert verdict(option, "x", text, 1) == (["extract", "score"], {"score": 1.0, "extracted": text, "grade": 1})
    # "2 hours" is not the number 2.
    minutes = mathverse(tmp_path, answer="120")
    assert verdict(minutes, "x", "2 hours", 1)[1]["score"] == 1.0 and verdict(minutes, "x", "2")[1]["score"] == 0.0


def test_vstar_is_graded_from_0_to_3(tmp_path):
    what, when = vstar(tmp_path)
    records = predictions([what, when], ["A red cup", "3.2 to 6.9"], "vstar")
    # All answers to what are graded, and no other ones.
    assert [needs_judge(q, r) for q, r in zip((what, when), records, strict=True)] == [True, False]
    assert "decided" not in records[1] and records[0]["decided"]
    scores = [verdict(what, "x", grade)[1] for grade in range(4)]
    assert [(result["score"], result["grade"]) for result in scores] == [(0.0, 0), (0.0, 1), (1.0, 2), (1.0, 3)]


def test_own_questions_may_have_the_name_of_a_benchmark():
    own = Question(
        id="1", videos=("a.mp4",), question="What?", task_type="exact", answer="a cup", meta={"benchmark": "vstar"}
    )
    record = answer_record(own, "c", "a mug", settings_of("vstar"))
    assert "decided" not in record and not needs_judge(own, record)
    number = Question(
        id="1", images=("a.png",), question="How many?", task_type="exact", answer="12", meta={"benchmark": "mathvista"}
    )
    (record,) = predictions([number], ["a dozen"], "mathvista")
    assert (
        needs_judge(number, record) and "a number, an expression" in next(judging(number, "x")).messages[1]["content"]
    )


def asked(request: dict) -> str:
    return request["messages"][-1]["content"]


def judge_of(server: TeacherServer | str, **changes) -> JudgeConfig:
    url = server if isinstance(server, str) else server.url
    return JudgeConfig(**{"endpoint": url, "model": "m", "timeout_s": 5.0, "outage_s": 20.0} | changes)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_verdicts_are_recorded_and_nothing_is_asked_twice(tmp_path, caplog):
    caplog.set_level("INFO", "rmsd_fast")
    questions = mathvista(tmp_path)
    records = predictions(questions, ["blue, says the sky or red", "a dozen", "1 and then 2"], "mathvista")
    replies = {"or red": "Answer: NONE", "dozen": "Answer: 12", "and then": "Answer: [1, 2]"}
    failures = iter([error(429, "slow"), error(500, "oops"), error(503, "oops")])

    def script(request, number):
        return next(failures, None) or completion(
            next(text for part, text in replies.items() if part in asked(request))
        )

    path = tmp_path / "x.judge.jsonl"
    with TeacherServer(script) as server:
        judged = judge_answers(records, questions, judge_of(server), path, WORLD)
        assert server.count == 6
        # A run of the same command asks nothing.
        assert judge_answers(records, questions, judge_of(server), path, WORLD) == judged
        assert server.count == 6
        # Another request has another key; the limit of tokens has not cut off a reply.
        judge_answers(records, questions, judge_of(server, max_tokens=99), path, WORLD)
        assert server.count == 6
        judge_answers(records, questions, judge_of(server, model="n"), path, WORLD)
        assert server.count == 9 and server.requests[-1]["model"] == "n"
    assert server.requests[0]["temperature"] == 0 and "seed" not in server.requests[0]
    assert [record["judged"] for record in judged] == [record["score"] for record in judged] == [0.0, 1.0, 1.0]
    assert [record["lenient"] for record in judged] == [0.0, 0.0, 0.0]
    expected = {"model": "m", "score": 1.0, "extracted": "12", "replies": ["Answer: 12"]}
    assert judged[1]["judge"] == expected
    written = lines(path)
    assert {(line["id"], line["kind"], line["reply"]) for line in written} == {
        (q.id, "extract", reply) for q, reply in zip(questions, replies.values(), strict=True)
    }
    assert len(written) == 6 and {line["max_tokens"] for line in written} == {1024}
    assert "judge m: 3 replies, 3 of them new (360 tokens), in " in caplog.text
    check_predictions(judged, "x")
    summary = summarize(judged)
    assert summary["judged"]["closed"]["mean"] == summary["closed"]["mean"] == pytest.approx(2 / 3)
    assert summary["lenient"]["closed"]["mean"] == 0.0
    decided = {"answers": 3, "rules": 0, "rules_share": 0.0, "model": "m", "judge": 3, "unclear": []}
    assert summary["decided"] == decided
    assert compare(judged, records)["closed"]["mean"] == pytest.approx(2 / 3)
    both = [Evaluation(name, rows, {"benchmark": "mathvista"}) for name, rows in (("by rules", records), ("j", judged))]
    text = format_comparison(compare_evaluations(both))
    assert "WARNING: only j had a judge" in text and "j, mathvista (judged by m: 0.0% of 3 answers" in text


def test_unreadable_replies_are_asked_for_again_and_then_count_as_wrong(tmp_path, caplog):
    questions = vstar(tmp_path, count=40)
    records = predictions(questions, ["a mug"] * 40 + ["3 to 6"], "vstar")
    temperatures = {}

    def script(request, number):
        text = asked(request)
        temperatures.setdefault(text, []).append(request["temperature"])
        if "scene 7?" in text:
            # What was cut off is not a verdict, whatever it says.
            return completion("Score: 3", reason="length")
        if "scene 3?" in text and request["temperature"] == 0:
            return completion("It is hard to say")
        return completion("Score: 3")

    path = tmp_path / "x.judge.jsonl"
    with TeacherServer(script) as server:
        judged = judge_answers(records, questions, judge_of(server), path, WORLD)
        assert judge_answers(records, questions, judge_of(server), path, WORLD) == judged
    assert server.count == 39 + 1 + 3
    assert sorted(map(len, temperatures.values())) == [1] * 38 + [2, 3]
    assert max(temperatures.values(), key=len) == [0, 0.5, 1.0]
    wrong = judged[7]
    assert (wrong["judged"], wrong["judge"]["unclear"]) == (0.0, True)
    assert wrong["judge"]["replies"] == ["Score: 3"] * 3 and wrong["judge"]["reason"] == "'Score: 3'"
    assert [record["judged"] for record in judged] == [1.0] * 7 + [0.0] + [1.0] * 32 + [judged[-1]["lenient"]]
    says = f"got no readable reply about 1 of 40 answers, for instance 'Score: 3' about question {questions[7].id!r}; "
    assert f"{says}raise evaluate.judge.max_tokens" in caplog.text
    summary = summarize(judged)
    assert summary["decided"]["unclear"] == [questions[7].id]
    line = benchmark_lines("x", "vstar", summary)[-1]
    assert line.startswith(
        "x, vstar (judged by m: what, and the means that contain it; 0.0% of 40 answers decided by rules; 1 answer "
        "without a readable reply, counted as wrong), judged, in percent: "
    )


def test_a_judge_that_only_talks_stops_the_evaluation(tmp_path):
    questions = vstar(tmp_path, count=40)[:-1]
    records = predictions(questions, ["a mug"] * 40, "vstar")
    path = tmp_path / "x.judge.jsonl"
    with TeacherServer(lambda request, number: completion("Nice!")) as server:
        says = (
            "got no readable reply about 10 of 10 answers, for instance 'Nice!' about question .*; choose another model"
        )
        with pytest.raises(JudgeError, match=says):
            judge_answers(records, questions, judge_of(server, max_concurrency=1), path, WORLD)
        assert server.count < 60

    def script(request, number):
        cut = any(f"scene {i}?" in asked(request) for i in range(5, 8)) and request["max_tokens"] < 99
        return completion("The", reason="length") if cut else completion("1")

    path.unlink()
    with TeacherServer(script) as server:
        says = (
            "reply about 3 of 40 answers, .*; raise evaluate.judge.max_tokens, .*; only they are then requested again"
        )
        with pytest.raises(JudgeError, match=says):
            judge_answers(records, questions, judge_of(server, max_tokens=9), path, WORLD)
        assert len(lines(path)) == server.count == 37 + 9
        # Only replies that a smaller limit cut off are requested again, under either name of the limit.
        longer = judge_of(server, max_tokens=99)
        judged = judge_answers(records, questions, longer, path, WORLD)
        assert server.count == 37 + 9 + 3 and not any("unclear" in record["judge"] for record in judged)
        renamed = judge_of(server, max_tokens=99, token_limit="max_completion_tokens")
        assert judge_answers(records, questions, renamed, path, WORLD) == judged
        assert server.count == 37 + 9 + 3


def test_advice_is_about_the_most_frequent_cause(tmp_path):
    """One of three replies about an answer is cut off: a higher limit would not help."""
    questions = vstar(tmp_path, count=12)[:-1]
    records = predictions(questions, ["a mug"] * 12, "vstar")

    def script(request, number):
        return completion("Nice!", reason="length" if request["temperature"] > 2 else "stop")

    with TeacherServer(script) as server, pytest.raises(JudgeError, match="'Nice!' .*; choose another model"):
        judge_answers(records, questions, judge_of(server, temperature=1.2), tmp_path / "x.judge.jsonl", WORLD)
    # Servers refuse temperatures above 2.
    assert sorted({request["temperature"] for request in server.requests}) == [1.2, 1.7, 2.0]


def test_an_answer_that_the_server_refuses_is_unclear(tmp_path, caplog):
    questions = vstar(tmp_path, count=40)[:-1]
    records = predictions(questions, ["a mug"] * 40, "vstar")
    path, broken = tmp_path / "x.judge.jsonl", True

    def script(request, number):
        if "scene 0?" in asked(request):
            return error(400, "blocked by content_filter")
        return error(500, "oops") if broken and "scene 7?" in asked(request) else completion("3")

    with TeacherServer(script) as server:
        judge = judge_of(server, attempts=2)
        judged = judge_answers(records, questions, judge, path, WORLD)
        assert [record["id"] for record in judged if "unclear" in record["judge"]] == [questions[0].id, questions[7].id]
        assert judged[0]["judged"] == 0.0 and judged[0]["judge"]["reason"].startswith(
            "filtered: status 400: blocked by"
        )
        assert judged[7]["judge"]["reason"].startswith("2 attempts failed, the last with status 500: oops")
        assert "reply about 2 of 40 answers, for instance" in caplog.text
        # The same command asks about them again, and only about them.
        broken, before = False, server.count
        judged = judge_answers(records, questions, judge, path, WORLD)
        assert server.count - before == 2 and [r["judged"] for r in judged] == [0.0] + [1.0] * 39


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (error(401, "no"), "evaluate.judge.api_key_env: expected a key that the server accepts, got status 401: no"),
        (error(404, "The model `m` does not exist"), "evaluate.judge.model: expected a model that the server has"),
        (
            error(400, "maximum context length is 9"),
            "about 3 of 4 answers, for instance context_too_long: .*is 9 about",
        ),
        (error(400, "content_filter"), "the provider's filter rejected the prompts; .*asks about these answers again"),
        (error(500, "oops"), "instance 2 attempts failed, the last with status 500: oops about .*; check the server"),
        (Act(b"<html>"), "2 attempts failed, the last with expected JSON, got an HTML page"),
        (Act(kind="hang"), r"no reply within evaluate.judge.timeout_s=0.3"),
    ],
)
def test_failures_stop_the_evaluation_and_keep_what_is_done(tmp_path, act, says):
    questions = vstar(tmp_path, count=4)[:-1]
    records = predictions(questions, ["a mug"] * 4, "vstar")
    path, broken = tmp_path / "x.judge.jsonl", True

    def script(request, number):
        return act if broken and number else completion("3")

    with TeacherServer(script) as server:
        judge = judge_of(server, attempts=2, max_concurrency=1, timeout_s=0.3 if act.kind == "hang" else 5.0)
        with pytest.raises(JudgeError, match=says) as caught:
            judge_answers(records, questions, judge, path, WORLD)
        assert f"the answers and the replies in {path} are kept" in str(caught.value) and len(lines(path)) == 1
        broken, before = False, server.count
        judged = judge_answers(records, questions, judge, path, WORLD)
        assert server.count - before == 3
    assert [record["judged"] for record in judged] == [1.0] * 4


@pytest.mark.parametrize("count", [1, 30])
def test_a_judge_that_refuses_everything_stops_the_evaluation(tmp_path, count):
    questions = vstar(tmp_path, count=count)[:-1]
    records = predictions(questions, ["a mug"] * count, "vstar")
    answers = min(count, 10)
    with TeacherServer(lambda request, number: error(400, "no temperature, please")) as server:
        says = f"about {answers} of {answers} answers?, .*; change the setting that the server names"
        with pytest.raises(JudgeError, match=says):
            judge_answers(records, questions, judge_of(server, max_concurrency=1), tmp_path / "x.judge.jsonl", WORLD)
        assert server.count <= answers + 1


def test_a_wrong_url_is_named(tmp_path):
    questions = vstar(tmp_path)[:1]
    records = predictions(questions, ["a mug"], "vstar")
    says = "evaluate.judge.endpoint http.*expected a server with chat completions, .*URL and evaluate.judge.model"
    server = TeacherServer(lambda request, number: error(404, "Not Found"))
    with server, pytest.raises(JudgeError, match=says):
        judge_answers(records, questions, judge_of(server), tmp_path / "x.judge.jsonl", WORLD)


def test_an_unreachable_judge_stops_the_evaluation(tmp_path):
    questions = vstar(tmp_path)[:1]
    records = predictions(questions, ["a mug"], "vstar")
    judge = judge_of("http://127.0.0.1:9/v1", attempts=30, outage_s=1.0)
    with pytest.raises(JudgeError, match=r"evaluate.judge.endpoint http://127.0.0.1:9/v1: expected"):
        judge_answers(records, questions, judge, tmp_path / "x.judge.jsonl", WORLD)


@pytest.mark.parametrize("ends", ["in time", "too late", "second signal"])
def test_a_signal_ends_the_judge_and_a_resumed_one_continues(tmp_path, monkeypatch, ends):
    """The requests in flight have a price, so a signal waits for their replies, and a second one does not."""
    questions = vstar(tmp_path, count=30)[:-1]
    records = predictions(questions, ["a mug"] * 30, "vstar")
    path, slow = tmp_path / "x.judge.jsonl", True
    twice, number_of_signal = ends == "second signal", signal.SIGINT if ends == "second signal" else signal.SIGTERM
    monkeypatch.setattr(evaluate_judge, "WATCH_S", 0.05)
    monkeypatch.setattr(evaluate_judge, "DRAIN_S", 0.1 if ends == "too late" else 3600.0)
    # A held key sends many signals, so those that follow at once do not count.
    monkeypatch.setattr(stop_signal, "_REPEATED_S", 0.2 if twice else 3600.0)
    pause_s = 1.0 if ends == "in time" else 3600.0

    def script(request, number):
        return Act(completion("2").body, delay_s=pause_s if slow and number >= 10 else 0.0)

    def kill_when_written() -> None:
        while not path.exists() or len(path.read_bytes().splitlines()) < 10 or server.count < 11:
            time.sleep(0.02)
        for _ in range(3):
            signal.raise_signal(number_of_signal)
        if twice:
            time.sleep(0.5)
            signal.raise_signal(number_of_signal)

    stop = StopSignal()
    killer = threading.Thread(target=kill_when_written, daemon=True)
    try:
        with TeacherServer(script) as server:
            killer.start()
            with pytest.raises(KeyboardInterrupt if twice else Stopped):
                judge_answers(records, questions, judge_of(server, timeout_s=600.0), path, WORLD, stop)
            killer.join(10)
            arrived = len(lines(path))
            assert server.count < 30 and arrived == (server.count if ends == "in time" else 10)
            assert stop.requests == (2 if twice else 1)
            # A kill can leave a part of a line.
            with path.open("a") as file:
                file.write('{"key": "12')
            slow, before = False, server.count
            judged = judge_answers(records, questions, judge_of(server), path, WORLD)
            assert server.count - before == 30 - arrived and len(lines(path)) == 30
    finally:
        stop.restore()
    assert all(record["judged"] == 1.0 for record in judged)


def test_equal_requests_are_sent_once(tmp_path):
    questions = mathvista(tmp_path, *[{"question_type": "free_form", "answer": "12", "answer_type": "integer"}] * 5)
    records = predictions(questions, ["a dozen"] * 5, "mathvista")
    with TeacherServer(lambda request, number: completion("Answer: 12")) as server:
        judged = judge_answers(records, questions, judge_of(server), tmp_path / "x.judge.jsonl", WORLD)
    assert server.count == 1 and [record["judged"] for record in judged] == [1.0] * 5


def test_the_share_decided_by_rules_stands_beside_the_number(tmp_path):
    """Rules decide two of three answers, and the judge the third one; the question without media has no answer."""
    questions = mathvista(tmp_path)
    records = predictions(questions, ["B", "12", "1 and then 2"], "mathvista")
    summary = summarize(records)
    assert summary["decided"] == {"answers": 3, "rules": 2, "rules_share": pytest.approx(2 / 3)}
    assert "judged" not in summary
    mark = "x, mathvista (rule-based: 66.7% of 3 answers decided by rules), "
    assert [line.startswith(mark) for line in benchmark_lines("x", "mathvista", summary)] == [True, True]
    with TeacherServer(lambda request, number: completion("Answer: [1, 2]")) as server:
        judged = judge_answers(records, questions, judge_of(server), tmp_path / "x.judge.jsonl", WORLD)
    assert server.count == 1 and ["judge" in record for record in judged] == [False, False, True]
    *_, lenient, line = benchmark_lines("x", "mathvista", summarize(judged))
    assert lenient.startswith(f"{mark}lenient, in percent: mean 66.7")
    assert line == (
        "x, mathvista (judged by m: 66.7% of 3 answers decided by rules), judged, in percent: mean 100.0, score 100.0"
    )
    assert "usually scored with a language model" in paper_lines("mathvista", [1000])[0]
    assert "usually scored" not in paper_lines("mathvista", [1000], judged=True)[0]
    # A question that could not be used has no answer.
    lost = answer_record(questions[0], "c", "", settings_of("mathvista"), error="no such file")
    assert "decided" not in lost
    assert summarize([*records, lost])["decided"]["answers"] == 3
    with_lost = judge_answers(
        [*records[:2], lost], [*questions[:2], questions[0]], judge_of("http://h/v1"), tmp_path / "y", WORLD
    )
    assert [record["judged"] for record in with_lost] == [1.0, 1.0, 0.0]


def test_the_protocol_names_the_judge_and_answers_do_not_depend_on_it():
    plain = load_settings("", OF_JUDGE[:3])
    judged, other = settings_of("mathvista"), settings_of("mathvista", "evaluate.judge.model=n")
    protocols = [protocol_of(settings) for settings in (judged, plain, other)]
    assert set(protocols[0]["judge"]) == {"model", "temperature", "max_tokens", "extra_body", "prompts"}
    assert "judge" not in protocols[1] and "judge" not in protocols[1]["evaluate"]
    assert "judge.model: m, not absent" in differences_of(protocols[1], protocols[0])
    assert differences_of(protocols[0], protocols[2]) == ["judge.model: n, not m"]
    identities = [evaluation_identity(settings, [], {"path": "p"}) for settings in (judged, plain, other)]
    assert identities[0] == identities[1] == identities[2]
    # Where requests go, and how many at a time, is not part of a protocol.
    moved = settings_of("mathvista", "evaluate.judge.endpoint=http://h/v1", "evaluate.judge.max_concurrency=3")
    assert protocol_of(moved) == protocols[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluate.benchmark=mlvu"], "expected a benchmark with judged answers (mathvista, mathverse, vstar), got"),
        (["evaluate.judge.model="], "evaluate.judge.model: expected the name of a model"),
        (["evaluate.parse=strict"], "evaluate.parse: expected lenient with evaluate.judge"),
        (["evaluate.rollouts=4"], "evaluate.rollouts: expected 0 with evaluate.judge"),
        (["evaluate.judge.extra_body={n: 2}"], "evaluate.judge.extra_body: expected other fields, got 'n'"),
        (["evaluate.judge.endpoint="], "evaluate.judge.endpoint has no effect"),
        (["evaluate.judge.attempts=0"], "evaluate.judge.attempts: expected at least 1"),
        (["evaluate.judge.url=x"], "unknown setting evaluate.judge.url"),
    ],
)
def test_settings_of_a_judge_that_make_no_sense_are_refused(overrides, says):
    with pytest.raises(SettingsError) as caught:
        load_settings("", [*OF_JUDGE, *overrides])
    assert says in str(caught.value)


def test_settings_of_a_judge_for_its_client(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    monkeypatch.setenv("JUDGE_KEY", "k2")
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    made = load_settings("", [*OF_JUDGE, "evaluate.judge.extra_body={chat_template_kwargs: {enable_thinking: false}}"])
    collect, teacher = client_settings(made.evaluate.judge)
    assert collect.extra_body == extra and (collect.temperature, collect.max_concurrency) == (0.0, 16)
    assert (teacher.model, teacher.endpoints, teacher.keys) == ("m", ("http://localhost:1/v1",), ("",))
    _, named = client_settings(JudgeConfig("https://h/v1", "m", "JUDGE_KEY"))
    assert named.keys == ("k2",)
    for wrong, says in (
        (JudgeConfig("h:1", "m"), "evaluate.judge.endpoint: expected a URL such as"),
        (JudgeConfig("http://me:secret@h/v1", "m"), "variable that evaluate.judge.api_key_env names"),
        (JudgeConfig("http://h/v1", "m", "GONE"), "evaluate.judge.api_key_env: expected a key in the variable GONE"),
    ):
        with pytest.raises(SettingsError) as caught:
            client_settings(wrong)
        assert says in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="evaluate.judge.endpoint: expected none in training"):
        refuse_evaluation_only(made)
    blind = load_settings("", ["data.heldout=x", "evaluate.benchmark=mlvu", "evaluate.without_video=true"])
    with pytest.raises(SettingsError, match="evaluate.without_video: expected false in training"):
        refuse_evaluation_only(blind)


def test_another_file_is_not_taken_for_replies(tmp_path):
    path = write_json(tmp_path / "x.judge.jsonl", {"id": "1"})
    path.write_text(path.read_text() + "\n")
    with pytest.raises(JudgeError, match="1: expected 'key', 'max_tokens' and 'reply', got id"):
        judge_answers([], [], judge_of("http://h/v1"), path, WORLD)


def test_the_program_keeps_answers_if_the_judge_fails_and_continues(tmp_path, monkeypatch, capsys):
    """Two processes answer, the judge fails, and one process continues without answering or asking again.

    The second process hears from the first one again and again while the judge thinks. Neither the process that
    continues nor another judge needs the student.
    """
    folder, output = tmp_path / "made", tmp_path / "x.json"
    material = tiny_material(folder)
    # The untrained student writes line breaks only. Now a letter has their row of the head, but longer.
    weights = Path(material.model_path) / "model.safetensors"
    tensors, tokenizer = load_file(weights), Tokenizer.from_file(str(weights.with_name("tokenizer.json")))
    head = tensors["model.language_model.embed_tokens.weight"]
    head[tokenizer.encode("a").ids[0]] = 3 * head[tokenizer.encode("\n").ids[0]]
    save_file(tensors, weights, {"format": "pt"})
    clip = Path(material.heldout[0].videos[0])
    rows = [vstar_record(vid=clip.stem, question=f"What is in scene {i}?") for i in range(3)]
    annotation = write_json(tmp_path / "V_STaR_test.json", rows)
    settings = [f"model.path={material.model_path}", f"data.heldout={annotation}", f"data.media_root={clip.parent}"]
    settings += ["model.dtype=float32", "video.num_frames=4", "evaluate.benchmark=vstar", "evaluate.parse=lenient"]
    settings += ["evaluate.rollouts=0", "evaluate.max_new_tokens=8", "evaluate.prompts_per_batch=4"]
    broken = True

    def script(request, number):
        if broken and number:
            return error(400, "no more")
        return Act(completion(f"Score: {3 - number % 2}").body, delay_s=2.0 if broken else 0.0)

    def no_student(*arguments):
        raise AssertionError("the student is not needed")

    def evaluate_here(server, model: str) -> dict:
        monkeypatch.setattr(evaluation_vllm, "load_answering", no_student)
        stop = StopSignal()
        try:
            ours = [*settings, f"evaluate.judge.endpoint={server.url}", f"evaluate.judge.model={model}"]
            evaluate.evaluate(load_settings("quickstart", ours, trains=False), WORLD, stop, output)
        finally:
            stop.restore()
        return json.loads(output.read_text())

    with TeacherServer(script) as server:
        ours = [*settings, f"evaluate.judge.endpoint={server.url}", "evaluate.judge.model=m"]
        arguments = ["quickstart", *ours, "evaluate.judge.max_concurrency=1", "--output", str(output)]
        monkeypatch.chdir(tmp_path)
        helpers = [str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = environment() | {"PYTHONPATH": os.pathsep.join(helpers)}
        failed = run_program("judge_program", arguments, variables, processes=2, timeout_s=300)
        assert failed.returncode != 0 and not output.exists(), failed.stdout
        assert failed.stderr.count("reply about 2 of 3 answers, for instance refused: status") == 1, failed.stderr[
            -3000:
        ]
        # The other process got a sign of life every half second.
        assert int(re.search(r"signs of life: (\d+)", failed.stderr)[1]) >= 2, failed.stderr[-3000:]
        assert {p.name for p in tmp_path.glob("x.predictions*")} == {f"x.predictions.jsonl.part{i}" for i in (0, 1)}
        answered = {path: path.read_bytes() for path in tmp_path.glob("x.predictions*")}
        assert sum(data.count(b"\n") for data in answered.values()) == 15 + 2
        broken, before = False, server.count
        result = evaluate_here(server, "m")
        assert server.count - before == 2
        done = capsys.readouterr().out
        # Another judge reads the answers of the finished evaluation.
        first = lines(output.with_suffix(".predictions.jsonl"))
        other = evaluate_here(server, "n")
        assert server.count - before == 2 + 3
    assert result["protocol"]["judge"]["model"] == "m" and result["students"]["model"]["decided"]["judge"] == 3
    assert result["students"]["model"]["benchmark"]["judged"]["accuracy"] == 1.0
    assert "x.judge.jsonl" in done and "vstar (judged by m: what, and the means" in done
    assert len(list(tmp_path.glob("x.*"))) == 3
    second = lines(output.with_suffix(".predictions.jsonl"))
    assert len(first) == len(second) == 15 and other["students"]["model"]["decided"]["model"] == "n"
    assert other["answers_of"] == result["answers_of"]
    assert [row["response"] for row in first] == [row["response"] for row in second]
    assert sum(row.get("judge", {}).get("model") == "n" for row in second) == 3
    # Answers with other settings, or without their evaluation, are not used.
    for change in (["evaluate.max_new_tokens=9"], ["seed=5"]):
        with pytest.raises(AssertionError, match="the student is not needed"):
            settings += change
            evaluate_here(server, "n")
        for part in tmp_path.glob("*.part*"):
            part.unlink()
