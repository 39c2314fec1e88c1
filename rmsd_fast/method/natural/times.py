"""Read one interval in common notations, and write it in seconds."""

from __future__ import annotations

import re
from decimal import Decimal

from .doubts import contrast, is_absent, is_denied, is_doubted, is_retracted
from .numbers import NUMBER, decimal_text, digits_of_words, strict
from .reasons import Unreadable
from .text import json_value, plain, without_remarks

_CLOCK = r"[0-9]{1,2}:[0-5]?[0-9](?::[0-5]?[0-9])?(?:\.[0-9]+|,[0-9]{3}(?![0-9]))?"
# Each unit in seconds. A time must not continue as another word, unit or fraction.
_UNITS = {
    "h": (r"(?:h|hrs?|hours?|小时|时间|時間)(?![a-z])", Decimal(3600)),
    "m": (r"(?:m|mins?|minutes?|minuten|minutos?|分钟|分鐘|分)(?![a-z])", Decimal(60)),
    "s": (r"(?:s|secs?|seconds?|秒钟|秒鐘|秒|segundos?|sekunden?|secondes?)(?![a-z])", Decimal(1)),
    "ms": (r"(?:ms|msecs?|milliseconds?|毫秒)(?![a-z])", Decimal("0.001")),
}
_H, _M, _S, _MS = (pattern for pattern, _ in _UNITS.values())
_TIME = re.compile(
    rf"(?<![A-Za-z0-9_.])(?<![0-9][:,])(?:(?P<clock>{_CLOCK})(?:\s*(?:{_S}|{_M}))?"
    rf"|(?={NUMBER}\s*(?:{_H}|{_M}|{_S}))(?:(?P<h>{NUMBER})\s*{_H})?(?:\s*(?:and\s+)?(?P<m>{NUMBER})\s*{_M})?"
    rf"(?:\s*(?:and\s+)?(?P<s>{NUMBER})\s*{_S})?|(?P<ms>{NUMBER})\s*{_MS}"
    rf"|(?P<number>{NUMBER}))(?![A-Za-z0-9'\"%°:]|\.[0-9])",
    re.IGNORECASE,
)
_JOINER = (
    r"(?:to|until|till|til|through|thru|bis|hasta|a|à|ends?|ending|ended|end_?time|finish(?:es|ed|ing)?|"
    r"stops?|stopped|stopping|-+>?|[~〜]|→|到|至|から|まで|结束)"
)
# Allowed between the two times, in addition to a joiner. "lasts", "for" and "within" are not included, because a
# duration would be read as the end.
_BETWEEN = re.compile(
    rf"(?:\s|[,;:=\"'(\[]|\b(?:t\s*=|and|y|und|et|it|the|this|event|action|scene|which|then|at|around|about"
    rf"|approximately|"
    rf"roughly|approx|circa|time|timestamp|mark|seconds?|segundos?|of|is|on|in|up|going|continues?|continuing|runs?"
    rf"|with|sekunden?|secondes?|"
    rf"las|los|el|der|die)(?![a-z])|并|在|于|持续|一直|直|大约|约|第|时间|时刻|，|\.(?=\s)|(?P<join>(?<![a-z]){_JOINER}(?![a-z])))*",
    re.IGNORECASE,
)
_AND = re.compile(r"\s*(?:s\s*)?(?:and|y|und|et|[,，和])\s*(?:(?:at|about|the)\s+)*", re.IGNORECASE)
_OPENED = re.compile(
    r"\b(?:between|entre|zwischen|starts?|begins?|starting|beginning|start_time|from)\b[^0-9]{0,20}$|在$", re.IGNORECASE
)
# "(frames 90-150)"; but "(frames)" alone is the unit of the numbers before it.
_ASIDE = re.compile(r"[(（][^()（）]*(?:frames?|帧|コマ)[^()（）]*[0-9][^()（）]*[)）]", re.IGNORECASE)
_OTHER_TIME = re.compile(
    r"\b(?:minutes?|mins?|hours?|hrs?|milliseconds?|msecs?|ms)\b|分钟|小时|毫秒|\bhours\s*:", re.IGNORECASE
)
# "(mm:ss)", "(h:mm)", "(hours:minutes)".
_CLOCK_NAMED = re.compile(
    r"[(\[]?\b((?:[hmsf]{1,4}|hours?|minutes?|min|seconds?|sec|frames?)(?::(?:[hmsf]{1,4}|minutes?|min|seconds?|sec"
    r"|frames?))+)\b"
    r"[)\]]?",
    re.IGNORECASE,
)
_OTHER_UNIT = re.compile(
    r"\b(?:frames?|percent|days?|weeks?|years?|beats?|bpm|fps|hundred|thousand|million|half|quarter|ticks?"
    r"|normali[sz]ed|relative|fractions?|proportions?|scoreboard|stopwatch|countdown|score|odds|ratio)\b|帧|コマ|%|天|±|\^"
    r"|[(（]\s*(?:in\s+)?(?:minutes?|mins?|hours?|ms|milliseconds?)\s*[)）]",
    re.IGNORECASE,
)
# Words that make an interval a duration, or relative to a moment other than the start of the video.
_DURATION = re.compile(
    r"\b(?:long|in length|in duration|duration|apart|later|earlier|remain\w*|from the end|before the end|of footage"
    r"|span of|length)\b|时长|长达|持续了|之?[前后]$|後$|最后|最後",
    re.IGNORECASE,
)
# Allowed directly before an interval with a unit (_BEFORE), and in the whole sentence before one without (_FRAME).
_BEFORE = re.compile(
    r"(?:^|[:：=(\[，,;\"“]|\.\s|(?<![a-z])(?:is|are|was|at|about|approximately|approx|roughly|around|circa|ca"
    r"|of about|the"
    r"|from|between|von|vom|de|del|desde(?:\s+el)?|entre|zwischen|segundo|sekunde|seconde|second|seconds|timestamps?|runs?|occurs"
    r"|happens|spans"
    r"|interval|segment|window|range|period|event|answer|during|lies|starts|begins|starting|beginning|t\s*="
    r"|(?:happens|occurs) in|start(?:_time)?|time)|[从自在于於是为為は到第间間约約的])\s*$",
    re.IGNORECASE,
)
_FRAME = re.compile(
    r"(?:[\s:：=(\[，,;*\"“.-]|(?<![a-z])(?:the|this|it|its|that|so|is|are|was|at|about|approximately|approx|roughly"
    r"|around|circa"
    r"|from|between|von|de|desde|entre|zwischen|timestamps?|runs|occurs?|happens|takes place|took place|spans"
    r"|can be seen"
    r"|interval|segment|window|range|period|event|action|scene in question|answer|during|lies|starts|begins|starting"
    r"|beginning|start|start_time|times?|seconds|final|relevant|correct|moment|visible|shown|video|clip|in|of|t"
    r"|and|i|think|would|say|estimate)(?![a-z])|[从自在于於是为為は第间間约約时段区该事件发生答案：])*",
    re.IGNORECASE,
)
_UNIT_BEFORE = re.compile(r"(?:\b(?:segundo|seconds?|seconde|sekunde)|第|\bt\s*=)\s*$", re.IGNORECASE)
# "starts 3 to 5", "in 3 to 5", "-[3, 5]".
_NOT_DIRECTLY = re.compile(
    r"\b(?:starts?|begins?|starting|beginning|(?<!happens )(?<!occurs )in|within|of|video|clip)[\s(\[]*$"
    r"|(?:^|\s)-[\[(]$",
    re.IGNORECASE,
)
# "starts between 3 and 5 s" does not give an end.
_NOT_BETWEEN = re.compile(
    r"\b(?:starts?|begins?|ends?|stops?|lasts?|lasting|takes?|took|duration|sometimes?|somewhere|anywhere|away|apart"
    r"|far|different|starting|beginning|ending)\s+(?:\w+\s+)?(?:between|within)$",
    re.IGNORECASE,
)
# Allowed directly after an interval. Any other word may be a unit or another reference time.
_AFTER = re.compile(
    r"\s*(?:$|[.,;:!)\]\"”，。；、(（]|(?:in|on)\s+(?:the\s+)?(?:video|clip|footage|recording|film|timeline|seconds)\b"
    r"|(?:of|into)\s+the\s+(?:video|clip|footage|recording|film|timeline)\b"
    r"|(?:when|where|while|as|during|with|by|which|since|because|inclusive|marks?|timestamps?|range|interval|window"
    r"|segment|respectively|and|the|a|an|he|she|it|they)\b(?!\s+(?:later|before|after))"
    r"|之?[间間]|期间|まで|[的でにの]|です|结束|一直|处|時点|发生|出现|=|-\s)",
    re.IGNORECASE,
)
# "i.e. 7 to 10 seconds": the text after it explains the text before it.
_THAT_IS = re.compile(r"\bi\.e\.,?|\bthat is,?\s|即")
# 3,5 bis 7,25: without a decimal point, a comma followed by one or two digits is a decimal comma.
_DECIMAL_COMMA = re.compile(r"(?<![0-9,:])([0-9]+),([0-9]{1,2})(?![0-9,])")
_JOINED_NUMBERS = re.compile(rf"[0-9]\s*(?:{_S}\s*)?(?:\bto\b|\bbis\b|\bhasta\b|à|-)\s*[0-9]", re.IGNORECASE)

_START = ("start", "start_time", "begin", "from", "start_s", "start_sec", "start_seconds", "t_start", "starttime")
_END = ("end", "end_time", "stop", "to", "end_s", "end_sec", "end_seconds", "t_end", "endtime")
_KEYS = {
    "answer",
    "final_answer",
    "time",
    "times",
    "interval",
    "segment",
    "seconds",
    "timestamp",
    "timestamps",
    "time_range",
}
_KEYS |= {"time_interval", "time_segment", "span", "window", "period"}
# Spellings that are normalized: 1'03", "1 min 3", "在3秒和5秒之间", "3秒开始，5秒结束".
_SPELLINGS = (
    (re.compile(r"(?<![0-9:.])([0-9]{1,3})['’′]([0-5][0-9])(?:\"|''|”|″)"), r"\1:\2"),
    (
        re.compile(
            rf"\b([0-9]+)\s*(?:m|mins?|minutes?)\s+([0-5]?[0-9])(?![0-9.:])(?!\s*(?:{_H}|{_M}|{_S}|{_MS}))",
            re.IGNORECASE,
        ),
        r"\1 min \2 s",
    ),
    (re.compile(r"在\s*([0-9.:]+\s*秒?)[和与與]\s*([0-9.:]+\s*秒?)之?[间間]"), r"\1到\2"),
    (re.compile(r"([0-9.:]+\s*秒)开始[,，、]\s*([0-9.:]+\s*秒)(?:结束|停止)"), r"\1到\2"),
)
_CLOCK_IN_SECONDS = re.compile(rf"({_CLOCK})\s*\(\s*([0-9]+(?:\.[0-9]+)?)\s*{_S}\s*\)", re.IGNORECASE)
_SIMPLIFIED = str.maketrans("從開續鐘間時後視頻現見約為發", "从开续钟间时后视频现见约为发")
_TO_SQUARE = str.maketrans("()", "[]")


def read_interval(body: str) -> str:
    """Return an answer as `<start> to <end>` in seconds. Raise Unreadable if it is not one interval."""
    if as_it_is := strict(body, "temporal"):
        return as_it_is
    text = plain(body)
    if text.startswith(("{", "[", "(")) and (value := json_value(text.translate(_TO_SQUARE))) is not None:
        return _interval_in_json(value)
    if (sides := contrast(text)) and _TIME.match(re.sub(r"^(?:from|between)\s+", "", sides[1])):
        text = sides[0]
    if is_doubted(text):
        raise Unreadable("two_answers")
    if is_denied(text) or is_absent(text):
        raise Unreadable("not_an_interval")
    *explained, text = _THAT_IS.split(_ASIDE.sub(" ", text))
    if explained and not re.search(r"[0-9].*[0-9]", text):
        # "from 3 to 5 seconds, i.e. 2 seconds".
        text = " ".join((*explained, text))
    if _OTHER_UNIT.search(text) or _DURATION.search(re.sub(r"\([^()]*\)", "", text)):
        raise Unreadable("not_an_interval")
    text = _usual_spelling(text)
    times = list(_TIME.finditer(text))
    intervals, others, index = [], [], 0
    while index < len(times):
        pair = times[index : index + 2]
        if len(pair) == 2 and _is_interval(text, *pair):
            intervals.append(pair)
            index += 2
        else:
            others.append(times[index])
            index += 1
    # A digit outside of all times would be dropped silently.
    if not intervals or re.search(r"[0-9]", _TIME.sub(" ", text)):
        raise Unreadable("not_an_interval")
    if is_retracted(text[intervals[0][1].end() :]):
        raise Unreadable("two_answers")
    if not all(_stands_as_an_interval(text, *pair) for pair in intervals):
        raise Unreadable("not_an_interval")
    ends = [_interval(*pair) for pair in intervals]
    if len({(Decimal(start), Decimal(end)) for start, end in ends}) != 1:
        raise Unreadable("two_answers")
    start, end = ends[0]
    explicit = any(time["number"] is None for time in times) or bool(_OPENED.search(text[: times[0].start()]))
    for time in others:
        _check_other_time(time, Decimal(start), Decimal(end), explicit=explicit or bool(re.search("[a-z]", text)))
    return f"{start} to {end}"


def intervals_in(text: str) -> set[tuple[Decimal, Decimal]]:
    """Return all intervals in a sentence that follows an answer."""
    text = _usual_spelling(digits_of_words(text))
    times, intervals = list(_TIME.finditer(text)), set()
    for first, last in zip(times, times[1:], strict=False):
        if _is_interval(text, first, last) and not _OTHER_UNIT.search(text[max(0, first.start() - 8) : last.end() + 8]):
            start, end = map(Decimal, (_seconds(first), _seconds(last)))
            intervals.add((start, end))
    return intervals


def _usual_spelling(text: str) -> str:
    text = text.translate(_SIMPLIFIED)
    text = re.sub(r"(?<=[0-9])-(?=(?:second|sec|minute|min)\b)", " ", digits_of_words(text), flags=re.IGNORECASE)
    for spelling, usual in _SPELLINGS:
        text = spelling.sub(usual, text)
    if _JOINED_NUMBERS.search(text):
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    text = _CLOCK_IN_SECONDS.sub(_same_clock, text)
    if named := _CLOCK_NAMED.search(text):
        # All clock times must have the named fields, the last of them seconds.
        fields = named[1].lower().split(":")
        clocks = re.findall(r"[0-9]+(?::[0-9]+)+", text)
        if [field[0] for field in fields] != list("hms")[-len(fields) :] or any(
            clock.count(":") != len(fields) - 1 for clock in clocks
        ):
            raise Unreadable("not_an_interval")
        text = _CLOCK_NAMED.sub(" ", text)
    return text


def _same_clock(match: re.Match[str]) -> str:
    """Return "1:02" for "1:02 (62 s)". Raise Unreadable if the two differ."""
    clock = _TIME.match(match[1])
    if clock is None or Decimal(_seconds(clock)) != Decimal(match[2]):
        raise Unreadable("not_an_interval")
    return match[1]


def _stands_as_an_interval(text: str, first: re.Match[str], last: re.Match[str]) -> bool:
    """Return whether the words around two joined times allow them to be a start and an end."""
    before, after = text[: first.start()], re.sub(rf"^\s*[\])）]+(?:\s*{_S})?", "", text[last.end() :])
    if _NOT_DIRECTLY.search(before[-20:]) and not re.search(
        "end|stop|finish|结束", text[first.end() : last.start()], re.I
    ):
        return False
    in_seconds = any(time["number"] is None for time in (first, last)) or bool(_UNIT_BEFORE.search(before[-20:]))
    if not _AFTER.match(after) and not (in_seconds and re.match(r"\s+(?:in|on the|at|inside)\s", after)):
        return False
    if re.match(r"\s*of\b", after) and not in_seconds:
        return False
    if not in_seconds and _OTHER_TIME.search(text):
        return False
    if _NOT_BETWEEN.search(before[-80:].rstrip("[( ")):
        return False
    # Without a unit, "The score is 3 to 5" is not an interval, so all words before the times must refer to an interval.
    return bool(_BEFORE.search(before[-40:]) if in_seconds else _FRAME.fullmatch(before))


def _check_other_time(time: re.Match[str], start: Decimal, end: Decimal, *, explicit: bool) -> None:
    """Raise unless a time next to the interval is one of its ends or its length; "2 cups" is not a time."""
    if time["number"] and explicit and re.match(r"\s+[a-z]", time.string[time.end() :], re.IGNORECASE):
        return
    if Decimal(_seconds(time)) not in (start, end, end - start):
        raise Unreadable("not_an_interval")


def _is_interval(text: str, first: re.Match[str], last: re.Match[str]) -> bool:
    """Return whether the text between two times joins them, and the first is not negative."""
    between, before = text[first.end() : last.start()], text[max(0, first.start() - 80) : first.start()].rstrip()
    if re.search(r"(?:^|[\s(\[,])-$", before):
        return False
    if (joined := _BETWEEN.fullmatch(between)) and joined["join"]:
        return True
    if _AND.fullmatch(between) and _OPENED.search(before + " "):
        return True
    # "[3, 5]" in a sentence, and "3, 5"; but "3,5" may be one number with a decimal comma.
    return between.strip() == "," and (before.endswith(("[", "(")) or between != ",")


def _interval(first: re.Match[str], last: re.Match[str]) -> tuple[str, str]:
    start, end = _seconds(first), _seconds(last)
    if first["number"] and not last["number"] and not last["clock"]:
        units = [unit for unit in ("h", "m", "s", "ms") if last[unit]]
        if len(units) > 1:
            # "3 to 5 min 10 s": the unit of 3 is ambiguous.
            raise Unreadable("not_an_interval")
        # "1 to 2 minutes": a unit at the end applies to both times.
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
        for field in time["clock"].replace(",", ".").split(":"):
            total = total * 60 + Decimal(field)
        return decimal_text(total)
    amounts = [(time[unit], seconds) for unit, (_, seconds) in _UNITS.items() if time[unit]]
    if [unit for unit in _UNITS if time[unit]] == ["s"]:
        return time["s"].replace(",", "")
    return decimal_text(sum(Decimal(value.replace(",", "")) * seconds for value, seconds in amounts))


def _interval_in_json(value: object) -> str:
    """Read an interval in JSON: `[3, 5]`, `[[3, 5]]`, `{"start": 3, "end": 5}`, `{"time": [3, 5]}`."""
    while isinstance(value, list | dict) and len(value) == 1:
        # An unknown key may mean another unit.
        if isinstance(value, dict) and not set(value) <= _KEYS:
            raise Unreadable("not_an_interval")
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, str):
        return read_interval(value)
    if isinstance(value, dict):
        names = without_remarks(value)
        if set(names) & _KEYS and "unit" not in names:
            return _interval_in_json(names if len(names) == 1 else None)
        ends = [[names.pop(key) for key in keys if key in names] for keys in (_START, _END)]
        unit = str(names.pop("unit", "s")).lower()
        if [len(items) for items in ends] != [1, 1] or names or not re.fullmatch(_S, unit):
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
