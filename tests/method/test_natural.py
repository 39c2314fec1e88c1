"""Test natural answers: those that a careful reader would accept, and those that are rejected."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rmsd_fast.method.answers import answer_body, bare_options, parse_answer
from rmsd_fast.method.natural import REASONS, Unreadable, canonical_response, invalid_reason
from rmsd_fast.method.natural.body import canonical_body
from rmsd_fast.method.quality import quality_score

DRINKS = ["tea", "milk", "water", "juice"]
CLOTHES = ["a suit and tie", "a T-shirt", "a raincoat", "a police uniform"]

# Each case gives the task, the options, the text inside <answer> or None if it is rejected, and the whole response.
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
    ("mcq", ["red", "yellow", "blue"], None, "<think>a</think><answer>A. yellow</answer>"),
    ("mcq", ["red", "yellow", "blue"], None, "<think>a</think><answer>(A) yellow</answer>"),
    ("mcq", ["red", "yellow", "blue"], None, "<think>a</think><answer>A) yellow</answer>"),
    ("mcq", ["red", "yellow", "blue"], None, "<think>a</think><answer>C. yellow</answer>"),
    ("mcq", DRINKS, None, "The answer is A. milk"),
    ("mcq", DRINKS, None, "The answer is (A) milk"),
    ("mcq", DRINKS, None, "The answer is C. tea"),
    ("mcq", DRINKS, None, "A\nB"),
    ("mcq", DRINKS, None, "- A\n- C"),
    ("mcq", ["white", "yellow", "purple", "grey"], None, "A. white\nB. yellow\nC. purple\nD. grey"),
    ("temporal", None, None, "- 0:06 - 0:11\n- 0:15 - 0:18"),
    ("numeric", None, None, "3 apples\n4 pears"),
    ("mcq", DRINKS, None, "If white, the answer is B; if brown, the answer is A."),
    ("mcq", DRINKS, None, "The answer is B. No, C."),
    ("mcq", DRINKS, None, "The answer is B. Sorry, C."),
    ("mcq", DRINKS, None, "The answer is B. Correction: C."),
    ("mcq", DRINKS, None, "Answer: B\nC"),
    ("mcq", DRINKS, None, "My initial answer is B. On reflection, C."),
    ("mcq", DRINKS, None, "<answer>A</answer> No, it is B."),
    ("mcq", DRINKS, None, "<answer>A</answer> (or B)"),
    ("mcq", DRINKS, None, "$\\boxed{A}$ is wrong, so B"),
    ("mcq", DRINKS, None, "The answer is \\boxed{A} or B"),
    ("mcq", DRINKS, None, "The answer is A.<answer>B</answer>"),
    ("temporal", None, None, "The answer is 3 to 5 seconds. No, 4 to 6."),
    ("mcq", DRINKS, None, "B is wrong"),
    ("mcq", DRINKS, None, "B is incorrect"),
    ("mcq", DRINKS, None, "<think>a</think><answer>B is not right</answer>"),
    ("mcq", DRINKS, None, "B seems wrong"),
    ("mcq", DRINKS, None, "B is ruled out"),
    ("mcq", DRINKS, None, "The wrong answer is B"),
    ("mcq", DRINKS, None, "I rule out B"),
    ("mcq", DRINKS, None, "The only wrong option is C."),
    ("mcq", DRINKS, None, "I would eliminate option C"),
    ("temporal", None, None, "<think>a</think><answer>3' to 5'</answer>"),
    ("temporal", None, None, '<think>a</think><answer>{"start":3,"end":5,"unit":"minutes"}</answer>'),
    ("temporal", None, None, "<think>a</think><answer>90 to 2 minutes</answer>"),
    ("temporal", None, None, "<think>a</think><answer>3 to 5 min 10 s</answer>"),
    ("temporal", None, None, "<think>a</think><answer>It starts at 3 and lasts 2 seconds.</answer>"),
    ("temporal", None, None, "<think>a</think><answer>starts at 10, stays for 5 seconds</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[y1, x1, y2, x2] = [10,20,30,40]</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[10,20,30,40] (yxyx)</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[10,20,30,40] (xywh)</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[10,20,30,40] (cxcywh)</answer>"),
    ("spatial", None, None, '<think>a</think><answer>{"bbox":[10,20,30,40],"format":"xywh"}</answer>'),
    ("spatial", None, None, "<think>a</think><answer>center (10,20), size (30,40)</answer>"),
    ("spatial", None, None, "<think>a</think><answer>(10,20), 30 wide and 40 high</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[0.1,0.2,0.3,0.4]</answer>"),
    ("spatial", None, None, "<think>a</think><answer>[0.1,0.2,0.3,0.4] (scale 0-1)</answer>"),
    ("numeric", None, None, "<think>a</think><answer>2 and a half</answer>"),
    ("numeric", None, None, "<think>a</think><answer>one and a half</answer>"),
    ("numeric", None, None, "<think>a</think><answer>three-quarters</answer>"),
    ("numeric", None, None, "<think>a</think><answer>1.5M</answer>"),
    ("numeric", None, None, "<think>a</think><answer>三四个</answer>"),
    ("numeric", None, None, "<think>a</think><answer>两三个</answer>"),
    ("numeric", None, None, "<think>a</think><answer>3 (maybe 4)</answer>"),
    ("numeric", None, None, "<think>a</think><answer>6 (seven)</answer>"),
    ("numeric", None, None, "<think>a</think><answer>the third one</answer>"),
    ("numeric", None, None, "<think>a</think><answer>x = 3 y = 4</answer>"),
    ("numeric", None, None, "<think>a</think><answer>2 PM</answer>"),
    ("mcq", None, None, "He wears a T-shirt"),
    ("mcq", None, None, "Vitamin C"),
    ("mcq", None, None, "X-ray"),
    ("mcq", None, None, "Plan B is used"),
    ("numeric", None, None, "<think>a</think><answer>٣</answer>"),
    ("temporal", None, None, "<think>a</think><answer>5 seconds to 3 seconds</answer>"),
    ("temporal", None, None, "<think>a</think><answer>from 3 for 5 seconds</answer>"),
    ("temporal", None, "3600 to 7200", "<think>a</think><answer>1 hour to 2 hours</answer>"),
    ("temporal", None, "3600 to 7200", "<think>a</think><answer>1h to 2h</answer>"),
    ("temporal", None, "10800 to 18000", "<think>a</think><answer>3 to 5 hours</answer>"),
    ("temporal", None, "3 to 5", "<think>a</think><answer>3000ms to 5000ms</answer>"),
    ("spatial", None, "10,20,30,40", "<think>a</think><answer>Top-left: (10,20); bottom-right: (30,40)</answer>"),
    ("spatial", None, "10,20,30,40", "<think>a</think><answer>[x1, y1, x2, y2] = [10,20,30,40]</answer>"),
    ("numeric", None, "-3", "<think>a</think><answer>minus 3</answer>"),
    ("numeric", None, "-3", "<think>a</think><answer>minus three degrees</answer>"),
    ("numeric", None, "-5", "The temperature is minus 5 degrees."),
    ("ocr", None, "Result: 5-3", "<think>a</think><answer>Result: 5-3</answer>"),
    ("ocr", None, 'What is "love"?', '<think>a</think><answer>What is "love"?</answer>'),
    ("ocr", None, 'This is "Radio" 5', '<think>a</think><answer>This is "Radio" 5</answer>'),
    ("ocr", None, "Answer: yes", "<think>a</think><answer>Answer: yes</answer>"),
    ("ocr", None, "I'm sorry, Dave.", "<think>a</think><answer>I'm sorry, Dave.</answer>"),
    ("ocr", None, "I can't help falling in love", "<think>a</think><answer>I can't help falling in love</answer>"),
    (
        "open",
        None,
        "Unfortunately the man can't open the door.",
        "<think>a</think><answer>Unfortunately the man can't open the door.</answer>",
    ),
    (
        "open",
        None,
        "I am unable to see a dog, only a cat.",
        "<think>a</think><answer>I am unable to see a dog, only a cat.</answer>",
    ),
    ("open", None, "The choice is hard. He walks away.", "The choice is hard. He walks away."),
    ("mcq", DRINKS, "B", "B. It is white."),
    ("mcq", DRINKS, "B", "B. The man is pouring milk"),
    ("mcq", DRINKS, "B", "<think>a</think><answer>B. The man is pouring milk</answer>"),
    ("temporal", None, "3 to 5", "One man opens the door from 3 to 5 seconds."),
    ("temporal", None, "3 to 5", "The man lifts 2 cups from 3 to 5 seconds"),
    ("temporal", None, "3 to 5", "<think>a</think><answer>3 to 5 seconds (frames 90-150)</answer>"),
    ("ocr", None, "The Beatles", "The Beatles"),
    ("ocr", None, "THE END", "THE END"),
    ("ocr", None, "I love NY", "I love NY"),
    ("ocr", None, "EXIT", "It reads EXIT"),
    ("numeric", None, "25", "<think>a</think><answer>twenty five</answer>"),
    ("numeric", None, "205", "<think>a</think><answer>two hundred and five</answer>"),
    ("numeric", None, "1000", "<think>a</think><answer>1 000</answer>"),
    ("mcq", DRINKS, "B", "The answer is **B**.\n\nExplanation: The liquid is white and opaque."),
]


@pytest.mark.parametrize(("task", "options", "body", "text"), CASES)
def test_an_answer_is_read_as_a_careful_reader_would(task, options, body, text):
    canonical = canonical_response(text, task, options=options, finish_reason="stop")
    if body is None:
        assert canonical is None
        assert invalid_reason(text, task, options=options, finish_reason="stop") in REASONS
        return
    assert canonical.endswith(f"</think><answer>{body}</answer>")
    assert parse_answer(canonical, task, options) is not None
    assert canonical_response(canonical, task, options=options) == canonical
    assert invalid_reason(text, task, options=options, finish_reason="stop") is None


def answers() -> list[dict]:
    lines = (Path(__file__).parent / "natural_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_most_right_answers_are_read_and_no_wrong_answer_counts_as_right():
    """Rows with `refuse` give no answer or two; other rows that are not right give a clear, wrong answer."""
    rows, read_rightly = answers(), 0
    for row in rows:
        arguments = {"options": row["options"], "finish_reason": row.get("finish_reason")}
        text = canonical_response(row["text"], row["task_type"], **arguments)
        quality = 0.0
        if text is not None:
            quality = quality_score(text, row["task_type"], row["answer"], options=row["options"])
            assert canonical_response(text, row["task_type"], options=row["options"]) == text
        assert (text is None) == (invalid_reason(row["text"], row["task_type"], **arguments) is not None)
        assert row["right"] or quality < 0.999, row
        assert not row.get("refuse") or text is None, row
        read_rightly += row["right"] and quality > 0.999
    right = sum(row["right"] for row in rows)
    # These are the figures that the documentation states.
    page = " ".join((Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8").split())
    assert f"{len(rows):,} answers written for this purpose: {right:,} correct ones" in page
    assert f"and {len(rows) - right:,} that are" in page
    assert f"The rules read {read_rightly:,} of the correct ones" in page


# These texts retract an answer, give another one, or distort an answer, by task; {} is the answer.
CONTRADICTIONS = {
    "mcq": ["\n\nNo, {}.", "\nSorry, it is {}.", " Wait, actually it's {}.", "\n\n{}", " Correction: {}", " (or {})"],
    "numeric": ["\n\nNo, {}.", " Correction: {}", "\n\n{}"],
    "temporal": ["\n\nNo, {}.", " Correction: {}", "\n\n{}", " No, it is from {}."],
    "spatial": ["\n\nNo, {}.", " Correction: {}", "\n\n{}"],
}
DISTORTIONS = {
    "mcq": ["not {0}", "{0} is wrong", "{0} or {1}", "{0} ({1})", "{0} and {1}", "{0}, {1}", "either {0} or {1}"],
    "numeric": ["not {0}", "{0} or {1}", "{0}-{1}", "{0} to {1}", "at least {0}", "{0} ({1})", "{0}, maybe {1}"],
    "temporal": ["not {0}", "{0} or {1}", "{0}, {1}", "{0} and {1}", "{0} frames", "{0} hundred", "{0} %"],
    "spatial": ["not {0}", "[{0}] or {1}", "[{0}], {1}", "{0} px", "[{0}] (xywh)", "center {0}", "[y1,x1,y2,x2]=[{0}]"],
}


def another(answer: str, task: str) -> str:
    if task == "mcq":
        return "A" if answer == "B" else "B"
    return {"numeric": lambda: str(int(float(answer)) + 7), "temporal": lambda: "900 to 905"}.get(
        task, lambda: "[1, 2, 3, 4]"
    )()


def test_no_right_answer_is_read_next_to_a_second_answer():
    checked = 0
    for row in answers():
        task, options = row["task_type"], row["options"]
        arguments = {"options": options, "finish_reason": row.get("finish_reason")}
        text = canonical_response(row["text"], task, **arguments)
        # After a sentence that only describes, a bare answer is the answer and not a second answer.
        alone = "<answer>" in row["text"].lower() or "answer is" in row["text"].lower()
        if not row["right"] or task in ("ocr", "open") or text is None:
            continue
        answer = answer_body(text).strip()
        other = another(answer, task)
        if alone and not row["text"].rstrip().endswith("|>"):
            for tail in CONTRADICTIONS[task]:
                assert canonical_response(row["text"] + tail.format(other), task, **arguments) is None, (row, tail)
                checked += 1
        for form in DISTORTIONS[task]:
            distorted = form.format(answer, other)
            for whole in (distorted, f"<think>a</think><answer>{distorted}</answer>"):
                assert canonical_response(whole, task, options=options, finish_reason="stop") is None, whole
                checked += 1
    assert checked > 8_000


# These texts make a right answer unclear and were written without looking at the rules. {} and {0} are the right
# answer, and {1} is another answer.
DENIED = """not {} | It is not {} | It isn't {} | {} is wrong | {} is incorrect | {} is false | definitely not {}
never {}
anything but {} | everything except {} | neither {} | {} (wrong) | {}, which is wrong | {} - wrong | {} is not right
I disagree with {} | {} can be ruled out | {} would be wrong | it cannot be {} | far from {} | opposite of {}
不是{} | 并非{}
{}不对 | {}是错的 | {}错误 | nicht {} | pas {} | no {} | {}, incorrect | {} ❌ | {} was a mistake | rejecting {}
instead of {}
{} is impossible | {} is invalid | {} does not hold | {} doesn't apply | {} isn't it | ~~{}~~ | hardly {} | unlike {}
other than {} | contrary to {} | {} is excluded | {} fails"""
DOUBTED = """maybe {} | perhaps {} | possibly {} | {}? | {} (?) | {} maybe | {}, perhaps | {} I guess | I guess {}
my guess: {}
{} (not sure) | {}, not sure | unsure: {} | {} or something else | could be {} | might be {} | may be {}
let's say {}
{} if I had to guess | {} but I am not sure | {}, but uncertain | {} (uncertain) | {} (unclear) | {} (tentative)
tentatively {}
{} (low confidence) | I suspect {} | I suppose {} | presumably {} | supposedly {} | it seems like {}
conceivably {} | arguably {}
{} unless I missed something | I cannot tell, {} | hard to say, {} | unknown, {} | 可能{} | 也许{} | {}？
{}（不确定） | 或许{} | 猜测{}
不确定，{} | vielleicht {} | quizás {} | peut-être {} | either {} or not | {} or not | if anything, {}
{} is my best guess
{} with low confidence | {} is questionable | {} is debatable | I doubt {} | doubtful: {} | {}, hopefully
{} at a guess"""
CORRECTED = """{0} no wait {1} | {0}, actually {1} | {0}... {1} | {0} -> {1} | {0}; {1} | {0} / {1} | {0} and {1}
{0} or {1}
{0}, or {1} | {0} rather {1} | {0}, I mean {1} | {0} sorry {1} | first {0}, then {1} | {0} (or {1})
{0} (previously {1})
{0} vs {1} | {0} but {1} is possible | {0} corrected to {1} | {0} edit: {1} | {0}或{1} | {0}还是{1} | {0}，不对，{1}
{0} → {1}
{0} (alternatively {1}) | {0} & {1} | {0} + {1}"""
TAKEN_BACK = """Edit: {1} | Actually {1}. | No, {1}. | Correction: {1} | I was wrong, it is {1}. | It should be {1}.
Or {1}.
On second thought, {1}. | Update: {1} | Wait, {1}. | Sorry, {1}. | Scratch that. | Ignore that. | That was wrong.
Never mind.
I take that back. | Not sure though. | I am not certain. | But I could be wrong. | But it might be {1}.
Alternatively {1}.
The right answer is {1}. | Final answer: {1} | More precisely, {1}. | That is incorrect. | I misspoke: {1}
不对，应该是{1}。
Let me correct that: {1}. | 更正：{1} | 其实是{1}。 | Please ignore my answer. | This is a guess.
I changed my mind. | Rather {1}.
My apologies, the answer is {1}. | Then again, {1}. | It is actually {1}. | Make that {1}."""
MEASURED = {
    "mcq": "",
    "numeric": """{} hundred | {} thousand | {} million | {} trillion | {} lakh | {} crore | {} dozen | {}k | {}M
{}B | {}T | {} mn
{}e3 | {}² | {}/4 | 1/{} | -{} | - {} | −{} | minus {} | negative {} | 负{} | 零下{} | {}万 | {}千 | {}百 | {}亿
{}倍 | {}成 | {}半
{},5 | {}+ | +{} more | {}-ish | {} or more | {} or so | at least {} | at most {} | more than {} | less than {}
over {} | under {}
above {} | below {} | up to {} | nearly {} | almost {} | min {} | max. {} | minimum of {} | > {} | < {} | >= {}
≤{} | ±{} | {} ± 1
no more than {} | exceeding {} | in excess of {} | upwards of {} | {} and counting | {} and above | {} plus
{} minus 1 | {} times 2
2×{} | twice {} | half of {} | {} squared | {} cubed | √{} | {} pairs | {} to 9 | {}~9 | {} of 9 | {} out of 9
{}:1 | {}rd | No. {}
#{} | the {} others | another {} | {} more | {} fewer | {} extra | {} tenths | {}个以上 | 至少{} | 最多{} | 超过{}
不到{} | 将近{}
第{} | {}多个 | {}几个 | {}余 | {}分之一 | {}双 | {}打 | every {} | frame {} | step {} | scene {} | {} zillion
{} gross | {} fold
tens of {} | {} Millionen | {} Mrd. | {} mille | {} each | {} per cup""",
    "temporal": """frames {} | {} frames | {} hours | {} days | {} ms | {} percent | {} % | {} people | {} meters
{} steps | {} times
{} of the video length | {} seconds long | lasts {} | for {} | takes {} | a duration of {} | duration: {}
the last {} | the first {}
within {} | in {} | {} later | {} earlier | {} before the end | {} from the end | after {} | before {} | every {}
{} apart
score {} | scenes {} | chapter {} | pages {} | {} years | {} am | {} o'clock | {} beats | {} hundred | minus {}
-{} | outside {}
{} ± 1 | at least {} | until {} | since {} | starts {} | starts between {} | ends {} | 持续{} | 时长{} | 最后{}
前{} | {}后 | {}前
{}帧 | {}人 | {}次 | {} fps | {} units | {} or so | {} remaining | {} on the scoreboard | {} to 9 | 1 to {}
{}, 7 to 9 | 7 to 9, {}
{} x 2 | half of {} | {} counted from the goal | {} relative to the cut | {} in length | delay of {} | waits {}
a gap of {}
{} (frames) | {} (in minutes) | {} ago | {} per second""",
    "spatial": """{} px | {} pixels | in pixels {} | {} (xywh) | {} (cxcywh) | {} (yxyx) | {} (COCO) | {} (YOLO)
{} % | {} percent
{} normalized | {} / 1000 | {} * 2 | {} in a 640x480 image | 640x480: {} | {} cm | center {} | center: {} | size {}
points {}
polygon {} | line {} | outside {} | -{} | {} ± 5 | {} rotated by 90 | {} flipped | (y1,x1,y2,x2) = {} | x,y,w,h = {}
ymin,xmin,ymax,xmax: {} | {} (top, left, bottom, right) | {} (left, top, width, height) | {} scaled to 500
{} on a 0-100 scale
{} on a 0-1 scale | {} relative to the crop | {} of the cropped image | {} or larger | from {}
The dog moves from {} | vector {}
{} and [5,6,70,80] | {} offset by 10 | margin {} | shift {} | RGBA {} | {} inches | no dog, {} | the wrong box is {}
the old box {}
{} minus 5 | {} relative | {} (absolute) | previously {} | {} million | {}e2""",
}
RIGHT_BODIES = {
    "mcq": [("B", "C"), ("milk", "juice"), ("B. milk", "C"), ("(B)", "(C)"), ("option B", "C"),
            ("Yes", "No"), ("No", "Yes")],
    "numeric": [("3", "7"), ("three", "seven"), ("3 cups", "7 cups"), ("three cups", "7"), ("3个", "7个")],
    "temporal": [("3 to 5", "20 to 30"), ("3 to 5 seconds", "20 to 30"), ("from 3s to 5s", "20 to 30"),
                 ("[3, 5]", "[20, 30]"),
                 ("between 3 and 5 seconds", "20 to 30 s"), ("3秒到5秒", "20秒到30秒")],
    "spatial": [("[1,2,30,40]", "[5,6,70,80]"), ("1,2,30,40", "5,6,70,80"), ("(1,2),(30,40)", "[5,6,70,80]")],
}  # fmt: skip
UNKNOWN_KEYS = ('"unit": "million"', '"sign": "negative"', '"correct": false', '"exact": false', '"scale": 10',
                '"or": "7"', '"format": "xywh"', '"negated": true', '"frames": true', '"alternative": "C"')  # fmt: skip


def forms(*lists: str) -> list[str]:
    return [form.strip() for text in lists for line in text.splitlines() for form in line.split(" | ") if form.strip()]


def changed_texts(task: str, body: str, other: str) -> list[str]:
    """Return responses in which a right answer is denied, doubted, in another unit, corrected or retracted."""
    measured, texts = forms(MEASURED[task]), []
    # "3 cups million" and "the last from 3s to 5s" are not English.
    if task == "numeric" and body not in ("3", "three"):
        measured = [form for form in measured if not form.startswith("{}")]
    if task == "temporal" and body.startswith(("from", "between")):
        measured = [form for form in measured if form.startswith("{}")]
    for form in forms(DENIED, DOUBTED, CORRECTED) + measured:
        changed = form.format(body, other)
        texts += [changed, f"<think>a</think><answer>{changed}</answer>"]
        texts.append(form.replace("{0}", "{}").replace("{}", f"\\boxed{{{body}}}").replace("{1}", other))
    for tail in forms(TAKEN_BACK):
        tail = tail.format(body, other)
        texts += [f"<think>a</think><answer>{body}</answer> {tail}", f"{body}. {tail}", f"{body}\n\n{tail}"]
    for key in UNKNOWN_KEYS:
        record = f'{{"answer": {json.dumps(body)}, {key}}}'
        texts += [record, f"<think>a</think><answer>{record}</answer>"]
    return [*texts, f'{{"answer": {json.dumps(body)}, "answer": {json.dumps(other)}}}']


@pytest.mark.parametrize("task", RIGHT_BODIES)
def test_no_right_answer_is_read_if_it_is_denied_doubted_or_corrected(task):
    checked, misread = 0, []
    for body, other in RIGHT_BODIES[task]:
        options = None if task != "mcq" else ["Yes", "No"] if body in ("Yes", "No") else DRINKS
        arguments = {"options": options, "finish_reason": "stop"}
        right = answer_body(canonical_response(f"<think>a</think><answer>{body}</answer>", task, **arguments)).strip()
        for text in changed_texts(task, body, other):
            read = canonical_response(text, task, **arguments)
            misread += [text] if read is not None and answer_body(read).strip() == right else []
            checked += 1
    assert not misread, misread
    assert checked > 1_000


READ_IN_A_PICTURE = [
    "It says here that you were fired.",
    "The sign says we can't park here",
    "It says nothing",
    "The title is: Dune",
    "The label shows love",
    "It reads like a book",
    "Please share this video",
    "No image available",
    "There is no sign of life",
    "It is unclear who won",
    "看不清的世界",
    "Error: rate limit",
    "I must decline.",
    "I can't swim",
    "I'm sorry, I love you",
    "Sorry, we're closed",
    "Sorry, no video",
    "No video recording",
    "Please do not share",
    "Please share",
    "Please upload your CV here",
    "As an AI company we care",
    "Could you send help?",
    "Not available",
    "The text message",
    "This sign says it all",
    "The sign shows the way",
    "The board reads minds",
    "It says: no",
    "Text: hello",
    "Error: 404",
    "Error 404 not found",
    "Error: disk full",
    "There is no text like this",
    "No text, no call",
    "unclear",
    "Unreadable books",
    "I must decline your offer",
    "It might be love",
    "It could be you",
    "Maybe it's you",
    "Or else",
    "EXIT or DIE",
    "'Round midnight",
    'A "B" C',
    'Title: "X"',
    'The title reads "X" and more',
    "Serial number: QX-11",
    'The "Old" Book Shop',
    "The clock shows noon",
    "the answer is 42",
    "He can't see me",
    "We cannot process refunds",
    "We can't open",
    "We couldn't open the door",
    "无法通行",
    "看不清请勿入内",
    "无法识别请重试",
    "我不能没有你",
    "我看不到你",
    "没有视频的日子",
    "对不起，不能停车",
    "对不起我爱你，无法忘记你",
]
DESCRIPTIONS = [
    "A man says sorry and leaves the room.",
    "The man apologizes because he can't process the payment.",
    "The woman cannot determine who is at the door, so she waits.",
    "There is no video call; they talk by phone.",
    "No image is visible on the screen, which stays black.",
    "The video could not be loaded on her laptop, so she restarts it.",
    "Error messages appear on the screen.",
    "I don't see any image on the wall.",
    'He asks: "Could you send me the file?"',
    "Please note that the man leaves.",
    "The assistant must decline the offer.",
    "As an AI robot, the character learns to love.",
    'She says: "I can\'t see anything".',
    "He cannot open the video file, so he calls a friend.",
    "None of the guests notice the dog.",
    "无法判断的是他的表情，他站在窗边。",
    "他说他看不到视频，于是离开了。",
    "抱歉的表情出现在他脸上，他没有说话。",
]
REFUSALS = [
    "I'm sorry, but I cannot view the video.",
    "Unfortunately, I'm unable to access the video.",
    "I am unable to process videos.",
    "I'm not able to watch the clip.",
    "As a language model, I can't view media.",
    "I cannot see the video you mentioned.",
    "It appears that no video was attached.",
    "There is no video attached to your message.",
    "I don't have access to the video.",
    "I do not have the ability to view videos.",
    "Sorry, but I can't assist with that.",
    "I won't be able to help with that.",
    "I can't help with that.",
    "I can't answer that.",
    "I cannot provide a description of this video.",
    "I cannot describe the video without seeing it.",
    "Without access to the video, I can't answer.",
    "Could you please provide the video?",
    "Please provide the video so I can help.",
    "Please upload the video again.",
    "The video did not load.",
    "The video failed to load.",
    "No video found.",
    "Video unavailable.",
    "[No answer]",
    "None",
    "unknown",
    "I don't know.",
    "I do not know",
    "I'm not sure.",
    "Cannot determine.",
    "Cannot be determined.",
    "Unable to determine.",
    "Not enough information.",
    "Insufficient information to answer.",
    "抱歉，我无法观看视频。",
    "我无法查看视频内容。",
    "无法回答",
    "视频无法加载",
    "作为一个AI，我不能看视频。",
    "お答えできません。",
    "Lo siento, no puedo ver el video.",
]


@pytest.mark.parametrize("text", READ_IN_A_PICTURE)
def test_a_text_in_canonical_form_is_unchanged(text):
    response = f"<think>a</think><answer>{text}</answer>"
    assert canonical_response(response, "ocr") == response


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_a_description_of_something_unseen_is_not_a_refusal(text):
    for response in (text, f"<think>a</think><answer>{text}</answer>"):
        assert answer_body(canonical_response(response, "open", finish_reason="stop")) == text


@pytest.mark.parametrize("text", REFUSALS)
def test_an_open_question_is_not_answered_by_a_refusal(text):
    for response in (text, f"<think>a</think><answer>{text}</answer>"):
        assert invalid_reason(response, "open", finish_reason="stop") in ("refusal", "no_answer")


@pytest.mark.parametrize(
    ("text", "task", "body"),
    [
        ("In minutes:\n3 to 5", "temporal", None),
        ("Frames: <answer>3 to 5</answer>", "temporal", None),
        ("I look at the frames. <answer>3 to 5</answer>", "temporal", "3 to 5"),
        ("In millions:\n3", "numeric", None),
        ("At least:\n3", "numeric", None),
        ("Format: xywh. [1,2,30,40]", "spatial", None),
        ("xywh: <answer>1,2,30,40</answer>", "spatial", None),
    ],
)
def test_a_unit_before_an_answer_counts(text, task, body):
    read = canonical_response(text, task, finish_reason="stop")
    assert (None if read is None else answer_body(read)) == body


def test_natural_parsing_keeps_the_score_of_valid_responses():
    checked = 0
    for row in answers():
        task, options = row["task_type"], row["options"]
        if parse_answer(row["text"], task, options) is None or row.get("refuse"):
            continue
        text = canonical_response(row["text"], task, options=options)
        as_sent = quality_score(row["text"], task, row["answer"], options=options)
        assert quality_score(text, task, row["answer"], options=options) >= as_sent, row
        checked += 1
    assert checked > 200


def test_an_explanation_after_the_answer_becomes_its_reasoning():
    for text in (
        "The answer is **B**.\n\nExplanation: The liquid is white.",
        "<answer>B</answer>\nThe liquid is white.",
        "B. milk\n\nThe liquid is white.",
        "**B**\n\n**Reasoning:** The liquid is white.",
    ):
        assert (
            canonical_response(text, "mcq", options=DRINKS) == "<think>The liquid is white.</think><answer>B</answer>"
        )


def test_sentences_around_an_answer_become_its_reasoning():
    text = 'A van parks. Its door carries the word "POST".\n\nExplanation: The letters are yellow.'
    assert canonical_response(text, "ocr") == "<think>A van parks.</think><answer>POST</answer>"
    text = 'The door reads "POST". Let me know if you need more.\n'
    assert canonical_response(text, "ocr") == "<think></think><answer>POST</answer>"
    text = 'Answer: "POST"\n\nExplanation: The letters are yellow.'
    assert canonical_response(text, "ocr") == "<think>The letters are yellow.</think><answer>POST</answer>"


def test_random_marks_and_words_around_a_text_are_read_or_refused():
    words = ("The sign ", "reads ", '"', "“", "”", "**", "*", "EXIT", "\n", ": ", "not ", "> ", "`", "```", "\\boxed{",
             "}", "Answer: ", "是", "「", "」", ". ", "or ", "# ", "Text", "\ue001", "?", "Explanation: ")  # fmt: skip
    draw = random.Random(0)
    for _ in range(3_000):
        text = "".join(draw.choices(words, k=draw.randint(1, 14)))
        read = canonical_response(text, "ocr", finish_reason="stop")
        assert (read is None) == (invalid_reason(text, "ocr", finish_reason="stop") is not None), text


def test_json_may_be_part_of_a_text():
    text = 'Here is the box:\n```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "dog"}]\n```\nThe dog is brown.'
    assert canonical_response(text, "spatial") == "<think>Here is the box:</think><answer>1,2,30,40</answer>"
    text = '{"answer": "B"}\n\nNo, C.'
    assert canonical_response(text, "mcq", options=DRINKS) is None


def test_a_canonical_response_is_unchanged():
    text = "\n<think>\nWhite, so\n milk.\n</think>\n\n<answer> B </answer>\n"
    assert canonical_response(text, "mcq", options=DRINKS) == text


def test_the_reasoning_is_the_text_before_the_answer():
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
        # A text without an end may be truncated. Only the server knows, unless the answer is a letter.
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
def test_reasons_of_invalid_responses(text, task, finish_reason, reason):
    options = DRINKS if task == "mcq" else None
    assert invalid_reason(text, task, options=options, finish_reason=finish_reason) == reason
    assert canonical_response(text, task, options=options, finish_reason=finish_reason) is None


def test_an_answer_without_closing_tag_counts_if_the_server_says_it_is_complete():
    assert canonical_response("<think>a</think><answer>12", "numeric", finish_reason="stop").endswith(">12</answer>")
    assert canonical_response("<think>a</think><answer>B", "mcq", options=DRINKS).endswith(">B</answer>")


@pytest.mark.parametrize(
    "text",
    [
        *("“" * 30_000, "<answer>" * 30_000, "the answer is " * 30_000, "1 " * 100_000, "a " * 10**6, "(" * 19_000),
        *("x y\n" * 5_000, "\n{" * 9_000, "three " * 3_000, "1" * 19_000, "coordinates are in the range " * 600),
        *(
            "the answer is " * 1_400,
            "答案是" * 6_000,
            "?" + " " * 100_000 + "?",
            "<answer>" + "x " * 9_000 + "</answer>",
        ),
    ],
)
@pytest.mark.parametrize("task", ["mcq", "temporal", "spatial", "numeric", "ocr"])
def test_very_long_texts_are_refused_quickly(text, task):
    """Nonlinear searches would take minutes for some of these texts."""
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
def test_canonical_body(value, task, body):
    assert canonical_body(value, task, DRINKS if task == "mcq" else None) == body


def test_canonical_body_gives_the_reason_of_a_refusal():
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
        # These are texts: the letters are not in order, or no text follows them.
        (["I. Newton", "A. Einstein"], ["I. Newton", "A. Einstein"]),
        (["A-frame", "B-road"], ["A-frame", "B-road"]),
        (["A", "B"], ["A", "B"]),
        (["A.", "B."], ["A.", "B."]),
        (["A. tea", "milk"], ["A. tea", "milk"]),
    ],
)
def test_options_without_their_letters(options, bare):
    assert bare_options(options) == bare
