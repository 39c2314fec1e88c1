"""Test adaptive K and hinted answers: which answers are drawn, how they are marked, and what statistics count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from collect_runs import answers, collect_plainly, plain_questions
from teacher_server import TeacherServer, completion, question_of

from rmsd_fast.collect_run.plan import is_settled
from rmsd_fast.collect_run.store import Answer
from rmsd_fast.config import RunConfig, SettingsError, TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.pool import HINT_K, load_pool
from rmsd_fast.teacher.scores import score_pool
from rmsd_fast.teacher.summary import describe_pool

ADAPTIVE = ["collect.adaptive=true", "collect.k0=2", "collect.k=6"]


def answered(letter: str) -> str:
    return f"<think>I look.</think><answer>{letter}</answer>"


class Patterns:
    """Answers of each question in the order in which they are drawn; with a hint, B."""

    def __init__(self, **letters: str) -> None:
        self._left = {name: list(text) for name, text in letters.items()}

    def __call__(self, request, number):
        text = question_of(request)
        if "HINT" in text:
            return completion(answered("B"))
        left = self._left[f"q{text.split(' in ')[1][0]}"]
        return completion(*[answered(left.pop(0)) for _ in range(request.get("n", 1))])


def test_further_answers_only_where_the_best_one_is_not_settled(tmp_path):
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 4)
    script = Patterns(q0="BB", q1="ABBB" + "BB", q2="AAAAAA", q3="xxBBBB")
    with TeacherServer(script) as server:
        collect_plainly(questions, [server.url], out, *ADAPTIVE)
        before = server.count
        collect_plainly(questions, [server.url], out, *ADAPTIVE)
        assert server.count == before
    pool = load_pool(out)
    # q0 is settled at once; the answers of q1 differ to the end; q2 has no right answer; q3 agrees after four.
    assert [len(pool[f"q{i}"]) for i in range(4)] == [2, 6, 6, 4]
    assert [response.sampling.get("adaptive") for response in pool["q1"]] == [None, None, True, True, True, True]
    assert len({response.key for response in pool["q1"]}) == 1
    cfg = RunConfig(teacher=TeacherConfig(responses=6))
    statistics = pool_statistics(score_pool(pool, questions, cfg.teacher), questions, cfg.teacher, simulated=False)
    # Only the first two answers of each question count: BB, AB, AA and two invalid ones.
    assert statistics["all"]["responses"] == 8 and statistics["all"]["mean"] == pytest.approx(1.5 / 4)
    lines = describe_pool(questions, pool, statistics, [], cfg).lines
    assert "  not in these statistics: 10 answers drawn adaptively" in lines
    # Without `adaptive`, the same answers count for K.
    with TeacherServer() as server:
        collect_plainly(questions, [server.url], out, "collect.k=6")
    assert [len(pool) for pool in load_pool(out).values()] == [6] * 4 and server.count == 2


def test_settled():
    mcq = Question("q", "Which?", "mcq", images=("a.png",), options=("tea", "milk"), answer="B")
    cfg = TeacherConfig()

    def settled(question, *bodies: tuple[str, float | None]) -> bool:
        return is_settled(question, [Answer(k, q, bool(body), body) for k, (body, q) in enumerate(bodies)], cfg)

    assert settled(mcq, ("B", 1.0)) and settled(mcq, ("B", 1.0), ("b", 1.0)) and settled(mcq, ("", 0.0), ("B", 1.0))
    assert not settled(mcq) and not settled(mcq, ("A", 0.0)) and not settled(mcq, ("A", 0.0), ("B", 1.0))
    unlabeled = replace(mcq, answer=None)
    assert settled(unlabeled, ("B", None), ("B", None))
    assert not settled(unlabeled, ("B", None)) and not settled(unlabeled, ("B", None), ("A", None))
    opened = replace(mcq, task_type="open", options=None, answer=None)
    assert settled(opened, ("tea", None), ("milk", None)) and not settled(opened, ("", None))


def test_questions_without_a_right_answer_are_asked_with_a_hint(tmp_path):
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 3)
    script = Patterns(q0="AB", q1="AA", q2="xx")
    with TeacherServer(script) as server:
        for _ in range(2):
            collect_plainly(questions, [server.url], out, "collect.k=2", "collect.hint_empty=true")
        assert server.count == 5
    pool = answers(out)
    assert len(pool) == 8 and {place for place, r in pool.items() if r.sampling.get("hinted")} == {
        ("q1", HINT_K),
        ("q2", HINT_K),
    }
    assert pool["q1", HINT_K].quality == 1 and pool["q1", HINT_K].key.split("-")[2] != pool["q1", 1].key.split("-")[2]
    # Without the setting, hinted answers do not disturb.
    with TeacherServer() as server:
        collect_plainly(questions, [server.url], out, "collect.k=2")
        assert server.count == 0
    cfg = TeacherConfig(responses=3, hinted=True)
    scores = score_pool(load_pool(out), questions, cfg)
    assert [len(scores[f"q{i}"]) for i in range(3)] == [2, 3, 3]
    statistics = pool_statistics(scores, questions, cfg, simulated=False)
    assert statistics["all"]["responses"] == 6 and statistics["all"]["mean"] == pytest.approx(0.5 / 3)
    lines = describe_pool(
        questions, load_pool(out), statistics, [], RunConfig(teacher=TeacherConfig(responses=3))
    ).lines
    assert "  not used: 2 answers with the ground truth as a hint (teacher.hinted)" in lines


def test_hinted_answers_take_no_number_of_the_others(tmp_path):
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 1)
    with TeacherServer(Patterns(q0="AAAB")) as server:
        collect_plainly(questions, [server.url], out, "collect.k=2", "collect.hint_empty=true")
        collect_plainly(questions, [server.url], out, "collect.k=4", "collect.hint_empty=true")
    assert set(answers(out)) == {("q0", k) for k in (0, 1, 2, 3, HINT_K)}
    pool = load_pool(out)
    del pool["q0"][1]
    assert [answer.k for answer in score_pool(pool, questions, TeacherConfig(responses=4))["q0"]] == [0, 2, 3]
    cfg = TeacherConfig(responses=1, hinted=True)
    assert [answer.k for answer in score_pool(pool, questions, cfg)["q0"]] == [0, HINT_K]


def test_hinted_answers_do_not_settle_a_question(tmp_path):
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 1)
    with TeacherServer(Patterns(q0="AAAA")) as server:
        collect_plainly(questions, [server.url], out, "collect.k=1", "collect.hint_empty=true")
        collect_plainly(questions, [server.url], out, "collect.adaptive=true", "collect.k0=1", "collect.k=3")
    assert set(answers(out)) == {("q0", k) for k in (0, 1, 2, HINT_K)}


def test_k0_is_below_k(tmp_path):
    with pytest.raises(SettingsError, match=r"collect.k0: expected less than collect.k=2"):
        collect_plainly([], ["http://h/v1"], tmp_path / "p", "collect.adaptive=true", "collect.k=2")
