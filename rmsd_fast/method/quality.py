"""Quality of a response: q = 1[valid] * metric(response, ground truth), always within [0, 1].

Metrics by task type: option letter (mcq), interval IoU (temporal), box IoU (spatial), epsilon accuracy or mean relative
accuracy (numeric), 1 - word error rate or ANLS (ocr). Open questions have no metric: q = 1 if the response is valid.
Without ground truth, `agreement` compares the responses to a closed question with each other, and `quality_against`
compares rollouts with them.

Intervals, boxes and numbers are compared exactly, as rational numbers. A difference of exactly 0.01 in the text
therefore passes an epsilon of 0.01, and coordinates near the largest float neither overflow nor give NaN.

Sources: R-MSD (arXiv 2603.11423), quality score; mean relative accuracy: VSI-Bench (arXiv 2412.14171); ANLS: ST-VQA
(arXiv 1905.13648).
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

from .answers import (
    BENCHMARK_TASKS,
    CLOSED_TASKS,
    EXPECTED_FORMAT,
    GRADED_TASKS,
    ParsedAnswer,
    option_letters,
    parse_answer,
    parse_answer_body,
)
from .benchmark_tasks import Boxes
from .exact import exact_match
from .folding import fold_text, words_of

GroundTruth = str | float | Sequence[float]

# Thresholds of mean relative accuracy: 0.50, 0.55, … 0.95.
_MRA_THRESHOLDS = tuple(Fraction(step, 20) for step in range(10, 20))
_LIST_LENGTHS = {"temporal": 2, "spatial": 4}


def quality_score(
    text: str,
    task_type: str,
    answer: GroundTruth | None = None,
    *,
    options: Sequence[str] | None = None,
    numeric_metric: str = "epsilon",
    numeric_eps: float = 0.01,
    ocr_metric: str = "wer",
    anls_threshold: float = 0.5,
    spatial_format: str = "relative",
    size: tuple[int, int] | None = None,
) -> float:
    """Return the quality of one response, in [0, 1]; 0 for an invalid response.

    Args:
        text: the whole response.
        task_type: one of ALL_TASKS.
        answer: ground truth, as the text that belongs inside ``<answer>``. A number (numeric, ocr) or a list of 2
            (temporal) or 4 (spatial) numbers is also accepted. Required for closed tasks, ignored for ``open``.
        options: choices of an ``mcq`` question in order.
        numeric_metric: "epsilon" (1 if abs(a-b) <= numeric_eps*max(1, abs(b))) or "mra" (the share of thresholds t
            in 0.50, 0.55, … 0.95 with abs(a-b)/abs(b) < 1-t; for b = 0 only a = 0 counts).
        numeric_eps: tolerance of "epsilon", >= 0; the paper does not specify it.
        ocr_metric: "wer" (clip(1 - word error rate, 0, 1); in scripts without spaces, such as Chinese, each character
            is a word) or "anls" (1 - edit distance / longer length over characters, 0 if that ratio reaches
            anls_threshold). Both ignore case, character width, the style of quotes, the amount of white space and a
            final period.
        anls_threshold: threshold of "anls", in (0, 1].
        spatial_format: "relative" (coordinates 0-1000) or "pixel", for both response and ground truth, so the IoU needs
            no conversion. A ground truth outside the range is an error.
        size: (width, height) of the frame in pixels, the bounds of the ground truth for spatial_format="pixel".
    Returns:
        The quality.
    Raises:
        ValueError: the task or metric is unknown, a closed task has no ground truth, or the ground truth does not
            parse.
        TypeError: text is not a str, or the ground truth has another type.
    Source: R-MSD (arXiv 2603.11423), section on quality.
    """
    _check_settings(numeric_metric, numeric_eps, ocr_metric, anls_threshold, spatial_format, size)
    predicted = parse_answer(text, task_type, options)
    if task_type not in GRADED_TASKS:
        return 0.0 if predicted is None else 1.0
    # Parse the ground truth first, so that bad data is reported for every response.
    truth = parse_ground_truth(answer, task_type, options)
    if task_type == "spatial":
        _check_box_range(truth, spatial_format, size)
    if predicted is None:
        return 0.0
    return _metric(predicted, truth, task_type, numeric_metric, numeric_eps, ocr_metric, anls_threshold)


def agreement(
    texts: Sequence[str],
    task_type: str,
    *,
    options: Sequence[str] | None = None,
    numeric_metric: str = "epsilon",
    numeric_eps: float = 0.01,
    ocr_metric: str = "wer",
    anls_threshold: float = 0.5,
) -> list[float]:
    """Return how well each response to a closed question agrees with the others, in [0, 1].

    It is the mean of the task's metric between a response and each other valid response, which takes the place of the
    ground truth. It is 0 for an invalid response, and for the only valid response, since nothing agrees with it.

    Args:
        texts: the whole responses to one question.
        task_type: a closed task.
        options, numeric_metric, numeric_eps, ocr_metric, anls_threshold: as in quality_score.
    Returns:
        The agreement of each response.
    Raises:
        ValueError: the task is not closed, or a metric is unknown.
        TypeError: a text is not a str.
    """
    _check_settings(numeric_metric, numeric_eps, ocr_metric, anls_threshold, "relative", None)
    _check_closed("agreement", task_type)
    parsed = [parse_answer(text, task_type, options) for text in texts]
    scores = []
    for index, answer in enumerate(parsed):
        others = [other for at, other in enumerate(parsed) if at != index and other is not None]
        if answer is None or not others:
            scores.append(0.0)
            continue
        metric = (task_type, numeric_metric, numeric_eps, ocr_metric, anls_threshold)
        scores.append(statistics.fmean(_metric(answer, other, *metric) for other in others))
    return scores


def quality_against(
    texts: Sequence[str],
    references: Sequence[str],
    weights: Sequence[float],
    task_type: str,
    *,
    options: Sequence[str] | None = None,
    numeric_metric: str = "epsilon",
    numeric_eps: float = 0.01,
    ocr_metric: str = "wer",
    anls_threshold: float = 0.5,
) -> list[float]:
    """Return the weighted mean of the task's metric between each text and other responses, in [0, 1].

    The references take the place of the ground truth: with matching probabilities as weights, the result is the
    expected score of a rollout against the teacher response that it is paired with.

    Args:
        texts: the whole responses to score, for instance rollouts. An invalid text gets 0.
        references: the whole responses to compare with.
        weights: weight of each reference, >= 0. References of weight 0 are not read; the others must be valid.
        task_type: a closed task.
        options, numeric_metric, numeric_eps, ocr_metric, anls_threshold: as in quality_score.
    Returns:
        The score of each text; 0 if all weights are 0.
    Raises:
        ValueError: the task is not closed, a metric is unknown, the numbers of references and weights differ, or a
            reference with a weight is invalid.
        TypeError: a text is not a str.
    """
    _check_settings(numeric_metric, numeric_eps, ocr_metric, anls_threshold, "relative", None)
    _check_closed("quality_against", task_type)
    pairs = [(text, weight) for text, weight in zip(references, weights, strict=True) if weight > 0]
    parsed = [(parse_answer(text, task_type, options), weight) for text, weight in pairs]
    if invalid := [text for (text, _), (answer, _) in zip(pairs, parsed, strict=True) if answer is None]:
        raise ValueError(f"references: expected valid responses to a {task_type} question, got {invalid[0]!r}")
    total = math.fsum(weight for _, weight in parsed)
    metric = (task_type, numeric_metric, numeric_eps, ocr_metric, anls_threshold)
    scores = []
    for text in texts:
        answer = parse_answer(text, task_type, options)
        if answer is None or not parsed:
            scores.append(0.0)
            continue
        scores.append(math.fsum(weight * _metric(answer, reference, *metric) for reference, weight in parsed) / total)
    return scores


def _check_closed(name: str, task_type: str) -> None:
    if task_type not in CLOSED_TASKS:
        raise ValueError(f"{name}: expected a closed task ({', '.join(CLOSED_TASKS)}), got {task_type!r}")


def _metric(
    predicted: ParsedAnswer,
    truth: ParsedAnswer,
    task_type: str,
    numeric_metric: str,
    numeric_eps: float,
    ocr_metric: str,
    anls_threshold: float,
) -> float:
    if task_type == "mcq":
        return float(predicted == truth)
    if task_type in ("temporal", "spatial"):
        return _iou(predicted, truth)
    if task_type in BENCHMARK_TASKS:
        return boxes_iou(predicted, truth) if task_type == "boxes" else exact_match(predicted, truth)
    if task_type == "numeric":
        return (
            _epsilon_accuracy(predicted, truth, numeric_eps) if numeric_metric == "epsilon" else _mra(predicted, truth)
        )
    return _word_accuracy(predicted, truth) if ocr_metric == "wer" else _anls(predicted, truth, anls_threshold)


def parse_ground_truth(
    answer: GroundTruth | None, task_type: str, options: Sequence[str] | None = None
) -> ParsedAnswer:
    """Return the value of the ground truth of a closed task. Raise ValueError or TypeError if it is invalid."""
    expected = EXPECTED_FORMAT.get(task_type)
    if task_type not in GRADED_TASKS:
        raise ValueError(f"ground truth: expected a closed task ({', '.join(GRADED_TASKS)}), got {task_type!r}")
    if task_type == "mcq" and options is not None:
        expected += f" among {option_letters(options)}"
    if answer is None:
        raise ValueError(f"ground truth of a {task_type} question: expected {expected}, got none; add the answer")
    text = _ground_truth_text(answer, task_type, expected)
    value = parse_answer_body(text, task_type, options)
    if value is None:
        raise ValueError(f"ground truth of a {task_type} question: expected {expected}, got {answer!r}; fix the data")
    return value


def _ground_truth_text(answer: GroundTruth, task_type: str, expected: str) -> str:
    if isinstance(answer, str):
        return answer
    if _is_number(answer) and task_type in ("numeric", "ocr"):
        return repr(answer)
    if (
        isinstance(answer, list | tuple)
        and len(answer) == _LIST_LENGTHS.get(task_type)
        and all(map(_is_number, answer))
    ):
        return (" to " if task_type == "temporal" else ",").join(repr(float(value)) for value in answer)
    if isinstance(answer, list | tuple):
        raise ValueError(f"ground truth of a {task_type} question: expected {expected}, got {answer!r}; fix the data")
    raise TypeError(
        f"ground truth of a {task_type} question: expected {expected}, got {type(answer).__name__} {answer!r}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _exact(value: float) -> Fraction:
    # repr gives the shortest decimal of the float, which is the number in the text and not its binary approximation.
    return Fraction(repr(float(value)))


def _iou(predicted: tuple[float, ...], truth: tuple[float, ...]) -> float:
    """Return the IoU of two axis-aligned boxes (lows, then highs; 1 or 2 axes), or 0 if a box is empty."""
    axes = len(truth) // 2
    overlap, area_predicted, area_truth = Fraction(1), Fraction(1), Fraction(1)
    for axis in range(axes):
        low_a, high_a = _exact(predicted[axis]), _exact(predicted[axis + axes])
        low_b, high_b = _exact(truth[axis]), _exact(truth[axis + axes])
        if high_a <= low_a or high_b <= low_b:
            return 0.0
        overlap *= max(Fraction(0), min(high_a, high_b) - max(low_a, low_b))
        area_predicted *= high_a - low_a
        area_truth *= high_b - low_b
    return float(overlap / (area_predicted + area_truth - overlap))


def boxes_iou(predicted: Boxes, truth: Boxes) -> float:
    """Return vIoU: the mean over annotated boxes of the best IoU with a predicted box of the same second.

    A second without a predicted box counts 0, and predicted boxes of other seconds are ignored.

    Args:
        predicted, truth: boxes (x1, y1, x2, y2) by second; the seconds are compared as text.
    Source: V-STaR (arXiv 2503.11495), spatial IoU.
    """
    scores = [
        max((_iou(guess, box) for guess in predicted.get(second, ())), default=0.0)
        for second, boxes in truth.items()
        for box in boxes
    ]
    return math.fsum(scores) / len(scores) if scores else 0.0


def _epsilon_accuracy(predicted: float, truth: float, eps: float) -> float:
    a, b = _exact(predicted), _exact(truth)
    return float(abs(a - b) <= _exact(eps) * max(Fraction(1), abs(b)))


def _mra(predicted: float, truth: float) -> float:
    a, b = _exact(predicted), _exact(truth)
    if b == 0:
        return float(a == 0)
    error = abs(a - b) / abs(b)
    return sum(error < 1 - threshold for threshold in _MRA_THRESHOLDS) / len(_MRA_THRESHOLDS)


def word_overlap(predicted: str, truth: str) -> float:
    """Return the F1 of the words that two texts share, in [0, 1]. Word order does not matter, but repetitions do."""
    words, reference = Counter(words_of(predicted)), Counter(words_of(truth))
    shared = (words & reference).total()
    return 2 * shared / (words.total() + reference.total()) if shared else 0.0


def _word_accuracy(predicted: str, truth: str) -> float:
    words, reference = words_of(predicted), words_of(truth)
    # The distance is at least the difference in length, so a very long response does not take quadratic time.
    if len(words) >= 2 * len(reference):
        return 0.0
    return max(0.0, 1.0 - _edit_distance(words, reference) / len(reference))


def _anls(predicted: str, truth: str, threshold: float) -> float:
    a, b = fold_text(predicted), fold_text(truth)
    longest = max(len(a), len(b))
    if abs(len(a) - len(b)) >= threshold * longest:
        return 0.0
    distance = _edit_distance(a, b) / longest
    return 1.0 - distance if distance < threshold else 0.0


def _edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the Levenshtein distance of two sequences.

    Two integers store a whole row of the usual table: bit i is set if the distance increases or decreases at item i of
    `b`. Each item of `a` therefore takes a few operations on integers of len(b) bits.

    Source: Myers 1999, in the form of Hyyro 2003.
    """
    if not b:
        return len(a)
    positions: dict[str, int] = {}
    for index, item in enumerate(b):
        positions[item] = positions.get(item, 0) | 1 << index
    all_bits, last = (1 << len(b)) - 1, len(b) - 1
    increases, decreases, distance = all_bits, 0, len(b)
    for item in a:
        equal = positions.get(item, 0)
        diagonal = (((equal & increases) + increases) ^ increases) | equal | decreases
        right, left = decreases | ~(diagonal | increases), increases & diagonal
        distance += (right >> last & 1) - (left >> last & 1)
        right, left = right << 1 | 1, left << 1
        increases, decreases = (left | ~(diagonal | right)) & all_bits, right & diagonal & all_bits
    return distance


def _check_box_range(box: tuple[float, ...], spatial_format: str, size: tuple[int, int] | None) -> None:
    if spatial_format == "pixel" and size is None:
        return
    width, height = (1000, 1000) if spatial_format == "relative" else size
    if not all(0 <= value <= limit for value, limit in zip(box, (width, height, width, height), strict=True)):
        raise ValueError(
            f"ground truth of a spatial question: expected coordinates within 0..{width} x 0..{height}, got {box}; "
            "boxes in pixels need spatial_format='pixel'"
        )


def _check_settings(
    numeric_metric: str,
    numeric_eps: float,
    ocr_metric: str,
    anls_threshold: float,
    spatial_format: str,
    size: tuple[int, int] | None,
) -> None:
    if numeric_metric not in ("epsilon", "mra"):
        raise ValueError(f"numeric_metric: expected 'epsilon' or 'mra', got {numeric_metric!r}")
    if ocr_metric not in ("wer", "anls"):
        raise ValueError(f"ocr_metric: expected 'wer' or 'anls', got {ocr_metric!r}")
    if spatial_format not in ("relative", "pixel"):
        raise ValueError(f"spatial_format: expected 'relative' or 'pixel', got {spatial_format!r}")
    if not (math.isfinite(numeric_eps) and numeric_eps >= 0):
        raise ValueError(f"numeric_eps: expected a finite number >= 0, got {numeric_eps!r}")
    if not 0 < anls_threshold <= 1:
        raise ValueError(f"anls_threshold: expected a number in (0, 1], got {anls_threshold!r}")
    if size is not None and spatial_format != "pixel":
        raise ValueError("size: has no effect with spatial_format='relative'; leave it out or set 'pixel'")
    if size is not None and (len(size) != 2 or min(size) <= 0):
        raise ValueError(f"size: expected (width, height), both above 0, got {size!r}")
