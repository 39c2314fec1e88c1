"""Read an answer leniently, as benchmark harnesses do: the text of `<answer>`, otherwise what follows `</think>`.

`method.natural` reads the answer first: the same code as `teacher.parse=natural`. Where it finds no clear answer, the
rules of the field apply:

- mcq: the letter in the best of these places, and the last one of these: the start of the text, its end, after a phrase
  such as "the answer is", `(B)`, `B.`, `B:`, `B)`, `B` alone. A letter inside a word is not an answer;
- temporal: two times, in seconds or as mm:ss, if the text has no third number;
- spatial: the first four numbers in brackets; boxes: seconds and boxes in JSON, which may be incomplete;
- exact: the content of `\\boxed{}`, the text after "the answer is", otherwise the whole text.

The reading therefore differs from the field's where the field takes a letter of the option's words: the field reads
"The answer is B. Candles." as C. docs/evaluation.md has measurements.

Source of the order of places: extract_mcq_answer of lmms-eval 0.7.3.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

from .answers import option_letters, parse_answer, parse_answer_body
from .benchmark_tasks import Boxes, boxes_of
from .natural import canonical_response
from .natural.tags import one_spelling, without_tags

# Brackets at which JSON is tried, since every attempt may read the whole text.
MOST_STARTS = 20
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_EDGES = " \t\r\n,.!?;:'\"*"
_PHRASE = re.compile(
    r"(?:answer|option|choice) is|i (?:choose|select|pick)|答案是|答案为|选|答えは|정답은|답은|답:|옵션", re.IGNORECASE
)
# Places of a letter inside a text, from the most to the least reliable one.
_PLACES = tuple(
    rf"(?<![^\W_]){place}" for place in (r"\(([{0}])\)", r"([{0}])\.", r"([{0}]):", r"([{0}])\)", r"([{0}])\s")
)
_TIME = re.compile(r"(?<![\w.:])(?:(\d+):)?(\d+):(\d{2}(?:\.\d+)?)(?![\d:])|(?<![\w.:-])(\d+(?:\.\d+)?)(?![\d:])")
_NUMBER = r"\s{0,9}([+-]?\d+(?:\.\d+)?)\s{0,9}"
_FOUR = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},?(?:\)\s?,\s?\()?{_NUMBER},{_NUMBER}[\])]")
_JSON = json.JSONDecoder()
_SECOND = re.compile(rf"""["']?(\d+)["']?\s*:\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]""")


def lenient_response(
    text: str, task_type: str, *, options: Sequence[str] | None = None, truncated: bool = False
) -> str | None:
    """Return the response as `<think>…</think><answer>…</answer>` whose answer parses, or None if it has no answer.

    Args:
        text: the whole response.
        task_type: one of ALL_TASKS.
        options: choices of an `mcq` question in order; None = the options are in the question's text or picture.
        truncated: whether the response was cut off by the limit of tokens. Then only an `<answer>` block that was
            closed, or an option letter at the start of the text, counts.
    Returns:
        The canonical response, for `parse_answer` and `quality_score`.
    Raises:
        ValueError: the task type is unknown, or the number of options is outside 1..26.
    """
    if parse_answer(text, task_type, options) is not None:
        return text
    if task_type not in ("exact", "boxes"):
        reason = "length" if truncated else "stop"
        if read := canonical_response(text, task_type, options=options, finish_reason=reason):
            return read
    final = final_text(text, closed=truncated)
    if final is None:
        final, reader = final_text(text), _letter_at_start
        if task_type != "mcq":
            return None
    else:
        reader = _READERS.get(task_type)
    answer = reader(final, options) if reader and final else None
    if answer is None or parse_answer_body(answer, task_type, options) is None:
        return None
    return f"<think>{without_tags(text)}</think><answer>{answer}</answer>"


def final_text(text: str, *, closed: bool = False) -> str | None:
    """Return the text of the last `<answer>` block, otherwise the text after `</think>`, otherwise the whole text.

    closed: only a block with both tags counts; without one, the result is None.
    """
    text = one_spelling(text)
    blocks = _ANSWER.findall(text if not closed or text.count("</answer>") else "")
    if blocks:
        return without_tags(blocks[-1])
    return None if closed else without_tags(text.rpartition("</think>")[2])


def _letters(options: Sequence[str] | None) -> str:
    return "ABCDEFGH" if options is None else option_letters(options)


def _letter_at_start(text: str, options: Sequence[str] | None) -> str | None:
    match = re.match(rf"[(\[]?([{_letters(options)}])(?:[.:,)\]]|\s*\Z)", text.strip(_EDGES) + " ")
    return match[1] if match else None


def field_letter(text: str, options: Sequence[str] | None) -> str | None:
    """Return the letter that the rules of the field find in a text, or None."""
    letters = _letters(options)
    text = text.strip(_EDGES)
    if match := re.match(rf"([{letters}])(?![^\W\d_])", text):
        return match[1]
    if match := re.search(rf"(?<![^\W\d_])([{letters}])\Z", text):
        return match[1]
    alone = re.compile(rf"(?<![^\W_])[{letters}](?![^\W_])")
    stated = [match for phrase in _PHRASE.finditer(text) if (match := alone.search(text, phrase.end()))]
    if stated:
        return stated[-1][0]
    for place in _PLACES:
        if found := re.findall(place.format(letters), f"{text} "):
            return found[-1]
    return None


def _interval(text: str, options: object) -> str | None:
    times = []
    for hours, minutes, seconds, plain in _TIME.findall(text):
        times.append(float(plain) if plain else int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds))
    return f"{times[0]:.10g} to {times[1]:.10g}" if len(times) == 2 else None


def _box(text: str, options: object) -> str | None:
    match = _FOUR.search(text)
    return ",".join(match.groups()) if match else None


def _boxes(text: str, options: object) -> str | None:
    boxes: Boxes | None = None
    for start in itertools.islice(re.finditer(r"[{\[]", text), MOST_STARTS):
        try:
            boxes = _boxes_in(_JSON.raw_decode(text, start.start())[0])
        except (ValueError, RecursionError):
            continue
        break
    # Truncated JSON, or JSON with remarks: all complete boxes.
    pairs = {} if boxes else {second: [list(map(float, box))] for second, *box in _SECOND.findall(text)}
    boxes = boxes or boxes_of(pairs)
    if not boxes:
        return None
    inner = (f'"{second}": [{", ".join(str(list(box)) for box in items)}]' for second, items in boxes.items())
    return "{" + ", ".join(inner) + "}"


def _boxes_in(value: object) -> Boxes | None:
    """Return the boxes of an object, of a list of objects, or of a list of pairs [second, box]."""
    merged: dict = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int):
            item = {item[0]: item[1]}
        if not isinstance(item, dict):
            return None
        merged |= {str(second): box for second, box in item.items()}
    return boxes_of(merged)


def _short_text(text: str, options: object) -> str | None:
    if boxed := _BOXED.findall(text):
        return boxed[-1].strip() or None
    read = canonical_response(text, "open", finish_reason="stop")
    return read.partition("<answer>")[2].removesuffix("</answer>").strip() if read else None


_READERS = {"mcq": field_letter, "temporal": _interval, "spatial": _box, "boxes": _boxes, "exact": _short_text}
