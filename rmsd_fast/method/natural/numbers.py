"""One number, as people write it, in decimals that `method.answers` parses."""

from __future__ import annotations

import re
from decimal import Decimal

from ..answers import parse_answer_body
from .reasons import Unreadable
from .text import json_object, plain

NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate((*_ONES, *_TEENS))}
_WORDS |= {word: 10 * ten for ten, word in enumerate(_TENS, start=2)}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = rf"(?:{'|'.join(sorted((*_WORDS, *_MULTIPLES), key=len, reverse=True))})"
_WORDS_IN_A_ROW = re.compile(rf"(?<![A-Za-z0-9-])(?:{_WORD}(?:(?:[\s-]+|\s+and\s+)(?={_WORD}\b))?)+(?![A-Za-z-])", re.I)
# "One of them", "no one", "the other one": no number is meant.
_PRONOUN = re.compile(
    r"\b(?:no|this|that|which|each|every|any|other|only|another|last|next|first|second|third|fourth|fifth)[ -]one\b"
    r"|\bone (?:of|another|can|could|sees?|is|which)\b",
    re.IGNORECASE,
)

_HAN_BY_VALUE = ("零〇", "一", "二两兩", "三", "四", "五", "六", "七", "八", "九")
_HAN_DIGITS = {digit: value for value, digits in enumerate(_HAN_BY_VALUE) for digit in digits}
_HAN = "".join(_HAN_DIGITS)
# A whole answer: "三个", "大约十五本", "二十三". Two digits in a row, "三四个", are 3 or 4.
_HAN_ANSWER = re.compile(
    rf"(?:大约|大概|约|共|一共|总共|有)*(?:([{_HAN}])?(十)([{_HAN}])?|([{_HAN}]))\s*"
    "[个個只名人次辆件张条位种本杯台朵棵块米秒岁层つ匹]?"
)

_HAN_COUNT = re.compile(rf"[{_HAN}十百千][个個只名人次辆件张条位种本杯台朵棵块米秒岁层つ匹]")

_COUNTED = re.compile(rf"(?<![A-Za-z0-9_.,:/^])[+-]?{NUMBER}(?![0-9:/])")
_SPACED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[ \u202f][0-9]{3})+(?![0-9])")
_FRACTION = re.compile(r"[\s$]*\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}[\s$.]*")
_POWER = re.compile(
    r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*(?:\*|×|x|\\times|·)\s*10\s*(?:\^|\*\*)\s*[({]?\s*([+-]?[0-9]{1,2})\s*[)}]?"
)
_BELOW_ZERO = re.compile(r"\b(?:minus|negative)\s+(?=[0-9])", re.IGNORECASE)
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|(?:no )?(?:more|less|fewer) than|over|under|above|below|up to|or|between)\b"
    r"|\b(?:minimum|maximum)\b"
    r"|[<>≥≤±]|[0-9]\s*\+(?!\s*[0-9])|至少|至多|最多|最少|以上|以下|超过|不到|或",
    re.IGNORECASE,
)
_RANGE = re.compile(rf"{NUMBER}\s*(?:-|~|\bto\b|到|至)\s*{NUMBER}", re.IGNORECASE)
# Sums, fractions, ordinals, times of day, scales that are unclear, denials. A unit such as km/h is none of them.
_NO_COUNT = re.compile(
    r"[0-9]\s*(?:[*/^√×÷\\+-]|:\s*[0-9])|[*/^√×÷\\]\s*[0-9]|\bnot\b|n['’]t\b|不是|[0-9](?:st|nd|rd|th)\b|第"
    r"|\b(?:half|halves|quarters?|third|thirds|fourth|fifths?|dozens?|couple|pair|few|several|score|minus|negative)\b"
    r"|[0-9]\s*(?:am|pm|a\.m|p\.m|o['’]clock)\b|半|[百千万亿]分",
    re.IGNORECASE,
)
# Millions or metres, billions or bytes.
_UNCLEAR_SCALE = re.compile(r"[0-9]\s?(?:M|B|Mn|Mio|bn|mn)\b")
_ASIDE = re.compile(r"(?<=\S)\s*\(([^()]*)\)")
_UNSURE = re.compile(r"\b(?:maybe|perhaps|possibly|or|could|might|may|if)\b|也许|可能|或", re.IGNORECASE)
_SCALED = re.compile(
    r"(?:[0-9]\s*|\b)(hundred|thousand|million|billion|(?<=[0-9])k|百|千|万|亿)(?![a-z])", re.IGNORECASE
)
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "百": 2, "千": 3, "万": 4, "亿": 8}
_THAT_IS = re.compile(r"\bi\.e\.,?|\bthat is,?\s|即")
_KEYS = ("answer", "count", "number", "value", "result", "total")


def strict(text: str, task: str) -> str | None:
    """What parses as it stands, with its white space made regular and without a stop behind it."""
    text = re.sub(r"(?<=[0-9])\.$", "", " ".join(text.split()))
    return text if parse_answer_body(text, task) is not None else None


def decimal_text(value: Decimal) -> str:
    """A decimal without an exponent and without zeros at its end."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def digits_of_words(text: str) -> str:
    """The text with digits in place of "three" and "two hundred and five"; pronouns stay."""

    def digits(match: re.Match[str]) -> str:
        value = _value_of_words(re.findall(r"[a-z]+", match[0].lower()))
        return match[0] if value is None else str(value) + " " * match[0][-1].isspace()

    # A pronoun is hidden from the search and brought back.
    text = _PRONOUN.sub(lambda match: re.sub("(?i)one", "\0", match[0]), text)
    return _WORDS_IN_A_ROW.sub(digits, text).replace("\0", "one")


def _value_of_words(words: list[str]) -> int | None:
    """The number that words such as two, hundred, and, five spell; None where they spell none, or several."""
    total, group, last = 0, 0, 10**12
    for word in words:
        if word == "and":
            if last < 100 or last == 10**12:
                return None
        elif word in _MULTIPLES:
            multiple = _MULTIPLES[word]
            if not group or (multiple == 100 and group > 99) or (total and total % multiple):
                return None
            if multiple == 100:
                group *= 100
            else:
                total, group = total + group * multiple, 0
            last = multiple
        else:
            value = _WORDS[word]
            # Behind twenty comes a digit, behind hundred anything below, behind three nothing.
            fits = last >= 100 or (20 <= last < 100 and 0 < value < 10)
            if not fits:
                return None
            group, last = group + value, value or 1
    return total + group


def read_number(body: str) -> str:
    """A decimal number; raises Unreadable where an answer is not one number."""
    if as_it_is := strict(body, "numeric"):
        return as_it_is
    if re.fullmatch(r"\s*(?:one |a |the )?number[.\s]*", body, re.IGNORECASE):
        raise Unreadable("no_answer")
    if (fraction := _FRACTION.fullmatch(body)) and int(fraction[2]):
        return decimal_text(round(Decimal(fraction[1]) / Decimal(fraction[2]), 9))
    text = plain(body)
    if record := json_object(text):
        values = [record[key] for key in _KEYS if key in record]
        if len(values) != 1 or not isinstance(values[0], str):
            raise Unreadable("not_a_number")
        return read_number(values[0])
    text = _THAT_IS.split(text)[-1]
    # "x = 3", "2 + 1 = 3": what stands behind the sign of equality.
    sides = re.split(r"[=≈]", text)
    if len(sides) > 2:
        raise Unreadable("two_answers")
    text = sides[-1].strip()
    if power := _POWER.fullmatch(text):
        return decimal_text(Decimal(power[1]).scaleb(int(power[2])))
    if (han := _HAN_ANSWER.fullmatch(text)) is not None:
        return str(_han_number(han))
    text = _SPACED.sub(lambda match: re.sub(r"\s", "", match[0]), digits_of_words(text))
    text = _BELOW_ZERO.sub("-", text)
    if _BOUND.search(text) or _RANGE.search(text):
        raise Unreadable("a_range")
    text = _without_asides(text)
    if _NO_COUNT.search(text) or _UNCLEAR_SCALE.search(text) or _HAN_COUNT.search(text):
        raise Unreadable("not_a_number")
    numbers = [number.replace(",", "") for number in _COUNTED.findall(text)]
    if not numbers or re.search(r"(?<![A-Za-z])[0-9]", _COUNTED.sub(" ", text)):
        raise Unreadable("not_a_number")
    values = [Decimal(number) for number in numbers]
    # "4 cars: 2 red, 1 blue and 1 white".
    parts_add_up = len(values) > 2 and values[0] == sum(values[1:])
    if len(set(values)) != 1 and not parts_add_up:
        raise Unreadable("two_answers")
    value = numbers[0]
    if scales := _SCALED.findall(text):
        if len(numbers) > 1:
            raise Unreadable("not_a_number")
        value = decimal_text(Decimal(value).scaleb(_POWERS_OF_TEN[scales[0].lower()]))
    return value.lstrip("+")


def _without_asides(text: str) -> str:
    """The text without remarks in brackets: "2 times (at 0:03 and 0:09)", "7 (3 left, 4 right)".

    Raises:
        Unreadable: a remark names another number: "3 (maybe 4)", "6 (seven)".
    """
    outside = _ASIDE.sub("", text)
    numbers = {Decimal(number.replace(",", "")) for number in _COUNTED.findall(outside)}
    if not numbers:
        return text
    for aside in _ASIDE.findall(text):
        named = {Decimal(number.replace(",", "")) for number in _COUNTED.findall(aside)}
        if named - numbers and (len(named) == 1 or _UNSURE.search(aside)):
            raise Unreadable("two_answers")
    return outside


def _han_number(match: re.Match[str]) -> int:
    """A number below 100 in Chinese numerals."""
    tens, ten, ones, digit = match.groups()
    if not ten:
        return _HAN_DIGITS[digit]
    return 10 * (_HAN_DIGITS[tens] if tens else 1) + (_HAN_DIGITS[ones] if ones else 0)
