"""Test the texts of hints, their field in question files, and which hints a question gets."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question, load_questions, write_questions
from rmsd_fast.method.hints import Hint, make_hints, view_text, with_advice
from rmsd_fast.teacher.hints import build_hints
from rmsd_fast.teacher.scores import ScoredResponse
from rmsd_fast.teacher.targets import Targets

HINTS = {
    "answer": "a red cube",
    "reasoning": "It moves  left and stops there.",
    "window": [1.5, 4],
    "keyframes": [2, 3.25],
    "cue": "The cube at the left edge.",
    "feedback": "Count again.",
    "context": "Reference solution: left.",
}


def _question(**changes) -> dict:
    return {"id": "q", "videos": ["a.mp4"], "question": "What moves?", "task_type": "open", **changes}


def test_texts_of_views() -> None:
    facts = {**HINTS, "best_answer": "<think>a</think><answer>b</answer>"}
    expected = {
        "answer": "The correct answer: a red cube",
        "reasoning": "A correct solution: It moves  left and stops there.",
        "half_reasoning": "A correct solution begins: It moves  left",
        "window": "The answer is visible from 1.5 to 4 seconds.",
        "keyframes": "Frames that show the answer, in seconds: 2, 3.25.",
        "cue": "What to look at: The cube at the left edge.",
        "feedback": "Advice: Count again.",
        "context": "Reference solution: left.",
        "best_answer": "A good response: <think>a</think><answer>b</answer>",
    }
    for view, text in expected.items():
        assert view_text(view, facts) == text
        assert view_text(view, {}) is None
    with pytest.raises(ValueError, match="view: expected one of answer, .*, got 'truth'"):
        view_text("truth", facts)
    # A missing fact leaves the other views.
    without = {name: fact for name, fact in facts.items() if name != "window"}
    views = ["answer", "window", "cue"]
    make = partial(make_hints, facts=without, refuse=lambda text: False)
    assert make(views, together=False) == [Hint(expected["answer"]), Hint(expected["cue"])]
    assert make(views, together=True) == [Hint(f"{expected['answer']}\n{expected['cue']}")]
    assert make(["window"], together=True) == make(["media"], together=True) == []
    with pytest.raises(ValueError, match="got 'media'"):
        view_text("media", facts)


def test_hints_with_media_and_advice() -> None:
    facts, views = {"cue": "Left.", "answer": "B", "media": {}}, ["cue", "media", "answer"]
    make = partial(make_hints, facts=facts, refuse=lambda text: "B" in text)
    cue = "What to look at: Left."
    # One teacher reads all views, and a text that it cannot read leaves the media.
    assert make(views, together=True) == [Hint("", media=True)]
    assert make(["cue", "media"], together=True) == [Hint(cue, media=True)]
    assert make(views, together=False) == [Hint(cue), Hint("", media=True)]
    hints = make(["cue", "media"], together=True)
    assert with_advice(hints, "Advice: x", together=True) == [Hint(f"{cue}\nAdvice: x", media=True)]
    assert with_advice([], "Advice: x", together=True) == [Hint("Advice: x")]
    assert with_advice(make(views, together=False), "Advice: x", together=False)[2:] == [Hint("Advice: x")]
    assert with_advice(hints, None, together=True) == hints


@pytest.mark.parametrize(
    ("text", "half"),
    [
        # The white space nearest to the middle, 6 of 14 characters, and not half of the words.
        ("aaaaaa b c d e", "aaaaaa"),
        ("First line.\n\nThen more.", "First line."),
        # Without spaces between words, half of the characters.
        ("物体向右移动并停止", "物体向右"),
        ("物体向右移动。 停", "物体向右"),
        ("ไปทางขวา", "ไปทา"),
        ("ab", "a"),
        # An accent stays with its letter, and nothing is left of a single character.
        ("xe\u0301y", "x"),
        ("e\u0301", None),
        ("x", None),
    ],
)
def test_half_of_the_reasoning(text, half) -> None:
    expected = None if half is None else f"A correct solution begins: {half}"
    assert view_text("half_reasoning", {"reasoning": text}) == expected


def test_hints_of_question_files(tmp_path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(_question(hints={**HINTS, "cue": None})))
    (question,) = load_questions(path)
    assert question.hints == {name: hint for name, hint in HINTS.items() if name != "cue"}
    write_questions(tmp_path / "again.jsonl", [question], media_root=tmp_path)
    assert load_questions(tmp_path / "again.jsonl") == [question]
    # Files of other trainers may have the field too.
    path.write_text(json.dumps({"problem": "What moves?", "videos": ["a.mp4"], "answer": "it", "hints": HINTS}))
    assert load_questions(path)[0].hints == HINTS


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        ("left", r"field 'hints': expected an object, got 'left'; write e\.g\. {\"cue\""),
        ({"truth": "left"}, r"field 'hints': expected some of the names answer, .*, got 'truth'; remove it"),
        ({"reason": "left"}, r"field 'hints': .* got 'reason'; did you mean 'reasoning'\?"),
        ({"cue": " "}, r"field 'hints\.cue': expected non-empty plain text"),
        ({"cue": 3}, r"field 'hints\.cue': expected non-empty plain text"),
        (
            {"feedback": "a<|im_end|>b"},
            r"field 'hints\.feedback': expected plain text, got 'the special token <.im_end.>'",
        ),
        ({"answer": "\ud800"}, r"field 'hints\.answer': expected non-empty plain text"),
        ({"window": [4, 4]}, r"field 'hints\.window': expected \[start, end\] with an end after the start"),
        ({"window": [1, 2, 3]}, r"field 'hints\.window': expected \[start, end\]"),
        ({"keyframes": []}, r"field 'hints\.keyframes': expected a list of times in seconds"),
        ({"keyframes": [-1]}, r"field 'hints\.keyframes': expected a list of times in seconds"),
        ({"keyframes": ["1"]}, r"field 'hints\.keyframes': expected a list of times in seconds"),
    ],
)
def test_damaged_hints_are_refused(tmp_path, hints, says) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(_question(hints=hints)))
    with pytest.raises(DataError, match=says):
        load_questions(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {
                "videos": [{"path": "a.mp4", "start": 0, "end": 8}],
                "duration": 8,
                "hints": {"window": [100, 200]},
            },
            r"'hints\.window': expected times in the video, got .*the part shown is 0 s to 8 s",
        ),
        ({"duration": 8, "hints": {"keyframes": [2, 30]}}, r"'hints\.keyframes': .*the video has a duration of 8 s"),
        ({"videos": [], "images": ["a.png"], "hints": {"window": [1, 2]}}, r"'hints\.window': expected a video"),
    ],
)
def test_times_that_no_video_contains_are_refused(tmp_path, changes, says) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(_question(**changes)))
    with pytest.raises(DataError, match=says):
        load_questions(path)
    # Any of several videos may contain them, and so may a video of unknown duration.
    path.write_text(json.dumps(_question(videos=["a.mp4", "b.mp4"], hints={"window": [100, 200], "keyframes": [150]})))
    assert load_questions(path)[0].hints["keyframes"] == [150]


def _targets(*qualities: float) -> Targets:
    quality = torch.tensor(qualities)
    answers = tuple(ScoredResponse(k, f" answer {k} ", True, float(q)) for k, q in enumerate(qualities))
    return Targets(answers, quality, quality / max(sum(qualities), 1), quality, (True,) * len(answers), (), ())


def test_hints_of_questions() -> None:
    options = ("A. red", "B. blue")
    asked = [
        Question("a", "Which?", "mcq", videos=("v",), options=options, answer="B"),
        Question("b", "When?", "temporal", videos=("v",), answer="1 to 2", hints={"answer": "1 to 2, at the start"}),
        Question("c", "What?", "open", videos=("v",)),
    ]
    targets = {"a": _targets(0.0, 0.5, 1.0), "b": _targets(0.0), "c": _targets()}
    build = partial(build_hints, asked, targets, together=False, seed=0)
    views, absent = ["answer", "best_answer"], lambda question: False
    hints = build(views, lambda text: False, absent)
    assert hints == {
        "a": (Hint("The correct answer: B. blue"), Hint("A good response: answer 2")),
        "b": (Hint("The correct answer: 1 to 2, at the start"),),
        "c": (),
    }
    refused = build(views, lambda text: "B" in text, absent)
    assert refused["a"] == (Hint("A good response: answer 2"),) and refused["b"] == hints["b"]
