"""One interval in seconds, as people write it."""

from __future__ import annotations

import re
from decimal import Decimal

from .numbers import NUMBER, decimal_text, digits_of_words, strict
from .reasons import Unreadable
from .text import json_value, plain

_CLOCK = r"[0-9]{1,2}:[0-5]?[0-9](?::[0-5]?[0-9])?(?:\.[0-9]+|,[0-9]{3}(?![0-9]))?"
# Each unit in seconds. What follows a time must not go on as another word, unit or fraction.
_UNITS = {
    "h": (r"(?:h|hrs?|hours?|小时|时间|時間)(?![a-z])", Decimal(3600)),
    "m": (r"(?:m|mins?|minutes?|minuten|minutos?|分钟|分鐘|分)(?![a-z])", Decimal(60)),
    "s": (r"(?:s|secs?|seconds?|秒钟|秒鐘|秒|segundos?|sekunden?|secondes?)(?![a-z])", Decimal(1)),
    "ms": (r"(?:ms|msecs?|milliseconds?|毫秒)(?![a-z])", Decimal("0.001")),
}
_H, _M, _S, _MS = (pattern for pattern, _ in _UNITS.values())
_TIME = re.compile(
    rf"(?<![A-Za-z0-9_.])(?<![0-9]:)(?:(?P<clock>{_CLOCK})(?:\s*(?:{_S}|{_M}))?"
    rf"|(?={NUMBER}\s*(?:{_H}|{_M}|{_S}))(?:(?P<h>{NUMBER})\s*{_H})?(?:\s*(?:and\s+)?(?P<m>{NUMBER})\s*{_M})?"
    rf"(?:\s*(?:and\s+)?(?P<s>{NUMBER})\s*{_S})?"
    rf"|(?P<ms>{NUMBER})\s*{_MS}"
    rf"|(?P<number>{NUMBER}))(?![A-Za-z0-9'\"%°:]|\.[0-9])",
    re.IGNORECASE,
)
_JOINER = (
    r"(?:to|until|till|til|through|thru|bis|hasta|a|à|ends?|ending|ended|end_?time|finish(?:es|ed|ing)?|"
    r"stops?|stopped|stopping|-+>?|~|→|到|至|から|まで|结束)"
)
# What may stand between the two times besides a joiner. "lasts", "for" and "within" are not among them: a duration
# would be taken for the end.
_BETWEEN = re.compile(
    rf"(?:\s|[,;:=\"'(\[]|\b(?:and|y|und|et|it|the|this|event|action|scene|which|then|at|around|about|approximately|"
    rf"roughly|approx|circa|time|timestamp|mark|seconds?|segundos?|of|is|on|in|up|going|continues?|continuing|runs?|with|"
    rf"las|los|el|der|die)(?![a-z])|并|在|于|持续|一直|直|大约|约|第|时间|时刻|，|\.(?=\s)|(?P<join>(?<![a-z]){_JOINER}(?![a-z])))*",
    re.IGNORECASE,
)
_AND = re.compile(r"\s*(?:s\s*)?(?:and|y|und|et|[,，和])\s*(?:(?:at|about|the)\s+)*", re.IGNORECASE)
_OPENED = re.compile(
    r"\b(?:between|entre|zwischen|starts?|begins?|starting|beginning|start_time|from)\b[^0-9]{0,20}$", re.IGNORECASE
)
_ASIDE = re.compile(r"[(（][^()（）]*(?:frames?|帧|コマ)[^()（）]*[)）]", re.IGNORECASE)
_OTHER_UNIT = re.compile(
    r"\b(?:frames?|percent|days?|weeks?|years?|beats?|bpm|fps|hundred|thousand|million|half|quarter)\b|帧|コマ|%|天",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|cannot|never|except|outside|neither|nor|unclear|wrong)\b|n['’]t\b|不|没|未", re.IGNORECASE
)
_OR = re.compile(r"\b(?:or|either|oder|alternatively|maybe|perhaps|possibly)\b|或", re.IGNORECASE)
# "i.e. 7 to 10 seconds": what stands behind explains what stands before.
_THAT_IS = re.compile(r"\bi\.e\.,?|\bthat is,?\s|即")
# 3,5 bis 7,25: where no point is written, a comma with one or two digits behind it is one.
_DECIMAL_COMMA = re.compile(r"(?<![0-9,:])([0-9]+),([0-9]{1,2})(?![0-9,])")
_JOINED_NUMBERS = re.compile(r"[0-9]\s*(?:\bto\b|\bbis\b|\bhasta\b|à|-)\s*[0-9]", re.IGNORECASE)

_START = ("start", "start_time", "begin", "from", "start_s", "start_sec", "start_seconds", "t_start", "starttime")
_END = ("end", "end_time", "stop", "to", "end_s", "end_sec", "end_seconds", "t_end", "endtime")
_REMARKS = ("label", "event", "action", "description", "caption", "reason", "reasoning", "explanation", "confidence")
_TO_SQUARE = str.maketrans("()", "[]")


def read_interval(body: str) -> str:
    """`<start> to <end>` in seconds; raises Unreadable where an answer is not one interval."""
    if as_it_is := strict(body, "temporal"):
        return as_it_is
    text = plain(body)
    if text.startswith(("{", "[", "(")) and (value := json_value(text.translate(_TO_SQUARE))) is not None:
        return _interval_in_json(value)
    text = _ASIDE.sub(" ", _THAT_IS.split(text)[-1])
    if _OR.search(text):
        raise Unreadable("two_answers")
    if _OTHER_UNIT.search(text) or _DENIED.search(text):
        raise Unreadable("not_an_interval")
    text = re.sub(r"(?<=[0-9])-(?=(?:second|sec|minute|min)\b)", " ", digits_of_words(text), flags=re.IGNORECASE)
    if _JOINED_NUMBERS.search(text):
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    times = list(_TIME.finditer(text))
    intervals, others, index = [], [], 0
    while index < len(times):
        pair = times[index : index + 2]
        if len(pair) == 2 and _is_interval(text, *pair):
            intervals.append(_interval(*pair))
            index += 2
        else:
            others.append(times[index])
            index += 1
    # A digit that no time has taken would be dropped without a word.
    if not intervals or re.search(r"[0-9]", _TIME.sub(" ", text)):
        raise Unreadable("not_an_interval")
    if len({(Decimal(start), Decimal(end)) for start, end in intervals}) != 1:
        raise Unreadable("two_answers")
    ((start, end),) = intervals[:1]
    explicit = any(time["number"] is None for time in times) or bool(_OPENED.search(text[: times[0].start()]))
    for time in others:
        _check_other_time(time, Decimal(start), Decimal(end), explicit=explicit or bool(re.search("[a-z]", text)))
    return f"{start} to {end}"


def _check_other_time(time: re.Match[str], start: Decimal, end: Decimal, *, explicit: bool) -> None:
    """A time beside the interval has to be one of its ends or its length; "2 cups" in a sentence is no time."""
    if time["number"] and explicit and re.match(r"\s+[a-z]", time.string[time.end() :], re.IGNORECASE):
        return
    if Decimal(_seconds(time)) not in (start, end, end - start):
        raise Unreadable("not_an_interval")


def _is_interval(text: str, first: re.Match[str], last: re.Match[str]) -> bool:
    """Whether the text between two times joins them, and they are not below zero."""
    between, before = text[first.end() : last.start()], text[: first.start()].rstrip()
    if re.search(r"(?:^|[\s(\[,])-$", before):
        return False
    if (joined := _BETWEEN.fullmatch(between)) and joined["join"]:
        return True
    if _AND.fullmatch(between) and _OPENED.search(before + " "):
        return True
    # "[3, 5]" in a sentence, "3, 5"; but "3,5" is one number in half of the world.
    return between.strip() == "," and (before.endswith(("[", "(")) or between != ",")


def _interval(first: re.Match[str], last: re.Match[str]) -> tuple[str, str]:
    start, end = _seconds(first), _seconds(last)
    if first["number"] and not last["number"] and not last["clock"]:
        units = [unit for unit in ("h", "m", "s", "ms") if last[unit]]
        if len(units) > 1:
            # "3 to 5 min 10 s": 3 seconds or minutes?
            raise Unreadable("not_an_interval")
        # "1 to 2 minutes": a unit that only the end has counts for both.
        if units != ["s"]:
            start = decimal_text(Decimal(start) * _UNITS[units[0]][1])
    elif last["number"] and not first["number"] and not (first["s"] or first["clock"]):
        # "1 min to 3".
        raise Unreadable("not_an_interval")
    if Decimal(end) <= Decimal(start):
        raise Unreadable("not_an_interval")
    return start, end


def _seconds(time: re.Match[str]) -> str:
    if time["number"]:
        return time["number"].replace(",", "")
    if time["clock"]:
        total = Decimal(0)
        for part in time["clock"].replace(",", ".").split(":"):
            total = total * 60 + Decimal(part)
        return decimal_text(total)
    parts = [(time[unit], seconds) for unit, (_, seconds) in _UNITS.items() if time[unit]]
    if [unit for unit in _UNITS if time[unit]] == ["s"]:
        return time["s"].replace(",", "")
    return decimal_text(sum(Decimal(value.replace(",", "")) * seconds for value, seconds in parts))


def _interval_in_json(value: object) -> str:
    """An interval in JSON: `[3, 5]`, `[[3, 5]]`, `{"start": 3, "end": 5}`, `{"time": [3, 5]}`."""
    while isinstance(value, list | dict) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, str):
        return read_interval(value)
    if isinstance(value, dict):
        names = {str(key).lower(): item for key, item in value.items()}
        ends = [[names.pop(key) for key in keys if key in names] for keys in (_START, _END)]
        unit = str(names.pop("unit", "s")).lower()
        # A key that is not known may say that these are no seconds.
        if [len(items) for items in ends] != [1, 1] or not re.fullmatch(_S, unit) or not set(names) <= set(_REMARKS):
            raise Unreadable("not_an_interval")
        value = [item for (item,) in ends]
    if not isinstance(value, list) or len(value) < 2:
        raise Unreadable("not_an_interval")
    if len(value) > 2 or all(isinstance(item, list) for item in value):
        raise Unreadable("two_answers")
    times = [_TIME.fullmatch(item.strip()) if isinstance(item, str) else None for item in value]
    if not all(times):
        raise Unreadable("not_an_interval")
    return " to ".join(_interval(*times))
