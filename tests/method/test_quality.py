"""Test quality metrics against hand-computed numbers."""

import random

import pytest

from rmsd_fast.method.quality import (
    _edit_distance,
    agreement,
    fold_text,
    parse_ground_truth,
    quality_against,
    quality_score,
)


def q(answer: str, task: str, truth=None, **settings) -> float:
    return quality_score(f"<think>t</think><answer>{answer}</answer>", task, truth, **settings)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("B", "B", 1.0), ("(b)", "B", 1.0), ("A", "B", 0.0), ("B.", "[b]", 1.0), ("D", "B", 0.0)],
)
def test_mcq(answer, truth, score):
    assert q(answer, "mcq", truth, options=["cat", "dog", "cow"]) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("10 to 20", "10 to 20", 1.0),
        ("10 to 20", "15 to 30", 5 / 20),
        ("0.1 to 0.3", "0.2 to 0.4", 1 / 3),  # The result is exact for the written decimals.
        ("0 to 5", "5 to 10", 0.0),
        ("20 to 10", "10 to 20", 0.0),
        ("10 to 10", "10 to 20", 0.0),
        ("0 to 100", "40 to 60", 0.2),
        ("-1e308 to 1e308", "0 to 1e308", 0.5),  # The length overflows in float64.
        ("0 to 5e-324", "0 to 5e-324", 1.0),
    ],
)
def test_temporal(answer, truth, score):
    assert q(answer, "temporal", truth) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("0,0,10,10", "0,0,10,10", 1.0),
        ("0,0,10,10", "5,5,15,15", 25 / 175),
        ("0,0,10,10", "0,0,10,20", 0.5),
        ("0,0,10,10", "10,0,20,10", 0.0),
        ("10,0,0,10", "0,0,10,10", 0.0),  # The box is inverted along one axis.
        ("0,10,10,0", "0,0,10,10", 0.0),
        ("10,10,0,0", "0,0,10,10", 0.0),  # The box is inverted along both axes, so its area would be positive.
        ("0,0,0,10", "0,0,10,10", 0.0),
        ("-1e308,-1e308,1e308,1e308", "0,0,10,10", 0.0),
    ],
)
def test_spatial(answer, truth, score):
    assert q(answer, "spatial", truth) == pytest.approx(score, abs=1e-300)


def test_pixel_boxes_by_flag():
    box = "960,540,1920,1080"
    with pytest.raises(ValueError, match="0..1000 x 0..1000.*spatial_format='pixel'"):
        q(box, "spatial", box)
    assert q(box, "spatial", box, spatial_format="pixel") == 1.0
    assert q(box, "spatial", box, spatial_format="pixel", size=(1920, 1080)) == 1.0
    assert q("960,540,1440,1080", "spatial", box, spatial_format="pixel", size=(1920, 1080)) == 0.5
    with pytest.raises(ValueError, match="0..1280 x 0..720"):
        q(box, "spatial", box, spatial_format="pixel", size=(1280, 720))


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("3", "3", 1.0),
        (
            "1.01",
            "1",
            1.0,
        ),  # The difference is 0.01 as written, but float64 subtraction would give 0.010000000000000009.
        ("1.0101", "1", 0.0),
        ("0.01", "0", 1.0),  # The scale is max(1, |b|) = 1.
        ("0.02", "0", 0.0),
        ("202", "200", 1.0),  # The error is 2 <= 0.01 * 200.
        ("203", "200", 0.0),
        ("-202", "-200", 1.0),
        ("1e308", "-1e308", 0.0),
    ],
)
def test_numeric_epsilon(answer, truth, score):
    assert q(answer, "numeric", truth) == score


def test_numeric_eps_is_a_setting():
    assert q("110", "numeric", "100", numeric_eps=0.1) == 1.0
    assert q("110", "numeric", "100", numeric_eps=0.0) == 0.0
    assert q("100", "numeric", "100", numeric_eps=0.0) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("100", "100", 1.0),
        ("110", "100", 0.8),  # 0.1 < 1-t holds for t = 0.50 ... 0.85, which is eight of ten.
        ("130", "100", 0.4),  # 0.3 is below 0.5, 0.45, 0.40 and 0.35.
        ("150", "100", 0.0),  # 0.5 < 0.5 is false.
        ("-130", "-100", 0.4),
        ("0", "0", 1.0),
        ("0.1", "0", 0.0),
    ],
)
def test_numeric_mra(answer, truth, score):
    assert q(answer, "numeric", truth, numeric_metric="mra") == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Exit  ONLY", "exit only", 1.0),
        ("exit", "exit only", 0.5),  # This is one deletion of two words.
        ("exit now only", "exit only", 0.5),  # This is one insertion.
        ("a b c d", "a x c y", 0.5),  # These are two substitutions of four words.
        ("b c d", "a b c", 1 / 3),  # This is one deletion and one insertion.
        ("x y z w v", "exit only", 0.0),  # The score is clipped, because there are more errors than words.
        ("exit only " * 50_000, "exit only", 0.0),
        ("STRASSE", "straße", 1.0),
    ],
)
def test_ocr_word_error_rate(answer, truth, score):
    assert q(answer, "ocr", truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Kitten", "kitten", 1.0),
        ("sitting", "kitten", 1 - 3 / 7),  # The distance is the textbook value of 3.
        ("abcd", "abxy", 0.0),  # 2/4 reaches the threshold.
        ("a" * 100_000, "a", 0.0),
    ],
)
def test_ocr_anls(answer, truth, score):
    assert q(answer, "ocr", truth, ocr_metric="anls") == pytest.approx(score)


def test_anls_threshold_is_a_setting():
    assert q("abcd", "ocr", "abxy", ocr_metric="anls", anls_threshold=0.6) == 0.5


def test_open_quality_is_one_if_valid_and_ignores_the_answer():
    assert q("anything", "open") == 1.0
    assert q("anything", "open", "something else") == 1.0
    assert q(" ", "open") == 0.0
    assert quality_score("anything", "open", "anything") == 0.0


def test_an_invalid_response_scores_zero():
    assert quality_score("<answer>B</answer>", "mcq", "B") == 0.0
    assert q("the answer is B", "mcq", "B") == 0.0
    assert q("C", "mcq", "B", options=["cat", "dog"]) == 0.0
    assert q("nan", "numeric", "3") == 0.0


@pytest.mark.parametrize(
    ("task", "answer", "value"),
    [
        ("numeric", 3, 3.0),
        ("numeric", 1e-7, 1e-7),
        ("temporal", [1, 2.5], (1.0, 2.5)),
        ("spatial", (1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)),
        ("ocr", 2024, "2024"),
        ("mcq", "(b)", "B"),
    ],
)
def test_ground_truths_may_be_numbers_and_lists(task, answer, value):
    assert parse_ground_truth(answer, task) == value


@pytest.mark.parametrize(
    ("task", "answer", "error", "message"),
    [
        ("mcq", "cat", ValueError, "one option letter.*got 'cat'"),
        ("mcq", "E", ValueError, "among ABC.*got 'E'"),
        ("mcq", 1, TypeError, "got int 1"),
        ("temporal", "1-2", ValueError, "'<start> to <end>'"),
        ("temporal", [1, 2, 3], ValueError, "got \\[1, 2, 3\\]"),
        ("temporal", [1, float("nan")], ValueError, "nan"),
        ("spatial", ["1", "2", "3", "4"], ValueError, "x1,y1,x2,y2"),
        ("numeric", float("inf"), ValueError, "one finite number"),
        ("numeric", True, TypeError, "got bool"),
        ("numeric", None, ValueError, "got none"),
        ("ocr", "  ", ValueError, "text that is not empty"),
        ("open", "x", ValueError, "expected a closed task"),
    ],
)
def test_invalid_ground_truth_error_states_the_expected_form(task, answer, error, message):
    options = ["x", "y", "z"] if task == "mcq" else None
    with pytest.raises(error, match=message):
        parse_ground_truth(answer, task, options)
    if task != "open":
        # The error is reported whether or not the response is valid.
        for text in ("garbage", "<think>t</think><answer>A</answer>"):
            with pytest.raises(error, match=message):
                quality_score(text, task, answer, options=options)


@pytest.mark.parametrize(
    "setting",
    [
        {"numeric_metric": "mae"},
        {"ocr_metric": "bleu"},
        {"spatial_format": "yolo"},
        {"numeric_eps": float("nan")},
        {"numeric_eps": -0.1},
        {"anls_threshold": 0.0},
        {"size": (10, 10)},
        {"size": (0, 10), "spatial_format": "pixel"},
    ],
)
def test_invalid_settings(setting):
    with pytest.raises(ValueError, match="|".join(setting)):
        q("3", "numeric", "3", **setting)


def test_scores_stay_within_zero_and_one():
    rng = random.Random(0)
    numbers = ["0", "1", "-1", "1e308", "-1e308", "1e-320", "999.5", "3"]
    for _ in range(500):
        truth = [abs(float(rng.choice(numbers[:2] + numbers[5:]))) for _ in range(4)]
        answer = [rng.choice(numbers) for _ in range(4)]
        assert 0.0 <= q(",".join(answer), "spatial", truth) <= 1.0
        assert 0.0 <= q(" to ".join(answer[:2]), "temporal", truth[:2]) <= 1.0
        assert 0.0 <= q(answer[0], "numeric", truth[0], numeric_metric="mra") <= 1.0
        assert 0.0 <= q(" ".join(answer), "ocr", truth[0]) <= 1.0


@pytest.mark.parametrize("metric", ["wer", "anls"])
def test_quotes_around_the_whole_text_are_ignored(metric):
    for text, truth in (('"EXIT"', "EXIT"), ("EXIT", "‘EXIT’"), ("“EXIT”.", "exit"), ('"EXIT"', '"EXIT"')):
        assert q(text, "ocr", truth, ocr_metric=metric) == 1.0
    # Here the quotes belong to parts of the text.
    assert q('"A" or "B"', "ocr", 'A" or "B', ocr_metric=metric) < 1.0


def test_the_edit_distance_equals_the_table_method():
    def table(a, b):
        row = list(range(len(b) + 1))
        for i, item in enumerate(a, start=1):
            diagonal, row[0] = row[0], i
            for j, other in enumerate(b, start=1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
        return row[-1]

    rng = random.Random(0)
    for _ in range(3000):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 9))] for _ in range(2))
        assert _edit_distance(a, b) == table(a, b), (a, b)
    # The texts are longer than a machine word.
    a, b = ([rng.choice("abcdef") for _ in range(length)] for length in (150, 130))
    assert _edit_distance(a, b) == table(a, b)


def test_one_final_full_stop_is_ignored():
    assert fold_text("EXIT.") == fold_text("exit 。") == "exit"
    # Several full stops are part of the text.
    assert fold_text("Wait...") == "wait.." and fold_text(".") == "."
    assert q("Wait...", "ocr", "Wait.") == 0.0 and q("Wait.", "ocr", "Wait") == 1.0


def agree(task: str, *answers: str, **settings) -> list[float]:
    return agreement([f"<think>t</think><answer>{answer}</answer>" for answer in answers], task, **settings)


@pytest.mark.parametrize(
    ("task", "answers", "scores"),
    [
        # The IoU is 2/6 for the first two, and 4/8 for either of them and the third.
        ("temporal", ["0 to 4", "2 to 6", "0 to 8"], [(1 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2, 1 / 2]),
        # An invalid answer has quality 0, and the others are not compared with it.
        ("temporal", ["0 to 4", "soon", "2 to 6"], [1 / 3, 0, 1 / 3]),
        ("temporal", ["3 to 3", "3 to 3"], [0, 0]),
        ("mcq", ["B", "(b)", "A", "B"], [2 / 3, 2 / 3, 0, 2 / 3]),
        ("mcq", ["A", "B"], [0, 0]),
        # A ground truth could not have these coordinates, but an answer can.
        ("spatial", ["0,0,2000,10", "0,0,1000,10"], [1 / 2, 1 / 2]),
        # The tolerance is 1% of the other answer: 1.01 for the first, and 1 for the second. They are 1.005 apart.
        ("numeric", ["100", "101.005"], [1, 0]),
        # One of three words is missing, or there is one word more than two.
        ("ocr", ["a b", "a b c"], [2 / 3, 1 / 2]),
        # No other answer agrees with the only valid one.
        ("mcq", ["B"], [0]),
        ("numeric", ["3", "three", ""], [0, 0, 0]),
        ("ocr", [], []),
    ],
)
def test_agreement_by_hand(task, answers, scores):
    assert agree(task, *answers) == pytest.approx(scores)


def in_format(*answers: str) -> list[str]:
    return [f"<think>t</think><answer>{answer}</answer>" for answer in answers]


def test_quality_against_weighted_references_by_hand():
    references, weights = in_format("0 to 4", "2 to 6", "soon"), [0.75, 0.25, 0.0]
    texts = [*in_format("0 to 4", "2 to 6", "1 to 5", "later"), "0 to 4"]
    # The IoU of the two references is 1/3, and that of 1 to 5 is 3/5 with both. The last two texts are invalid.
    expected = [0.75 + 0.25 / 3, 0.75 / 3 + 0.25, 0.6, 0, 0]
    assert quality_against(texts, references, weights, "temporal") == pytest.approx(expected)
    # The scale of the weights does not matter.
    assert quality_against(texts, references, [3, 1, 0], "temporal") == pytest.approx(expected)
    assert quality_against(texts, references, [0, 0, 0], "temporal") == [0.0] * 5
    assert quality_against(in_format("B"), in_format("(b)", "A"), [0.5, 0.5], "mcq", options=("x", "y")) == [0.5]
    assert quality_against(in_format("3.3"), in_format("3"), [1], "numeric", numeric_metric="mra") == [0.8]


def test_quality_against_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="quality_against: expected a closed task .* got 'open'"):
        quality_against(in_format("x"), in_format("x"), [1], "open")
    with pytest.raises(ValueError, match="references: expected valid responses to a temporal question, got '.*soon"):
        quality_against(in_format("0 to 4"), in_format("soon"), [1], "temporal")
    with pytest.raises(ValueError, match="zip"):
        quality_against(in_format("0 to 4"), in_format("0 to 4"), [1, 1], "temporal")


def test_agreement_uses_the_settings_of_the_metric():
    # The relative errors are 0.3/3.3 = 0.0909 and 0.3/3 = 0.1: below 1 - t for t up to 0.90 (9 of 10), and 0.85 (8).
    assert agree("numeric", "3", "3.3", numeric_metric="mra") == pytest.approx([0.9, 0.8])
    assert agree("mcq", "C", "C", "B", options=("x", "y")) == [0, 0, 0]
    assert agree("ocr", "sitting", "kitten", ocr_metric="anls") == pytest.approx([4 / 7, 4 / 7])
    with pytest.raises(ValueError, match="agreement: expected a closed task .* got 'open'"):
        agree("open", "x", "x")
    with pytest.raises(ValueError, match="numeric_metric"):
        agree("mcq", "A", "A", numeric_metric="mae")
