"""Find the answer in a text without tags: statements such as "The answer is B.", and lines that are only an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from .body import MOST_CHARACTERS, canonical_body
from .boxes import boxes_in
from .doubts import is_absent, is_denied, is_doubted, is_retracted, is_unknowing
from .numbers import recounted
from .options import comparable, comparable_options, names_another, whole_option
from .reasons import Unreadable
from .times import intervals_in

Options = Sequence[str] | None

# Only sentences that contain one of these words are searched for a statement.
_CUE = re.compile(
    r"answer|choice|option|\bans\b|\bI\b|respuesta|antwort|lösung|réponse|答|选|選|正解|回答", re.IGNORECASE
)
_STATEMENT = re.compile(
    r"(?:\b(?:the|my|our)\s+)?(?:\b(?:final|correct|best|right|most\s+likely|overall)\s+)*\b(?:answer|choice|option"
    r"|ans)\b"
    r"(?:\s+(?:here|to (?:the|this) question))?"
    r"(?:\**\s*(?:is|would be|should be|must be|will be|=)(?!\w)\**\s*(?:[:：]\**)?|\**\s*[:：=]\**)\s*"
    r"|\bI(?:['’]d|['’]ll| would| will)?\s+(?:go with|choose|pick|select|opt for)\s+"
    r"|\b(?:respuesta|antwort|lösung|réponse)(?:\s+(?:correcta|final|correcte))?(?:\s+(?:es|ist|lautet|est)\b|\s*:)\s*"
    r"(?:(?:la|el|die|der|das|opción|option)\s+)*|[【\[]\s*(?:最终)?答案\s*[】\]]\s*[:：]?\s*"
    r"|(?:最终|正确|最佳|所以|因此|最後の|正解の)?(?:的)?(?:答案|选项|答え|正解|回答)(?:应该|应当)?"
    r"(?:是|为|選|选|：|:|は)+(?!不)\s*[:：]?\s*"
    r"|(?<![不别非])(?:故|应|所以|因此|我)?(?<![不别非])(?:选择|选)(?=\s*[(（]?[A-ZＡ-Ｚ])\s*",
    re.IGNORECASE,
)
# In open and ocr questions, "choice" and "option" are ordinary words.
_TEXT_STATEMENT = re.compile(
    r"[\s*#]*(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?(?:answer|答案|antwort|respuesta|réponse)"
    r"(?:\**\s*is\b\**\s*[:：]?\**|\**\s*(?:[:：是]|为)\**)\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"[ \t]*(?:#{1,6}\s*|\*\*)?(?:final\s+)?(?:answer|答案|最终答案|解答)\s*[:：]?\s*(?:\*\*)?[ \t]*", re.IGNORECASE
)
# "Let me go through each option:".
_NO_STATEMENT = re.compile(r"\b(?:each|every|all|any|which|what|whether|per)\s+(?:of\s+)?(?:the\s+)?$", re.IGNORECASE)
# "My first answer was B", "If it were brown, the answer would be A".
_EARLIER = re.compile(
    r"\b(?:first|initial(?:ly)?|previous|former|earlier|were|if|otherwise|else)\b|如果", re.IGNORECASE
)
_CONCLUSION = re.compile(
    r"(?:(?:so|therefore|thus|hence|in total|overall|altogether|in conclusion|in summary|consequently)\b"
    r"|总共|一共|因此|所以|综上|总之|よって|したがって)[,，、\s]*"
    r"|(?=there (?:is|are)\b[^.]*\b(?:in total|altogether|overall)\b)",
    re.IGNORECASE,
)
_OF_THE_ANSWER = re.compile(
    r"\b(?:it|this|that|answer|box|coordinates)(?:['’]s|\s+(?:is|are|should|must|would))\b|[:：]", re.IGNORECASE
)
_LAST_CLAUSE = re.compile(
    r"[,，;；]\s*(?:and\s+)?(?:so|therefore|thus|hence|giving|i\.e\.,?|that is,|(?:which|that) means"
    r"|making (?:it )?(?:a )?total of"
    r"|for a total of|(?:which )?(?:brings|bringing) the total to)\s+|[,，;；]\s*(?:所以|因此)|\s*(?:→|=>|⇒)\s*",
    re.IGNORECASE,
)
# "Number of goals scored: 3".
_COUNT_LABEL = re.compile(
    r"[^0-9:：\n]{0,80}\b(?:number|count|total|amount|quantity)\b[^0-9:：\n]{0,60}[:：]\s*(?=\S)", re.IGNORECASE
)
# "Frames:", "In millions:", "Format: xywh." before an answer.
_OTHER_MEASURE = {
    "temporal": re.compile(
        r"(?:\b(?:frames?|minutes?|hours?|percent|frame (?:numbers?|ind(?:ex|ices)))|[帧%])\W*[:：]\W*$", re.IGNORECASE
    ),
    "spatial": re.compile(r"\b(?:xywh|cxcywh|yxyx|ltwh|coco|yolo|pixels?|px)\b", re.IGNORECASE),
    "numeric": re.compile(
        r"\b(?:hundreds|thousands|millions|billions|dozens)\W*[:：]\W*$|\b(?:at (?:least|most)|than)\W*$", re.IGNORECASE
    ),
}
_RETRACTION = re.compile(
    r"\W*(?:no|sorry|correction|wait|actually|rather|or|hmm|on (?:reflection|second thought)|i mean|不|不对|等等|或)"
    r"(?![a-z])",
    re.IGNORECASE,
)
_STOP = re.compile(r"[.!?]+[\"”*)\]]*(?=\s|$)|[。！？]+[”」）*]*")
_ABBREVIATION = re.compile(r"\.[a-z]$")
# "max. 3" is a bound, and "No. 3" a name.
_BEFORE_NUMBER = re.compile(r"\b(?:no|nr|min|max|approx|ca|vol|fig|vs)$", re.IGNORECASE)
_LABEL_STOP = re.compile(r"(?<![A-Za-z])(?:\([A-Za-z]\)|\[[A-Za-z]\]|[A-Za-z])\.[*]*$")
_NUMBERED = re.compile(r"\s*[0-9]{1,2}[.)](?:\s|$)")
_LISTED = re.compile(r"\s*(?:[-*•]\s*)?\**[(\[]?([A-Z])[)\].:、]\**\s*\S")


_CLAUSES = re.compile(r"[,，;；:：]")


class Sentence(NamedTuple):
    """A sentence of a text, and its position."""

    start: int
    end: int
    text: str


def sentences_in(text: str, task: str, options: Options) -> list[Sentence]:
    """Return the sentences of a text. For ocr questions, return its lines, since a period may belong to the text."""
    sentences = []
    for line in re.finditer(r"[^\n]+", text):
        start, ends = line.start(), []
        if task != "ocr":
            ends = [line.start() + stop.end() for stop in _STOP.finditer(line[0]) if _ends_sentence(line[0], stop)]
        for end in (*ends, line.end()):
            before, after = text[start:end], text[end : line.end()]
            if after and (
                re.fullmatch(r"\s*[0-9]{1,2}\.", before) or (task == "mcq" and _is_label(before, after, options))
            ):
                continue
            if text[start:end].strip():
                sentences.append(Sentence(start, end, text[start:end].strip()))
            start = end
    return sentences


def _ends_sentence(line: str, stop: re.Match[str]) -> bool:
    """Return whether a period ends a sentence, and does not belong to an abbreviation such as "i.e."."""
    before = line[max(0, stop.start() - 2) : stop.start()]
    if re.match(
        r"\.\s*(?:[0-9]|one|two|three|four|five|six|seven|eight|nine|ten)", line[stop.start() :][:8]
    ) and _BEFORE_NUMBER.search(line[: stop.start()][-8:]):
        return False
    return bool(before.strip()) and not before[-1].isspace() and not _ABBREVIATION.search(before)


def _is_label(before: str, after: str, options: Options) -> bool:
    """Return whether a period follows an option's letter: "B. milk", but not "The answer is B. It is white."."""
    if not _LABEL_STOP.search(before):
        return False
    words = comparable(after[:1000])
    named = any(option and words.startswith(option) for option in comparable_options(options))
    return named or not after.lstrip()[:1].isupper() or bool(_LABEL_STOP.fullmatch(before.strip()))


class Statement(NamedTuple):
    """A sentence that states the answer. If the answer cannot be read, it is None and `reason` is set."""

    start: int
    end: int
    answer: str | None
    reason: str


def statements(text: str, task: str, options: Options) -> list[Statement]:
    """Return all statements of a text in order, including statements that cannot be read."""
    sentences, stated = sentences_in(text, task, options), []
    for index, sentence in enumerate(sentences):
        if not _CUE.search(sentence.text):
            continue
        matches = list(_STATEMENT.finditer(sentence.text))
        for number, match in enumerate(matches):
            ends = matches[number + 1].start() if number + 1 < len(matches) else len(sentence.text)
            value, end = sentence.text[match.end() : ends].strip(), sentence.end
            if not value.strip("*:： ") and number + 1 == len(matches) and index + 1 < len(sentences):
                # "The answer is:", with the answer in the next line.
                value, end = sentences[index + 1].text, sentences[index + 1].end
            before = sentence.text[max(0, match.start() - 200) : match.start()]
            if _NO_STATEMENT.search(before):
                continue
            clause = next((text for text in reversed(_CLAUSES.split(before)) if text.strip()), "")
            # "My guess: the answer is B"; but "It is not brown, so the answer is B".
            denied = is_unknowing(clause) or (
                not re.search(r"[,，;；:：]\s*$", before)
                and (is_denied(clause) or is_doubted(clause) or is_absent(clause) or _EARLIER.search(clause))
            )
            answer, reason = (None, "two_answers") if denied else read_or_reason(value, task, options)
            stated.append(Statement(sentence.start, end, answer, reason))
    return stated


def text_statement(text: str) -> tuple[str, str] | None:
    """Return the text before and after "The answer is" at the start of a line or sentence; the last match counts."""
    starts = [sentence.start for sentence in sentences_in(text, "open", None)]
    for start in reversed(starts):
        if match := _TEXT_STATEMENT.match(text, start):
            return text[:start], text[match.end() :]
    return None


def heading(text: str) -> tuple[str, str] | None:
    """Return the text before and after the last heading such as "### Answer"."""
    lines = text.split("\n")
    for index in range(len(lines) - 2, -1, -1):
        if lines[index].strip() and _HEADING.fullmatch(lines[index]):
            return "\n".join(lines[:index]), "\n".join(lines[index + 1 :])
    return None


def takes_back(text: str) -> bool:
    """Return whether a text begins with a word such as "No," that retracts the text before it."""
    return _RETRACTION.match(text) is not None


def is_taken_back(text: str, answer: str, task: str, options: Options) -> bool:
    """Return whether the text after an answer retracts it or gives another answer."""
    if not text.strip():
        return False
    if is_retracted(text) or {alone for _, alone in standing_alone(text, task, options)} - {answer}:
        return True
    return any(_gives_another(sentence.text, answer, task, options) for sentence in sentences_in(text, task, options))


def _gives_another(sentence: str, answer: str, task: str, options: Options) -> bool:
    """Return whether a sentence after an answer gives another answer without denying it."""
    if len(sentence) > MOST_CHARACTERS:
        return False
    if task == "mcq":
        return names_another(sentence, answer, options)
    # "If you count the statue as well, it is 4."
    if is_denied(sentence) or sentence.lstrip("( ").lower().startswith("if "):
        return False
    if task == "numeric":
        return bool(recounted(sentence) - {Decimal(answer)})
    if task == "temporal":
        return bool(intervals_in(sentence) - {tuple(map(Decimal, answer.split(" to ")))})
    # "The cat is at [610, 30, 880, 300]" is about another object.
    return _OF_THE_ANSWER.search(sentence) is not None and bool(boxes_in(sentence) - {re.sub(r"\s", "", answer)})


def check_lead(text: str, task: str, options: Options) -> None:
    """Raise Unreadable if the sentences before an answer say that it is unknown, or in another unit."""
    lines = [sentence.text for sentence in sentences_in(text[-1000:], task, options)[-2:]]
    if any(is_unknowing(line) for line in lines):
        raise Unreadable("no_answer")
    measure = _OTHER_MEASURE.get(task)
    if measure and any(measure.search(line) for line in lines):
        raise Unreadable({"temporal": "not_an_interval", "spatial": "not_a_box"}.get(task, "not_a_number"))


def standing_alone(text: str, task: str, options: Options) -> list[tuple[Sentence, str]]:
    """Return the lines and sentences that consist of an answer, in order.

    A list of the options does not count, since a response often repeats it, nor do the items of a numbered list. Raise
    Unreadable for two answers in one sentence.
    """
    sentences = sentences_in(text, task, options)
    listed = [_LISTED.match(sentence.text) if task == "mcq" else None for sentence in sentences]
    letters = [match[1] for match in listed if match]
    listing = len(letters) > 1 and letters == sorted(set(letters))
    alone = []
    for sentence, match in zip(sentences, listed, strict=True):
        entry = (listing and match) or (task != "mcq" and _NUMBERED.match(sentence.text))
        answer = None if entry else short(sentence.text, task, options)
        if answer is not None:
            alone.append((sentence, answer))
    return alone


def short(text: str, task: str, options: Options) -> str | None:
    """Return the answer if a short text consists of it; None for a sentence that only mentions an answer.

    Raises:
        Unreadable: the text gives two answers.
    """
    if task == "mcq":
        if len(text) > MOST_CHARACTERS:
            return None
        try:
            return whole_option(text, options)
        except Unreadable as error:
            if error.reason == "two_answers":
                raise
            return None
    if task == "numeric" and (label := _COUNT_LABEL.match(text)):
        text = text[label.end() :].strip(" *_")
    words = len(text.split())
    return read_or_reason(text, task, options)[0] if words <= (3 if task == "numeric" else 12) else None


def concluded(sentence: str, task: str, options: Options) -> str | None:
    """Return the answer of a sentence that begins with "so" or "in total" or ends with such a clause, or None."""
    *reason, clause = _LAST_CLAUSE.split(sentence)
    # "3 → 5" describes a change, not a conclusion.
    moves = task == "numeric" and re.search("[→⇒]|=>", sentence)
    if reason and task in ("mcq", "numeric") and not moves and not is_unknowing(sentence):
        return read_or_reason(clause, task, options)[0]
    conclusion = _CONCLUSION.match(sentence)
    return read_or_reason(sentence[conclusion.end() :], task, options)[0] if conclusion else None


def read_or_reason(text: str, task: str, options: Options) -> tuple[str | None, str]:
    """Return (canonical answer, ""), or (None, reason)."""
    try:
        return canonical_body(text, task, options), ""
    except Unreadable as error:
        return None, error.reason
