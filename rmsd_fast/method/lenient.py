"""Read an answer leniently, as benchmark harnesses do: the text of `<answer>`, otherwise what follows `</think>`.

`method.natural` reads the answer first: the same code as `teacher.parse=natural`. Where it finds no clear answer, the
rules of the field apply:

- mcq: the letter in the best of these places, and the last one of these: the start of the text, its end, after a phrase
  such as "the answer is", `(B)`, `B.`, `B:`, `B)`, `B` before a space, any other `B`. A letter inside a word is not an
  answer. After a phrase and in the last place, words of Chinese, Japanese and Korean may touch it: "정답은 B입니다";
- temporal: two times, in seconds or as mm:ss, if the text has no third number;
- spatial: the first four numbers in brackets; boxes: seconds and boxes in JSON, in a code block if there is one. JSON
  may be incomplete, and its invalid items are left out. Lists of objects with `time` and `bbox_2d` are also read;
- exact: the content of `\\boxed{}`, the text after "the answer is", otherwise the whole text.

The reading therefore differs from the field's where the field takes a letter of the option's words: the field reads
"The answer is B. Candles." as C. docs/evaluation.md has measurements.

Source of the order of places: extract_mcq_answer of lmms-eval 0.7.3.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence

from .answers import bare_options, option_letters, own_letter, parse_answer, parse_answer_body
from .benchmark_tasks import Boxes, boxes_of
from .folding import fold_text
from .natural import canonical_response
from .natural.tags import one_spelling, without_tags

# Brackets at which JSON is tried, since every attempt may read the whole text.
MOST_STARTS = 20
# Keys of incomplete JSON that are read.
MOST_KEYS = 1000
_ANSWER = re.compile(r"<answer>(.*?)(</answer>|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# Words before an option: up to the last "the answer is" or "Answer:", and "option".
_ANSWER_IS = re.compile(
    r"\A(?:.*\b(?:answer|option|choice)(?:\s+is\b|[\s*_`]*[:=]))?[\s*_`:]*(?:(?:option|choice)\b)?",
    re.IGNORECASE | re.DOTALL,
)
_BEFORE_BOX = re.compile(
    r"(?:\A|\n|[:.,=]|\b(?:is|be|get|equals|so|thus|hence|therefore))[\s$*\\(\[]*\Z", re.IGNORECASE
)
_AFTER_BOX = re.compile(r"[\s$*.\\)\]]*")
_MARKS = " \t\r\n*_`'\"$"
_ONLY_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?")
_EDGES = " \t\r\n,.!?;:'\"*"
_PHRASE = re.compile(
    r"(?:answer|option|choice) is|i (?:choose|select|pick)|答案是|答案为|选|答えは|정답은|답은|답:|옵션", re.IGNORECASE
)
# A character beside a letter that makes it part of a word, unlike those of Chinese, Japanese and Korean: "B입니다".
_OF_WORD = r"[^\W_\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af]"
# Places of a letter inside a text, from the most to the least reliable one.
_PLACES = tuple(
    rf"(?<![^\W_]){place}" for place in (r"\(([{0}])\)", r"([{0}])\.", r"([{0}]):", r"([{0}])\)", r"([{0}])\s")
)
_TIME = re.compile(r"(?<![\w.:])(?:(\d+):)?(\d+):(\d{2}(?:\.\d+)?)(?![\d:])|(?<![\w.:-])(\d+(?:\.\d+)?)(?![\d:])")
_NUMBER = r"\s{0,9}([+-]?\d+(?:\.\d+)?)\s{0,9}"
_FOUR = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},?(?:\)\s?,\s?\()?{_NUMBER},{_NUMBER}[\])]")
_JSON = json.JSONDecoder()
_BRACKET = re.compile(r"[{\[]")
_BLOCK = re.compile(r"```[a-z]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Deviations from JSON: keys without quotes, and commas at the end of a list.
_BARE_KEY = re.compile(r"([{,]\s{0,9})(\d{1,9})(?=\s{0,9}:)")
_LAST_COMMA = re.compile(r",(?=\s{0,9}[\]}])")
_KEY = re.compile(r'"([^"]{1,20})"\s{0,9}:\s{0,9}(?=\[)')
_SECOND = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(?:s|sec|seconds?)?\s*")
_CLOCK = re.compile(r"\s*(\d{1,4}):(\d{2})(?:\.0+)?\s*")
_TIME_KEYS = ("time", "timestamp", "second", "seconds")
_BOX_KEYS = ("bbox_2d", "bbox", "box", "boxes")


def lenient_response(
    text: str, task_type: str, *, options: Sequence[str] | None = None, truncated: bool = False
) -> str | None:
    """Return the response as `<think>…</think><answer>…</answer>` whose answer parses, or None if it has no answer.

    Args:
        text: the whole response.
        task_type: one of ALL_TASKS.
        options: choices of an `mcq` question in order; None = the options are in the question's text or picture.
        truncated: whether the response was cut off by the limit of tokens. Then only an `<answer>` block that was
            closed, an option letter at the start of the text, or complete boxes count.
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
    final, reader = final_text(text, closed=truncated), _READERS.get(task_type)
    if final is None and truncated:
        final, reader = final_text(text), _TRUNCATED_READERS.get(task_type)
        # An unfinished reasoning has no answer.
        if "<think>" in (rest := one_spelling(text)) and "</think>" not in rest:
            return None
    answer = reader(final, options) if reader and final else None
    if answer is None or parse_answer_body(answer, task_type, options) is None:
        return None
    return f"<think>{without_tags(text)}</think><answer>{answer}</answer>"


def final_text(text: str, *, closed: bool = False) -> str | None:
    """Return the text of the last `<answer>` block after `</think>`, otherwise all text after it.

    If no text follows `</think>`, the last block before it counts. Without `</think>`, the whole text is searched, but
    a reasoning that was opened needs a block.

    closed: only a block with both tags counts, and only outside a reasoning that was not closed; otherwise the result
        is None.
    """
    text = one_spelling(text)
    reasoning, ended, final = text.rpartition("</think>")
    if ended and not final.strip():
        final = reasoning if "<answer>" in reasoning else ""
    unfinished = not ended and "<think>" in text
    blocks = [block for block, end in _ANSWER.findall(final) if end or not closed]
    if closed and (unfinished or not blocks):
        return None
    if blocks:
        return without_tags(blocks[-1])
    return None if unfinished else without_tags(final)


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
    alone = re.compile(rf"(?<!{_OF_WORD})[{letters}](?!{_OF_WORD})")
    stated = [match for phrase in _PHRASE.finditer(text) if (match := alone.search(text, phrase.end()))]
    if stated:
        return stated[-1][0]
    for place in _PLACES:
        if found := re.findall(place.format(letters), f"{text} "):
            return found[-1]
    # "B번", or a letter in quotes.
    found = alone.findall(text)
    return found[-1] if found else None


def boxed_at_end(text: str) -> str | None:
    """Return the content of a box that ends a text and is not a part of a formula, or None.

    "2\\boxed{3}" and "\\boxed{2} dozen" have other values than their box.
    """
    boxes = list(_BOXED.finditer(text))
    if not boxes or not _AFTER_BOX.fullmatch(text, boxes[-1].end()):
        return None
    return boxes[-1][1].strip() if _BEFORE_BOX.search(text[: boxes[-1].start()]) else None


def stated_letter(text: str, options: Sequence[str] | None) -> str | None:
    """Return the letter of an answer that is an option and nothing else, or None.

    This is a letter, a letter with the text of its option, or the text of one option, at most after words that end in
    "the answer is". "A right triangle" is therefore not the letter A.

    Args:
        text: the answer without its reasoning.
        options: as in `lenient_response`.
    """
    text = (boxed_at_end(text) or _ANSWER_IS.sub("", text)).strip(_MARKS).rstrip(".").strip(_MARKS)
    letters = _letters(options)
    if match := _ONLY_LETTER.fullmatch(text):
        return match[1] if match[1] in letters else None
    texts = [fold_text(option) for option in bare_options(options)] if options else []
    label, rest = own_letter(text)
    if label and label in letters and texts and fold_text(rest) == texts[letters.index(label)]:
        return label
    return letters[texts.index(fold_text(text))] if texts.count(fold_text(text)) == 1 else None


def _interval(text: str, options: object) -> str | None:
    times = []
    for hours, minutes, seconds, plain in _TIME.findall(text):
        times.append(float(plain) if plain else float(hours or 0) * 3600 + float(minutes) * 60 + float(seconds))
    return f"{times[0]:.10g} to {times[1]:.10g}" if len(times) == 2 else None


def _box(text: str, options: object) -> str | None:
    match = _FOUR.search(text)
    return ",".join(match.groups()) if match else None


def _boxes(text: str, options: object) -> str | None:
    for source in (*_BLOCK.findall(text), text):
        if '"' not in source:
            source = source.replace("'", '"')
        source = _LAST_COMMA.sub("", _BARE_KEY.sub(r'\1"\2"', source))
        if boxes := _complete_boxes(source) or _boxes_by_key(source):
            return json.dumps(boxes)
    return None


def _complete_boxes(text: str) -> Boxes:
    """Return the boxes of all JSON values in a text. If a second occurs in several values, the last one counts."""
    boxes: Boxes = {}
    position = starts = 0
    while starts < MOST_STARTS and (start := _BRACKET.search(text, position)):
        starts, position = starts + 1, start.end()
        try:
            value, end = _JSON.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        if found := _boxes_in(value):
            boxes |= found
            # A value with boxes is not searched again, so it does not count.
            starts, position = starts - 1, end
    return boxes


def _boxes_by_key(text: str) -> Boxes:
    """Return the boxes that follow a second and a colon, for instance in a JSON object that was truncated."""
    boxes: Boxes = {}
    for match in itertools.islice(_KEY.finditer(text), MOST_KEYS):
        try:
            value = _JSON.raw_decode(text, match.end())[0]
        except (ValueError, RecursionError):
            continue
        boxes |= _boxes_in({match[1]: value})
    return boxes


def _boxes_in(value: object) -> Boxes:
    """Return the valid boxes of a decoded value.

    value: an object of boxes by second, an object with a time and a box, a pair [second, box], or a list of these.
    """
    if isinstance(value, list) and not (len(value) == 2 and isinstance(value[0], str | int | float)):
        boxes: Boxes = {}
        for item in value:
            # A second may have several objects, one for each box.
            for second, listed in (_boxes_in(item) if isinstance(item, list | dict) else {}).items():
                boxes[second] = boxes.get(second, ()) + listed
        return boxes
    if isinstance(value, list):
        value = {value[0]: value[1]}
    if not isinstance(value, dict):
        return {}
    time, box = (next((value[key] for key in keys if key in value), None) for keys in (_TIME_KEYS, _BOX_KEYS))
    boxes = {}
    for key, item in value.items() if time is None else [(time, box)]:
        listed = item if isinstance(item, list) and item and isinstance(item[0], list) else [item]
        valid = tuple(of["0"][0] for one in listed if (of := boxes_of({"0": one})))
        if valid and (second := _second_of(key)):
            boxes[second] = valid
    return boxes


def _second_of(key: object) -> str | None:
    """Return a second as text: 3, 3.0, "3", "3s" and "00:03" are "3". Texts with decimals are left as they are."""
    if isinstance(key, int | float) and not isinstance(key, bool):
        return f"{key:.10g}" if math.isfinite(key) else None
    if clock := _CLOCK.fullmatch(str(key)):
        return str(int(clock[1]) * 60 + int(clock[2]))
    second = _SECOND.fullmatch(str(key))
    return second[1] if second else None


def _short_text(text: str, options: object) -> str | None:
    if boxed := _BOXED.findall(text):
        return boxed[-1].strip() or None
    read = canonical_response(text, "open", finish_reason="stop")
    return read.partition("<answer>")[2].removesuffix("</answer>").strip() if read else None


_READERS = {"mcq": field_letter, "temporal": _interval, "spatial": _box, "boxes": _boxes, "exact": _short_text}
_TRUNCATED_READERS = {"mcq": _letter_at_start, "boxes": _boxes}
