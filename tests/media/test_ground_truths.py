"""Test which spellings of ground truths are read, and which are refused with a suggested spelling."""

import pytest

from rmsd_fast.data.ground_truths import GroundTruthError, read_ground_truth

DRINKS = ["tea", "milk", "red wine"]
LETTERS = ["C", "A", "B"]


@pytest.mark.parametrize(
    ("value", "options", "letter"),
    [
        ("B", DRINKS, "B"),
        (" b ", DRINKS, "B"),
        ("(B)", DRINKS, "B"),
        ("[b]", DRINKS, "B"),
        ("B.", DRINKS, "B"),
        ("B。", DRINKS, "B"),
        ("Ｂ", DRINKS, "B"),
        ("B)", None, "B"),
        ("B. milk", DRINKS, "B"),
        ("(C) Red  wine.", DRINKS, "C"),
        ("B: milk", ["A. tea", "B. milk"], "B"),
        ("B milk", DRINKS, "B"),
        ("B - milk", DRINKS, "B"),
        ("B.milk", DRINKS, "B"),
        ("\\boxed{B}", DRINKS, "B"),
        ("$\\boxed{B}$", DRINKS, "B"),
        ("Answer: B", DRINKS, "B"),
        ("答案：(B) milk", DRINKS, "B"),
        ("MILK", DRINKS, "B"),
        ("red wine.", DRINKS, "C"),
        # A letter that is not the letter of an option is read as the text of an option.
        ("X", ["X", "Y"], "A"),
        ("I", ["I", "II", "III"], "A"),
        # The letter and the text agree, or the text shows which option is meant.
        ("A", ["A", "B", "C"], "A"),
        ("A. C", LETTERS, "A"),
        ("B. A", LETTERS, "B"),
        # These numbers are not valid indices of three or four options, or they index the option whose text they match.
        ("7", ["5", "7", "9", "11"], "B"),
        (7, ["5", "7", "9", "11"], "B"),
        ("2.5", ["2.5", "3"], "A"),
        ("0", ["0", "1", "2"], "A"),
        ("4", ["1", "2", "3", "4"], "D"),
        ("2019", ["2018", "2019"], "B"),
    ],
)
def test_letters(value, options, letter):
    assert read_ground_truth(value, "mcq", options) == letter


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        # The text contains an option inside a word or a sentence, or only some words of an option.
        ("red car", ["car", "red truck"], "write the letter of the option"),
        ("It is milk", DRINKS, "write the letter"),
        ("A or B", DRINKS, "write the letter"),
        ("B is wrong", DRINKS, "write the letter"),
        ("not B", DRINKS, "write the letter"),
        ("The answer is B", DRINKS, "write the letter"),
        ("\\boxed{B or A}", DRINKS, "write the letter"),
        ("Answer: B or A", DRINKS, "write the letter"),
        ("B. tea", DRINKS, "write the letter"),
        ("B. milk and sugar", DRINKS, "write the letter"),
        ("D", DRINKS, "write the letter"),
        ("", DRINKS, "write the letter"),
        ("B. milk", None, "write the letter of the option, and nothing else"),
        (["B"], DRINKS, "write the letter"),
        (True, ["True", "False"], "write the letter"),
        # An index may also be the text of another option.
        ("1", ["2", "3", "1", "4"], "an index may count from 0 or from 1"),
        (1, DRINKS, "an index may count"),
        ("2", ["1", "2", "3", "4"], "an index may count"),
        ("(2)", DRINKS, "an index may count"),
        ("3", ["3", "5", "7", "9"], "an index may count"),
        ("12", None, "an index may count"),
        # A letter may also be the text of another option.
        ("A", LETTERS, "it may mean A or B; write the letter with its text: 'A. C'"),
        ("same", ["same", "other", "same"], "it may mean A or C; write the letter with its text: 'A. same'"),
    ],
)
def test_ambiguous_options_are_refused(value, options, message):
    with pytest.raises(GroundTruthError) as caught:
        read_ground_truth(value, "mcq", options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "value", "text"),
    [
        ("numeric", 3, "3"),
        ("numeric", -2.5, "-2.5"),
        ("numeric", "\\boxed{12}", "12"),
        ("temporal", "Answer: 3s to 5s", "3 to 5"),
        ("ocr", "Answer: 42", "Answer: 42"),
        ("open", "\\boxed{x}", "\\boxed{x}"),
        ("numeric", " 3 ", "3"),
        ("numeric", "1e3", "1e3"),
        ("numeric", "1,200", "1200"),
        ("numeric", "-1,234,567.5", "-1234567.5"),
        ("temporal", "12.5 to 20.0", "12.5 to 20.0"),
        ("temporal", "3.0 - 5.0", "3.0 to 5.0"),
        ("temporal", "3–5", "3 to 5"),
        ("temporal", "from 12.5s to 20 seconds", "12.5 to 20"),
        ("temporal", "3 sec to 5 secs", "3 to 5"),
        ("temporal", "3秒到5秒", "3 to 5"),
        ("temporal", "00:03 to 00:05", "3 to 5"),
        ("temporal", "00:12-01:20.5", "12 to 80.5"),
        ("temporal", "1:00:03 to 1:00:05", "3603 to 3605"),
        ("temporal", [12.5, 20], "12.5 to 20"),
        ("temporal", [1e-05, 5], "1e-05 to 5"),
        ("temporal", "[3, 5]", "3 to 5"),
        ("temporal", [["3", "5"]], "3 to 5"),
        ("temporal", ["00:03", "00:05"], "3 to 5"),
        ("temporal", {"start": 3, "end": 5}, "3 to 5"),
        ("temporal", {"time": [3.5, 10]}, "3.5 to 10"),
        ("temporal", '{"start_time": "0:03", "end_time": "0:05"}', "3 to 5"),
        ("spatial", "1,2,30,40", "1,2,30,40"),
        ("spatial", "1, 2, 30, 40", "1,2,30,40"),
        ("spatial", "[1, 2, 30, 40.5]", "1,2,30,40.5"),
        ("spatial", "(1,2,30,40)", "1,2,30,40"),
        ("spatial", [0, 0, 1000, 1000], "0,0,1000,1000"),
        ("spatial", [[1, 2, 30, 40]], "1,2,30,40"),
        ("spatial", {"boxes": [1, 2, 30, 40]}, "1,2,30,40"),
        ("spatial", '{"bbox_2d": [1, 2, 30, 40], "label": "cup"}', "1,2,30,40"),
        ("spatial", {"y2": 40, "x1": 1, "y1": 2, "x2": 30}, "1,2,30,40"),
        ("ocr", ' "EXIT". ', '"EXIT".'),
        ("ocr", 42, "42"),
        ("open", " text ", "text"),
    ],
)
def test_numbers_times_boxes_and_texts(task, value, text):
    assert read_ground_truth(value, task) == text


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        *(
            ("numeric", value, "write the number alone, in digits")
            for value in ("minus 3", "2 and a half", "three-quarters", "1.5M", "3 (maybe 4)", "3 cups", "three", "3%",
                          "1,2", "12,34", "0,125", "-0,500",
                          "nan", "1e999", "$3$", "", True, None, [3], {"answer": 3}, 10**400)
        ),
        *(
            ("temporal", value, "write '<start> to <end>' in seconds")
            for value in ("1 hour to 2 hours", "1 to 2 minutes", "3 to 0:05", "0:03 to 5", "frame 3 to 5", "3, 5",
                          "between 3 and 5", "3 to 5 or 7 to 9", "3 to 5 (about)", "12:70 to 12:80", "3", "soon",
                          [1, 2, 3], [3], [True, 5], [[3, 5], [7, 9]], ["0:03", 5], {"start": 3}, 3,
                          {"start": 3, "end": 5, "unit": "ms"}, {"start_frame": 3, "end_frame": 5})
        ),
        *(
            ("spatial", value, "write x1,y1,x2,y2")
            for value in ("[y1,x1,y2,x2]=[1,2,30,40]", "1 2 30 40", "(1,2),(30,40)", "x1=1, y1=2, x2=30, y2=40",
                          [1, 2, 3], [1, 2, 3, None], [[1, 2], [30, 40]], "1,2,30,40,50", {"box_2d": [1, 2, 30, 40]})
        ),
        ("spatial", '{"bbox": [1, 2, 30, 40], "format": "xywh"}', "a 'bbox' may hold x, y, width, height"),
        ("spatial", {"bbox": [1, 2, 30, 40]}, "a 'bbox' may hold x, y, width, height"),
        ("spatial", [0.1, 0.2, 0.3, 0.4], "the coordinates seem to be from 0 to 1; multiply them by 1000"),
        ("spatial", [0, 0, 1, 1], "the coordinates seem to be from 0 to 1; multiply them by 1000"),
        ("spatial", [0, 0, 1920, 1080], "from 0 to 1000 of the picture's width and height: 1000 * pixels / width"),
        ("spatial", "-5,0,100,100", "from 0 to 1000"),
        ("ocr", ["a"], "write a text"),
        ("ocr", " ", "write a text"),
        ("open", True, "write a text"),
    ],
)  # fmt: skip
def test_other_spellings_are_refused(task, value, message):
    with pytest.raises(GroundTruthError) as caught:
        read_ground_truth(value, task)
    assert message in str(caught.value)
