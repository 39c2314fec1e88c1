"""Test the lenient reading of benchmark answers, and the task types that only benchmarks have."""

import pytest

from rmsd_fast.method.answers import ALL_TASKS, TASK_TYPES, parse_answer, parse_answer_body
from rmsd_fast.method.exact import exact_match
from rmsd_fast.method.lenient import field_letter, final_text, lenient_response
from rmsd_fast.method.quality import agreement, boxes_iou, quality_score

OPTIONS = ["Apples.", "Candles.", "Berries.", "The three kinds are of the same number."]


def read(text: str, task: str = "mcq", options=OPTIONS, **kwargs):
    response = lenient_response(text, task, options=options if task == "mcq" else None, **kwargs)
    return None if response is None else parse_answer(response, task, options if task == "mcq" else None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**B**", "B"),
        ("<think>Apples are red. A?</think>C. Berries", "C"),
        ("<think>A</think><answer>(B)</answer>", "B"),
        ("<answer>D</answer>", "D"),
        ("The answer is B. Candles.", "B"),
        ("A. Apples - no\nB. Candles - no\nC. Berries - yes\n\nAnswer: C", "C"),
        ("Candles", "B"),
        ("\\boxed{D}", "D"),
        ("答案是C", "C"),
        # Words of these scripts may touch the letter.
        ("정답은 B입니다.", "B"),
        ("답: C입니다", "C"),
        ("이 장면에서는 초가 보입니다. 정답은 D이다.", "D"),
        ("정답은 CBC입니다.", None),
        ("B번", "B"),
        ("C가 맞습니다.", "C"),
        # Not clear to a careful reader, so the rules of the field apply: the start comes before everything else.
        ("A or B", "A"),
        ("Either B or C", "C"),
        ("E", None),
        ("I cannot tell.", None),
        ("Based on the video, none of the options is supported.", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    assert read(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B because A", "B"),
        ("it may be A, it may be C", "C"),
        ("first (A) then (B) then C. done", "B"),
        ("A: no; then B. yes ok", "A"),
        ("it is B. or maybe C: it ends", "B"),
        ("i choose D here", "D"),
        ("maybe D) or C. here", "C"),
        ("I see D here", "D"),
        ("I see “D”", "D"),
        ("it says B/C", "C"),
        ('it says "B" twice', "B"),
        ("USA. CBC: Dance", None),
        ("Apples", None),
        ("E. here", None),
    ],
)
def test_order_of_places_of_the_field(text, letter):
    assert field_letter(text, OPTIONS) == letter


def test_options_in_the_picture_have_the_letters_a_to_h():
    assert field_letter("H", None) == "H" and field_letter("I", None) is None


def test_truncated_answers_count_only_with_a_closed_block_or_a_letter_at_the_start():
    assert read("B. The video shows that the", truncated=True) == "B"
    assert read("(B)", truncated=True) == "B"
    assert read("<think>long</think><answer>C</answer> and", truncated=True) == "C"
    assert read("The answer is B because", truncated=True) is None
    assert read("A man walks into the", truncated=True) is None
    assert read("from 3 to 5", "temporal", truncated=True) is None
    # An unfinished reasoning has no answer, whatever it mentions.
    for text in ("<think>B. The video", "<think>The answer is B. Candles because", "<think><answer>B</answer>? No,"):
        assert read(text, truncated=True) is None
    assert read("<thinking>B. The video", truncated=True) is None
    assert read("<think>The answer is B") is None
    # The whole response ended, so only its tag is missing.
    assert read("<think>Candles are red. <answer>B</answer>") == "B"


def test_answers_inside_the_reasoning_do_not_count():
    assert read("<think>maybe <answer>A</answer>, no</think>B", truncated=True) == "B"
    assert read("<think>maybe <answer>A</answer>, no</think>It may be B or D, so D") == "D"
    assert read("<think>maybe <answer>A</answer>, no</think>I cannot tell.", truncated=True) is None
    assert read("<think>x is <answer>3</answer>, no</think>It is 4", "exact") == "It is 4"
    # Nothing follows the reasoning.
    assert read("<think>So <answer>A</answer></think>", "exact") == "A"


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("from 3s to 5.5s", (3.0, 5.5)),
        ("0:12 - 1:02", (12.0, 62.0)),
        ("The man enters at 12 and leaves at 20.5 seconds", (12.0, 20.5)),
        ("start 1:00:03, stop 1:00:09.5", (3603.0, 3609.5)),
        ("It starts at 3 and ends at 4, in scene 10", None),
        ("<think>1 2 3</think><answer>3 5</answer>", (3.0, 5.0)),
        ("never", None),
    ],
)
def test_intervals(text, interval):
    assert read(text, "temporal") == interval


def test_boxes_in_a_picture():
    assert read('[{"bbox_2d": [10, 20, 300, 400], "label": "cup"}]', "spatial") == (10, 20, 300, 400)
    assert read("It is (1,2),(30,40) I believe", "spatial") == (1, 2, 30, 40)
    assert read("no box", "spatial") is None


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ('{"12": [1, 2, 3, 4]}', {"12": ((1, 2, 3, 4),)}),
        (
            '```json\n{"12": [1,2,3,4], "13": [[5,6,7,8], [1,1,2,2]]}\n```',
            {"12": ((1, 2, 3, 4),), "13": ((5, 6, 7, 8), (1, 1, 2, 2))},
        ),
        ('[{"1": [1,2,3,4]}, {"2": [5,6,7,8]}]', {"1": ((1, 2, 3, 4),), "2": ((5, 6, 7, 8),)}),
        ("[[3, [1,2,3,4]]]", {"3": ((1, 2, 3, 4),)}),
        ('Sure: {"12": [1,2,3,4], "13": [5,6', {"12": ((1, 2, 3, 4),)}),
        ("{'7': [1,2,3,4]}", {"7": ((1, 2, 3, 4),)}),
        # Lists before the boxes, and text in brackets.
        ('Seconds [4, 5] have boxes: {"4": [1,2,3,4]}', {"4": ((1, 2, 3, 4),)}),
        ('[{"note": "x"}] {"boxes": {"4": [1,2,3,4]}}', {"4": ((1, 2, 3, 4),)}),
        # A code block comes before text.
        ('{"1": [0,0,1,1]} is an example.\n```json\n{"4": [1,2,3,4]}\n```', {"4": ((1, 2, 3, 4),)}),
        # Several values, of which the last one about a second counts.
        ('{"1": [0,0,1,1]}\n{"1": [1,2,3,4]}\n{"2": [5,6,7,8]}', {"1": ((1, 2, 3, 4),), "2": ((5, 6, 7, 8),)}),
        # Invalid items are left out.
        ('{"4": [1,2,3,4], "5": [1,2], "6": null, "cup": [1,2,3,4]}', {"4": ((1, 2, 3, 4),)}),
        ('{"4": [[1,2,3,4], [5,6]]}', {"4": ((1, 2, 3, 4),)}),
        # Objects with a time and a box, as Qwen3-VL writes them.
        (
            '[{"time": 3, "bbox_2d": [1,2,3,4]}, {"time": 4.0, "bbox_2d": [5,6,7,8], "label": "cup"}]',
            {"3": ((1, 2, 3, 4),), "4": ((5, 6, 7, 8),)},
        ),
        ('[{"time": "3s", "bbox_2d": [1,2,3,4]}]', {"3": ((1, 2, 3, 4),)}),
        ('[{"timestamp": "01:03", "bbox": [1,2,3,4]}]', {"63": ((1, 2, 3, 4),)}),
        (
            '[{"time": 3, "bbox_2d": [1,2,3,4]}, {"time": 3, "bbox_2d": [5,6,7,8]}]',
            {"3": ((1, 2, 3, 4), (5, 6, 7, 8))},
        ),
        ('[{"bbox_2d": [1,2,3,4]}]', None),
        # Deviations from JSON.
        ("{'7': [[1,2,3,4], [5,6,7,8]]}", {"7": ((1, 2, 3, 4), (5, 6, 7, 8))}),
        ("[{'time': 3, 'bbox_2d': [1,2,3,4]},]", {"3": ((1, 2, 3, 4),)}),
        ("{7: [1,2,3,4], 8: [5,6,7,8],}", {"7": ((1, 2, 3, 4),), "8": ((5, 6, 7, 8),)}),
        ('{"12": [1,2,3]}', None),
        ("[1,2,3,4]", None),
        ("no boxes", None),
    ],
)
def test_boxes_by_second(text, boxes):
    assert read(text, "boxes") == boxes


@pytest.mark.parametrize(
    "text",
    [
        '{"12": [1,2,3,4], "13": [[5,6,7,8], [1,1,2,2]], "14": [5,6',
        '```json\n{"12": [1,2,3,4], "13": [[5,6,7,8], [1,1,2,2]], "14": [[5,6,7,8], [',
        '[{"time": 12, "bbox_2d": [1,2,3,4]}, {"time": 13, "bbox_2d": [[5,6,7,8], [1,1,2,2]]}, {"time": 14, "bbox',
        '<think>long</think><answer>{"12": [1,2,3,4], "13": [[5,6,7,8], [1,1,2,2]], "14',
        "{'12': [1,2,3,4], '13': [[5,6,7,8], [1,1,2,2]], '14': [",
    ],
)
def test_complete_boxes_of_truncated_answers_count(text):
    assert read(text, "boxes", truncated=True) == {"12": ((1, 2, 3, 4),), "13": ((5, 6, 7, 8), (1, 1, 2, 2))}
    assert read("<think>" + text.replace("</think>", ""), "boxes", truncated=True) is None


def test_many_boxes_of_a_truncated_answer_count():
    text = "{" + ", ".join(f'"{second}": [1, 2, 3, 4]' for second in range(200)) + ', "200": [1'
    assert len(read(text, "boxes", truncated=True)) == 200
    text = "[" + ", ".join(f'{{"time": {second}, "bbox_2d": [1, 2, 3, 4]}}' for second in range(200)) + ', {"time'
    assert len(read(text, "boxes", truncated=True)) == 200


def test_exact_answers_are_found():
    assert read("<think>So 3 + 2.</think>The answer is 5 cm.", "exact") == "5 cm."
    assert read("Thus \\boxed{x=5} or so", "exact") == "x=5"
    assert read("red", "exact") == "red"
    assert read("", "exact") is None


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("5", "5", 1),
        ("5 cm", "5", 1),
        ("5 cm^2", "5", 1),
        ("x = 5", "x=5", 1),
        ("1,200", "1200", 1),
        ("3.14159", "3.14", 1),
        ("3.15", "3.14", 0),
        ("106", "105", 0),
        ("2 or 3", "2", 0),
        ("-5", "5", 0),
        ("15", "5", 0),
        ("$30^\\circ$", "30", 1),
        ("The man holds a red cup.", "a red cup", 1),
        ("The man does not hold a red cup.", "a red cup", 0),
        ("a red cupboard", "a red cup", 0),
        ("[1, 2]", "[1,2]", 1),
        ("RED", "red", 1),
        ("A b", "b", 0),
        # Whole numbers are exact.
        ("4.6", "5", 0),
        ("99.6", "100", 0),
        ("-0.4", "0", 0),
        ("5.0", "5", 1),
        (".5", "0.5", 1),
        ("it is -5", "5", 0),
        ("it is -5", "-5", 1),
        ("x = - 5", "-5", 1),
        ("\u22125", "-5", 1),
        ("\u22125", "5", 0),
        # Powers, roots and products are other values.
        ("15^2", "15", 0),
        ("10^3", "10", 0),
        ("10³", "103", 0),
        ("\\sqrt{5}", "5", 0),
        ("√5", "5", 0),
        ("2\\pi", "2", 0),
        ("2x", "2", 0),
        ("x_1 = 5 m^2", "5", 1),
        ("5 m²", "5", 1),
        ("1e3", "1000", 1),
        ("1e5000", "1", 0),
        ("1.5 \\times 10^{3}", "1500", 1),
        ("2 x 10^3 N", "2000", 1),
        ("25\\,\\text{cm}^2", "25", 1),
        ("\\frac{10}{2}", "10", 0),
        ("not 5", "5", 0),
        ("It isn't 5", "5", 0),
        # A list is not a number with thousands.
        ("100, 200", "100200", 0),
        ("100,200", "100200", 1),
        ("1,2,3", "123", 0),
        ("[1,200]", "[1, 200]", 1),
        ("1{,}200", "1200", 1),
        # The answer is yes or no as a whole.
        ("no way to know; yes", "no", 0),
        ("I have no idea", "no", 0),
        ("no way to know", "no", 0),
        ("yes and no", "yes", 0),
        ("not yes", "yes", 0),
        ("No, it is not open.", "no", 1),
        ("Yes, it is.", "yes", 1),
        ("The answer is **no**", "no", 1),
        ("false", "true", 0),
        # Numbers at the edge of a phrase are whole.
        ("-3/4", "3/4", 0),
        ("x = 5.2", "x=5", 0),
        ("so x = 5", "x=5", 1),
        ("9" * 5000, "5", 0),
        ("5 or rather " + "9" * 5000, "5", 0),
        ("1/" + "9" * 5000, "5", 0),
        ("5." + "9" * 5000, "6.0", 0),
    ],
)
def test_exact_match(answer, reference, score):
    assert exact_match(answer, reference) == score
    assert quality_score(f"<think></think><answer>{answer}</answer>", "exact", reference) == score


@pytest.mark.parametrize("task", ALL_TASKS)
def test_long_numbers_are_read_or_refused(task):
    digits = "9" * 5000
    forms = (
        "{0}",
        "{0}:00 - {0}:10",
        "{0} to 1{0}",
        "1/{0}",
        "{0}/7",
        "1e{0}",
        "10^{0}",
        "10^999999999",
        "1e999999999",
    )
    forms += ("[1,2,{0},3]", '{{"{0}": [1,2,3,4]}}', '{{"1": [1,2,3,{0}]}}', "{0} million", "0.{0}", "x = {0}")
    for form in forms:
        for text in (form.format(digits), f"<answer>{form.format(digits)}</answer>", f"It is {form.format(digits)}."):
            response = lenient_response(text, task, options=OPTIONS if task == "mcq" else None)
            assert response is None or parse_answer(response, task) is not None
            truth = {"mcq": "A", "temporal": "1 to 2", "spatial": "1,2,3,4", "boxes": '{"1": [1,2,3,4]}'}.get(task, "5")
            assert 0 <= quality_score(response or text, task, truth) <= 1


def test_viou_is_the_mean_over_annotated_boxes():
    truth = '{"3": [0, 0, 10, 10], "4": [0, 0, 10, 10], "5": [[0, 0, 10, 10], [20, 20, 30, 30]]}'
    # Second 3: IoU 1/2. Second 4: the better of two boxes, 1. Second 5: one of two annotated boxes. Second 9: ignored.
    answer = '{"3": [0, 0, 10, 5], "4": [[50, 50, 60, 60], [0, 0, 10, 10]], "5": [20, 20, 30, 30], "9": [0, 0, 1, 1]}'
    assert quality_score(f"<think></think><answer>{answer}</answer>", "boxes", truth) == pytest.approx(2.5 / 4)
    assert boxes_iou({}, {"3": ((0, 0, 1, 1),)}) == 0
    # Seconds are compared as text, as in the published script.
    assert boxes_iou({"3.0": ((0, 0, 1, 1),)}, {"3": ((0, 0, 1, 1),)}) == 0


def test_boxes_are_parsed_strictly():
    assert parse_answer_body('{"3": [1, 2, 3, 4]}', "boxes") == {"3": ((1.0, 2.0, 3.0, 4.0),)}
    for body in (
        "",
        "{}",
        "[1,2,3,4]",
        '{"3": [1, 2, 3]}',
        '{"3": [1, 2, 3, true]}',
        '{"3": [1, 2, 3, 1e999]}',
        "{3: [1]}",
    ):
        assert parse_answer_body(body, "boxes") is None


def test_tasks_of_benchmarks_are_not_tasks_of_training():
    assert ALL_TASKS == (*TASK_TYPES, "exact", "boxes")
    with pytest.raises(ValueError, match="expected a closed task"):
        agreement(["a", "b"], "exact")


def test_final_text():
    assert final_text("a</think> b") == "b"
    assert final_text("<answer>x</answer><answer> y </answer>") == "y"
    assert final_text("<answer>x") == "x"
    assert final_text("<answer>x", closed=True) is None
    assert final_text("<answer>x</answer></think>y") == "y"
    assert final_text("<think>x") is None and final_text("<think><answer>x") == "x"
    assert final_text("plain") == "plain"
