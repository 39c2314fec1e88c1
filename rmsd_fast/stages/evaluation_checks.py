"""Check that predictions have all that the summaries of `--compare` read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rmsd_fast.config import BENCHMARKS, UserError
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.stages.answer_records import REASONS


class EvaluationError(UserError, ValueError):
    """An evaluation that cannot be compared."""


def check_predictions(records: Sequence[object], where: str) -> None:
    """Raise EvaluationError if a prediction is not as `stages.answer_records` writes it.

    Args:
        records: the predictions.
        where: their file, for messages.
    """
    if not records:
        raise EvaluationError(f"{where}: expected predictions, got an empty file; evaluate again")
    for line, record in enumerate(records, 1):
        if fault := _fault_of(record):
            raise EvaluationError(f"{where}, line {line}: {fault}; evaluate again with this version")
    (name, count), *_ = Counter(record["id"] for record in records).most_common(1)
    if count > 1:
        raise EvaluationError(f"{where}: expected each question once, got {name!r} {count} times; evaluate again")


def _fault_of(record: object) -> str:
    if not isinstance(record, dict):
        return f"expected an object, got {type(record).__name__}"
    for name, (expected, is_valid) in _NEEDED.items():
        if name not in record or not is_valid(record[name]):
            return f"expected {expected} in {name!r}, got {record.get(name)!r}"
    for name, (expected, is_valid) in _OPTIONAL.items():
        if name in record and not is_valid(record[name]):
            return f"expected {expected} in {name!r}, got {record[name]!r}"
    if ("error" in record) != ("reason" in record):
        return "expected both 'error' and 'reason', got one of them"
    return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_groups(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_samples(value: object) -> bool:
    scores, answers = (value.get(name) if isinstance(value, dict) else None for name in ("score", "answers"))
    if not isinstance(scores, list) or not isinstance(answers, list) or not 0 < len(scores) == len(answers):
        return False
    return all(map(_is_score, scores)) and all(answer is None or _is_text(answer) for answer in answers)


# What is expected, and its check, by field.
_Check = tuple[str, Callable[[object], bool]]
_TEXT: _Check = ("a text", _is_text)
_SCORE: _Check = ("a number from 0 to 1", _is_score)
_FLAG: _Check = ("true or false", lambda value: isinstance(value, bool))
_NEEDED: dict[str, _Check] = {
    **dict.fromkeys(("id", "asked_hash", "cluster"), _TEXT),
    "task_type": ("a task type", lambda value: value in ALL_TASKS),
    **dict.fromkeys(("score", "strict", "lenient"), _SCORE),
    **dict.fromkeys(("valid", "readable"), _FLAG),
}
_OPTIONAL: dict[str, _Check] = {
    **dict.fromkeys(("meaning", "sampled", "sampled_meaning", "judged"), _SCORE),
    "decided": _FLAG,
    "judge": ("the name of the judge's model in 'model'", lambda value: isinstance(value, dict) and "model" in value),
    "groups": ("texts by name", _is_groups),
    "benchmark": ("a benchmark", lambda value: value in BENCHMARKS),
    "samples": ("scores and answers of one or more samples", _is_samples),
    "error": _TEXT,
    "reason": ("a reason", lambda value: value in tuple(REASONS)),
}
