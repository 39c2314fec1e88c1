"""Natural answers: what a careful reader would take, and what would be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsd_fast.method.answers import bare_options, parse_answer
from rmsd_fast.method.natural import REASONS, Unreadable, canonical_body, canonical_response, invalid_reason
from rmsd_fast.method.quality import quality_score

DRINKS = ["tea", "milk", "water", "juice"]
CLOTHES = ["a suit and tie", "a T-shirt", "a raincoat", "a police uniform"]

# (task, options, text inside <answer> or None where it is refused, the whole response)
CASES = [
    ("mcq", DRINKS, "B", " The answer is (B) milk."),
    ("mcq", DRINKS, "B", "**Answer: B**"),
    ("mcq", DRINKS, "B", "**Answer:** B. milk"),
    ("mcq", DRINKS, "B", "### Final Answer\n\n**B**"),
    ("mcq", DRINKS, "B", "<think>x</think><answer>\\boxed{B}</answer>"),
    ("mcq", DRINKS, "B", "So $\\boxed{\\text{B}}$."),
    ("mcq", DRINKS, "B", "milk"),
    ("mcq", DRINKS, "B", "<answer>Milk.</answer>"),
    ("mcq", DRINKS, "B", "reasoning here</think><answer>B</answer>"),
    ("mcq", DRINKS, "B", "<think>r</think>\nThe liquid is white. It is milk."),
    ("mcq", DRINKS, "B", "答案是B。"),
    ("mcq", DRINKS, "B", "正确答案：（B）牛奶"),
    ("mcq", DRINKS, "B", "我认为应选B"),
    ("mcq", DRINKS, "B", "选B"),
    ("mcq", DRINKS, "B", "<think>..</think><answer>选项B</answer>"),
    ("mcq", DRINKS, "B", '```json\n{"answer": "B"}\n```'),
    ("mcq", DRINKS, "B", '{"reasoning": "white", "answer": "B. milk"}'),
    ("mcq", DRINKS, None, "A or B"),
    ("mcq", DRINKS, None, "<answer>A or B</answer>"),
    ("mcq", DRINKS, None, "<answer>B. tea</answer>"),
    ("mcq", DRINKS, None, "<answer>E</answer>"),
    ("mcq", DRINKS, None, "<answer>A</answer><answer>B</answer>"),
    ("mcq", DRINKS, "B", "<answer>B</answer><answer>B</answer>"),
    ("mcq", DRINKS, None, "<answer>not B</answer>"),
    ("mcq", DRINKS, "B", "Option A is tea, which is brown. The liquid is white.\n\nB"),
    ("mcq", DRINKS, "B", "I see a white liquid.\n\nB. milk"),
    ("mcq", DRINKS, None, "Option B looks plausible, but the video is unclear."),
    ("mcq", CLOTHES, "C", "A raincoat"),
    ("mcq", CLOTHES, "C", "<answer>A raincoat</answer>"),
    ("mcq", CLOTHES, "C", "The man wears a raincoat."),
    ("mcq", CLOTHES, "A", "<answer>A) A suit and tie</answer>"),
    ("mcq", DRINKS, "B", "<answer>Ｂ</answer>"),
    ("mcq", DRINKS, "B", "<answer>The correct option is B because the liquid is white.</answer>"),
    ("mcq", DRINKS, "B", "<think>The answer might be A. No, B.</think><answer>b</answer>"),
    ("mcq", DRINKS, None, "The answer is A. Wait, actually it's B."),
    ("mcq", DRINKS, "B", "The correct answer is **B**.\n\nExplanation: the liquid is white."),
    ("mcq", None, "B", "<answer>B. The man</answer>"),
    ("mcq", None, None, "<answer>A, B</answer>"),
    ("mcq", DRINKS, "B", "<answer>B</answer> I am sure."),
    ("mcq", DRINKS, "B", "<|begin_of_box|>B<|end_of_box|>"),
    ("mcq", DRINKS, "B", "<Think>a</Think>\n<Answer> B </Answer>"),
    ("mcq", DRINKS, "B", "&lt;think&gt;x&lt;/think&gt;&lt;answer&gt;B&lt;/answer&gt;"),
    ("mcq", DRINKS, "B", "<think>x</think><answer>B"),
    ("mcq", DRINKS, "B", "<think>x</think>B</answer>"),
    ("mcq", DRINKS, "B", "Answer: B) milk"),
    ("mcq", DRINKS, "B", "The answer is option B."),
    ("mcq", DRINKS, "B", "The answer would be B, milk."),
    ("mcq", DRINKS, "B", "Final answer: B"),
    ("temporal", None, "3 to 5", "<answer>from 3s to 5s</answer>"),
    ("temporal", None, "12 to 20", "<answer>00:12-00:20</answer>"),
    ("temporal", None, "12 to 20", "<answer>00:12 to 00:20</answer>"),
    ("temporal", None, "3 to 5", "<answer>[3, 5]</answer>"),
    ("temporal", None, "3 to 5", "<answer>(3, 5)</answer>"),
    ("temporal", None, "3 to 5", "<answer>3秒到5秒</answer>"),
    ("temporal", None, "3 to 5", "<answer>从3秒到5秒</answer>"),
    ("temporal", None, "3.0 to 5.0", "<answer>3.0–5.0 s</answer>"),
    ("temporal", None, "3.0 to 5.0", "3.0-5.0"),
    ("temporal", None, "3 to 5", "between 3 and 5 seconds"),
    ("temporal", None, "65 to 72", "<answer>1 min 5 s to 1 min 12 s</answer>"),
    ("temporal", None, "60 to 120", "<answer>1 to 2 minutes</answer>"),
    ("temporal", None, "3 to 5", '{"start": 3, "end": 5}'),
    ("temporal", None, "3 to 5", "<answer>start: 3, end: 5</answer>"),
    ("temporal", None, "3 to 5", "The event starts at 3 s and ends at 5 s."),
    ("temporal", None, None, "<answer>3 to 5 and 8 to 10</answer>"),
    ("temporal", None, None, "<answer>3 and 5</answer>"),
    ("temporal", None, None, "<answer>at 3 seconds</answer>"),
    ("temporal", None, None, "<answer>frame 3 to frame 5</answer>"),
    ("temporal", None, "12 to 20", "<answer>12 to 20 (0:12-0:20)</answer>"),
    ("temporal", None, "3 to 5", "The clip is 10 seconds long. The light turns on at 3. The answer is 3 to 5 seconds."),
    ("temporal", None, "3 to 5", "<think>a</think>The light is on from 3 s to 5 s."),
    ("temporal", None, "3.5 to 7", "<answer>3.5s ~ 7s</answer>"),
    ("temporal", None, "3 to 5", "\\boxed{3 \\text{ to } 5}"),
    ("temporal", None, "3723 to 3730", "<answer>1:02:03 to 1:02:10</answer>"),
    ("temporal", None, "3 to 5", "<answer>3 TO 5</answer>"),
    ("temporal", None, "3 to 5", "<answer>3 seconds to 5 seconds.</answer>"),
    ("spatial", None, "1,2,30,40", "<answer>[1, 2, 30, 40]</answer>"),
    ("spatial", None, "1,2,30,40", "<answer>(1,2),(30,40)</answer>"),
    ("spatial", None, "1,2,30,40", "<answer><|box_start|>(1,2),(30,40)<|box_end|></answer>"),
    ("spatial", None, "1,2,30,40", '```json\n[{"bbox_2d": [1,2,30,40], "label": "dog 2"}]\n```'),
    ("spatial", None, "1,2,30,40", "x1=1, y1=2, x2=30, y2=40"),
    ("spatial", None, "1,2,30,40", '{"x1":1,"y1":2,"x2":30,"y2":40}'),
    ("spatial", None, "1,2,30,40", "<box>[[1,2,30,40]]</box>"),
    ("spatial", None, None, "[[1,2,30,40],[5,6,70,80]]"),
    ("spatial", None, "1,2,30,40", "1 2 30 40"),
    ("spatial", None, "1,2,30,40", "The bounding box is [1, 2, 30, 40]."),
    ("spatial", None, None, '{"box_2d": [2,1,40,30]}'),
    ("spatial", None, "1,2,30,40", "<answer>x1: 1, y1: 2, x2: 30, y2: 40</answer>"),
    ("spatial", None, "1,2,30,40", "bbox_2d: [1, 2, 30, 40]"),
    ("numeric", None, "3", "<answer>3 cups</answer>"),
    ("numeric", None, "1200", "<answer>1,200</answer>"),
    ("numeric", None, "3", "There are 3 cups."),
    ("numeric", None, None, "<answer>3-5</answer>"),
    ("numeric", None, None, "<answer>at least 3</answer>"),
    ("numeric", None, "3", "<answer>three</answer>"),
    ("numeric", None, "3", "<answer>About 3.</answer>"),
    ("numeric", None, "3", "I count two in the first scene and one in the second. So there are 3 cups."),
    ("numeric", None, None, "<answer>3 or 4</answer>"),
    ("numeric", None, "-3", "<answer>−3</answer>"),
    ("numeric", None, "5", "<answer>5 m²</answer>"),
    ("numeric", None, "60", "<answer>60 km/h</answer>"),
    ("numeric", None, "3", "<answer>x = 3</answer>"),
    ("numeric", None, "3", "**3**"),
    ("numeric", None, "3", "大约3个"),
    ("numeric", None, "3", "<answer>三个</answer>"),
    ("numeric", None, None, "<answer>2 cups and 3 plates</answer>"),
    ("numeric", None, "50", "<answer>50%</answer>"),
    ("numeric", None, "5", "<answer>$5</answer>"),
    ("numeric", None, "300000", "<answer>3 × 10^5</answer>"),
    ("numeric", None, None, "<answer>1/2</answer>"),
    ("numeric", None, "3", "<answer>3 (three)</answer>"),
    ("numeric", None, "2.5", "<answer>2.5 meters</answer>"),
    ("numeric", None, None, "I see several cups. One of them is red."),
    ("ocr", None, "EXIT", '<answer>"EXIT"</answer>'),
    ("ocr", None, "EXIT", 'The sign reads "EXIT".'),
    ("ocr", None, "EXIT", "<think>a</think>The text says: “EXIT”"),
    ("ocr", None, "EXIT", "EXIT"),
    ("ocr", None, "It is forbidden", "<answer>It is forbidden</answer>"),
    ("ocr", None, None, "<answer>I'm sorry, I can't read the text.</answer>"),
    ("ocr", None, "EXIT", "<answer>`EXIT`</answer>"),
    ("ocr", None, "请勿吸烟", "牌子上写着“请勿吸烟”。"),
    ("ocr", None, "Dr. No", "<answer>Dr. No</answer>"),
    ("ocr", None, "EXIT", "<answer>**EXIT**</answer>"),
    ("open", None, "A man.", "<answer>A man.</answer>"),
    ("open", None, None, "I'm sorry, but I can't view videos."),
    ("open", None, "A man walks.", "<think>x</think>A man walks."),
    ("open", None, "A man walks.", "A man walks."),
    ("open", None, "A man walks.", "I look at it. The answer is: A man walks."),
]


@pytest.mark.parametrize(("task", "options", "body", "text"), CASES)
def test_an_answer_is_read_as_a_careful_reader_would(task, options, body, text):
    found = canonical_response(text, task, options=options, finish_reason="stop")
    if body is None:
        assert found is None
        assert invalid_reason(text, task, options=options, finish_reason="stop") in REASONS
        return
    assert found.endswith(f"</think><answer>{body}</answer>")
    assert parse_answer(found, task, options) is not None
    assert canonical_response(found, task, options=options) == found
    assert invalid_reason(text, task, options=options, finish_reason="stop") is None


def answers() -> list[dict]:
    lines = (Path(__file__).parent / "natural_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_of_950_answers_no_wrong_one_turns_right_and_nearly_all_right_ones_are_found():
    """Written by people and models who had not seen the code. The goal is 90%; what is here today is held."""
    right, found = 0, 0
    for row in answers():
        given = {"options": row["options"], "finish_reason": row.get("finish_reason")}
        text = canonical_response(row["text"], row["task_type"], **given)
        quality = 0.0
        if text is not None:
            quality = quality_score(text, row["task_type"], row["answer"], options=row["options"])
            assert canonical_response(text, row["task_type"], options=row["options"]) == text
        assert (text is None) == (invalid_reason(row["text"], row["task_type"], **given) is not None)
        assert row["right"] or quality < 0.999, row
        right, found = right + row["right"], found + (row["right"] and quality > 0.999)
    assert right == 612
    assert found >= 607


def test_a_response_in_order_stays_as_it_is():
    text = "\n<think>\nWhite, so\n milk.\n</think>\n\n<answer> B </answer>\n"
    assert canonical_response(text, "mcq", options=DRINKS) == text


def test_the_reasoning_is_what_stands_before_the_answer():
    text = "It is white. The answer is B. milk"
    assert canonical_response(text, "mcq", options=DRINKS) == "<think>It is white.</think><answer>B</answer>"
    text = "White.</think>\n\nSo it is:\n<answer>(B) milk</answer> Sure."
    assert canonical_response(text, "mcq", options=DRINKS) == "<think>White.</think><answer>B</answer>"
    for text in ("B", "B. milk", "(B) milk.", "milk"):
        assert canonical_response(text, "mcq", options=DRINKS) == "<think></think><answer>B</answer>"


@pytest.mark.parametrize(
    ("text", "task", "finish_reason", "reason"),
    [
        ("", "open", "stop", "empty"),
        (" \n", "mcq", None, "empty"),
        ("<think>a</think><answer>B</answer>", "mcq", "length", "truncated"),
        ("<think>a</think><answer>B</answer>", "mcq", "content_filter", "filtered"),
        ("I'm sorry, I can't view videos.", "mcq", "stop", "refusal"),
        ("<think></think><answer>I'm sorry, I can't view videos.</answer>", "open", "stop", "refusal"),
        ("<think>I look at it", "mcq", "stop", "unfinished"),
        # What has no end may have been cut: only the server knows, or a letter tells.
        ("<think>a</think><answer>12", "numeric", None, "unfinished"),
        ("<think>a</think><answer></answer>", "numeric", "stop", "no_answer"),
        ("I look at the frames. There are many.", "mcq", "stop", "no_answer"),
        ("<answer>A</answer><answer>B</answer>", "mcq", "stop", "two_answers"),
        ("<answer>E</answer>", "mcq", "stop", "not_an_option"),
        ("<answer>soon</answer>", "temporal", "stop", "not_an_interval"),
        ("<answer>left</answer>", "spatial", "stop", "not_a_box"),
        ("<answer>many</answer>", "numeric", "stop", "not_a_number"),
        ("<answer>3-5</answer>", "numeric", "stop", "a_range"),
    ],
)
def test_reasons(text, task, finish_reason, reason):
    options = DRINKS if task == "mcq" else None
    assert invalid_reason(text, task, options=options, finish_reason=finish_reason) == reason
    assert canonical_response(text, task, options=options, finish_reason=finish_reason) is None


def test_an_answer_without_its_closing_tag_counts_where_the_server_says_that_it_is_whole():
    assert canonical_response("<think>a</think><answer>12", "numeric", finish_reason="stop").endswith(">12</answer>")
    assert canonical_response("<think>a</think><answer>B", "mcq", options=DRINKS).endswith(">B</answer>")


@pytest.mark.parametrize(
    "text", ["“" * 30_000, "<answer>" * 30_000, "the answer is " * 30_000, "1 " * 100_000, "a " * 10**6]
)
@pytest.mark.parametrize("task", ["mcq", "temporal", "spatial", "numeric", "ocr"])
def test_endless_texts_are_refused(text, task):
    """Without the bound on the text that is searched, some of these take minutes."""
    assert canonical_response(text, task) is None


@pytest.mark.parametrize(
    ("value", "task", "body"),
    [
        ("B。", "mcq", "B"),
        ("Ｂ", "mcq", "B"),
        ("(B) milk", "mcq", "B"),
        ("milk", "mcq", "B"),
        ("00:12-00:20", "temporal", "12 to 20"),
        ("3秒到5秒", "temporal", "3 to 5"),
        ('{"time": [12.3, 25.7]}', "temporal", "12.3 to 25.7"),
        ('{"boxes": [1, 2, 30, 40]}', "spatial", "1,2,30,40"),
        ("1,200", "numeric", "1200"),
        ("1.5 million", "numeric", "1500000"),
        ("3 (two men and one woman)", "numeric", "3"),
    ],
)
def test_the_body_alone(value, task, body):
    assert canonical_body(value, task, DRINKS if task == "mcq" else None) == body


def test_the_body_alone_says_why_not():
    with pytest.raises(Unreadable, match="several different answers") as caught:
        canonical_body("A or B", "mcq", DRINKS)
    assert caught.value.reason == "two_answers"
    with pytest.raises(ValueError, match="task_type: expected one of"):
        canonical_body("3", "number")


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        (["A. tea", "B. milk"], ["tea", "milk"]),
        (["A.tea", "B.milk"], ["tea", "milk"]),
        (["(A) tea", "(B) milk"], ["tea", "milk"]),
        (["[A] tea", "[B] milk"], ["tea", "milk"]),
        (["a) tea", "b) milk"], ["tea", "milk"]),
        (["A: tea", "B: milk"], ["tea", "milk"]),
        (["A - tea", "B - milk"], ["tea", "milk"]),
        (["A、茶", "B、牛奶"], ["茶", "牛奶"]),
        (["A：茶", "B：牛奶"], ["茶", "牛奶"]),
        (["A．茶", "B．牛奶"], ["茶", "牛奶"]),
        # These are texts: the letters are not those of the places, or nothing stands behind them.
        (["I. Newton", "A. Einstein"], ["I. Newton", "A. Einstein"]),
        (["A-frame", "B-road"], ["A-frame", "B-road"]),
        (["A", "B"], ["A", "B"]),
        (["A.", "B."], ["A.", "B."]),
        (["A. tea", "milk"], ["A. tea", "milk"]),
    ],
)
def test_options_without_their_letters(options, bare):
    assert bare_options(options) == bare
