"""Test the strict parsing of responses."""

import pytest

from rmsd_fast.method.answers import (
    CLOSED_TASKS,
    TASK_TYPES,
    answer_body,
    has_outer_format,
    has_task_format,
    is_empty_answer,
    parse_answer,
)
from rmsd_fast.method.answers import parse_answer_body as body


def response(answer: str, think: str = "because") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def test_task_types():
    assert TASK_TYPES == ("mcq", "temporal", "spatial", "numeric", "ocr", "open")
    assert tuple(task for task in TASK_TYPES if task != "open") == CLOSED_TASKS


@pytest.mark.parametrize(
    ("answer", "task", "value"),
    [
        ("B", "mcq", "B"),
        (" b. ", "mcq", "B"),
        ("(B)", "mcq", "B"),
        ("[b]", "mcq", "B"),
        ("12.5 to 20.0", "temporal", (12.5, 20.0)),
        ("20 to 3", "temporal", (20.0, 3.0)),
        ("\n1\tto\n2 ", "temporal", (1.0, 2.0)),
        ("100,200,300,400", "spatial", (100.0, 200.0, 300.0, 400.0)),
        ("1, 2 ,3.5,-4", "spatial", (1.0, 2.0, 3.5, -4.0)),
        ("3", "numeric", 3.0),
        ("-2.5e1", "numeric", -25.0),
        ("+.5", "numeric", 0.5),
        ("  STOP sign ", "ocr", "STOP sign"),
        ("a man\nwaves", "open", "a man\nwaves"),
    ],
)
def test_valid_responses_are_parsed(answer, task, value):
    assert parse_answer(response(answer), task) == value
    assert body(answer, task) == value
    assert has_task_format(response(answer), task)


@pytest.mark.parametrize(
    ("answer", "task"),
    [
        ("", "mcq"),
        ("BC", "mcq"),
        ("B) cat", "mcq"),
        ("B. cat", "mcq"),
        ("(B", "mcq"),
        ("B)", "mcq"),
        ("(B.)", "mcq"),
        ("1", "mcq"),
        ("\u212a", "mcq"),  # The Kelvin sign matches K under re.IGNORECASE.
        ("\u0412", "mcq"),  # This Cyrillic letter looks like B.
        ("12.5", "temporal"),
        ("12.5to20", "temporal"),
        ("12.5 - 20", "temporal"),
        ("12.5s to 20s", "temporal"),
        ("from 1 to 2", "temporal"),
        ("1 to 2 to 3", "temporal"),
        ("nan to 2", "temporal"),
        ("1 to 1e400", "temporal"),
        ("1,2,3", "spatial"),
        ("1,2,3,4,5", "spatial"),
        ("1 2 3 4", "spatial"),
        ("[1,2,3,4]", "spatial"),
        ("1,2,3,inf", "spatial"),
        ("nan", "numeric"),
        ("inf", "numeric"),
        ("-Infinity", "numeric"),
        ("1e400", "numeric"),
        ("1_000", "numeric"),
        ("1,000", "numeric"),
        ("0x10", "numeric"),
        ("\u0663", "numeric"),  # float() reads the Arabic-Indic three.
        ("\u00b2", "numeric"),  # This is superscript two.
        ("\u22125", "numeric"),  # This minus sign is not ASCII.
        ("5%", "numeric"),
        ("5 apples", "numeric"),
        ("3 4", "numeric"),
        ("1e", "numeric"),
        (".", "numeric"),
        ("--1", "numeric"),
        ("", "ocr"),
        (" \n ", "open"),
    ],
)
def test_invalid_responses_are_refused(answer, task):
    assert parse_answer(response(answer), task) is None
    assert body(answer, task) is None
    assert not has_task_format(response(answer), task)
    assert has_outer_format(response(answer))


@pytest.mark.parametrize("options", [("cat", "dog"), ("A. cat", "B. dog")])
def test_a_letter_outside_the_options_is_invalid(options):
    assert parse_answer(response("b"), "mcq", options) == "B"
    assert parse_answer(response("C"), "mcq", options) is None
    assert not has_task_format(response("C"), "mcq", options)
    assert has_task_format(response("C"), "mcq")


def test_invalid_options():
    with pytest.raises(ValueError, match="1 to 26 choices.*got 0"):
        parse_answer(response("A"), "mcq", [])
    with pytest.raises(ValueError, match="got 27"):
        parse_answer(response("A"), "mcq", ["x"] * 27)
    with pytest.raises(TypeError, match="single string"):
        parse_answer(response("A"), "mcq", "cat")
    # Bad data is reported for every response.
    with pytest.raises(ValueError, match="got 0"):
        parse_answer("no tags", "mcq", [])


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>3</answer>",
        "  \n<think>a</think>\n\n<answer>3</answer>\n",
        "<think></think><answer>3</answer>",
        "<think>a < b > c</think><answer>3</answer>",
    ],
)
def test_outer_format_holds(text):
    assert has_outer_format(text)
    assert parse_answer(text, "numeric") == 3.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "<answer>3</answer>",
        "<think>a</think>",
        "<think>a</think><answer>3",
        "<think>a<answer>3</answer>",
        "so <think>a</think><answer>3</answer>",
        "<think>a</think> so <answer>3</answer>",
        "<think>a</think><answer>3</answer> done",
        "<answer>3</answer><think>a</think>",
        "<think>a<answer>3</answer></think>",
        "<think>a</think><answer>3</answer><answer>3</answer>",
        "<think>a</think><think>b</think><answer>3</answer>",
        "<think><think>a</think></think><answer>3</answer>",
        "<think>a</think><answer><answer>3</answer></answer>",
        "<think>a<think>b</think><answer>3</answer>",
        "<think>a</think><answer><answer>3</answer>",
        "<think>a</think><answer>3<think></answer>",
        "<think>is it <answer>4</answer>?</think><answer>3</answer>",
        "<THINK>a</THINK><ANSWER>3</ANSWER>",
        "<think>a</think><answer>3</answer\n>",
    ],
)
def test_outer_format_fails(text):
    assert not has_outer_format(text)
    assert parse_answer(text, "numeric") is None


def test_task_format_asks_only_for_one_answer_block():
    assert has_task_format("I think <answer> 3 </answer>, done", "numeric")
    assert not has_task_format("I think 3", "numeric")
    assert not has_task_format("<answer>3</answer><answer>3</answer>", "numeric")
    assert not has_task_format("</answer>3<answer>", "numeric")
    assert not has_task_format("<answer>3", "numeric")


@pytest.mark.parametrize(
    ("text", "body", "empty"),
    [
        ("", None, True),
        (" \n", None, True),
        ("<answer></answer>", "", True),
        ("<think>a long thought</think><answer> \n</answer>", " \n", True),
        ("<think></think><answer>B</answer>", "B", False),
        # These are not empty, but they have no answer or several answers, so they are invalid.
        ("B", None, False),
        ("<think>cut at the lim", None, False),
        ("<think>a</think><answer>", None, False),
        ("<answer></answer><answer></answer>", None, False),
        ("</answer><answer>", None, False),
    ],
)
def test_empty_answers(text, body, empty):
    assert answer_body(text) == body
    assert is_empty_answer(text) == empty


def test_invalid_arguments():
    with pytest.raises(ValueError, match="task_type: expected one of mcq.*got 'video'"):
        parse_answer(response("3"), "video")
    with pytest.raises(ValueError, match="task_type"):
        has_task_format("3", "video")
    with pytest.raises(TypeError, match="expected str, got NoneType"):
        parse_answer(None, "numeric")


def test_long_hostile_text_is_read_in_linear_time():
    digits = "1" * 200_000
    assert body(digits, "numeric") is None  # The number overflows to infinity.
    assert body("0." + digits, "numeric") == pytest.approx(1 / 9)
    assert body("1" + " " * 200_000 + "x", "temporal") is None
    assert not has_outer_format("<think>" * 50_000)
