"""Read one number in common notations, and write it as a decimal that `method.answers` parses."""

from __future__ import annotations

import re
from decimal import Decimal

from ..answers import parse_answer_body
from .doubts import contrast, is_denied, is_doubted, is_retracted
from .reasons import Unreadable
from .text import json_object, plain, without_remarks

# In "0,125", the comma is a decimal comma.
NUMBER = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate((*_ONES, *_TEENS))}
_WORDS |= {word: 10 * ten for ten, word in enumerate(_TENS, start=2)}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = rf"(?:{'|'.join(sorted((*_WORDS, *_MULTIPLES), key=len, reverse=True))})"
# "He claps twice", but not the comparisons "twice as many" and "twice the number".
_TWICE = re.compile(r"\b(twice|thrice)\b(?! (?:as|the|that|what|more)\b)", re.IGNORECASE)
_POINT = re.compile(
    rf"\b({_WORD}) point ((?:{'|'.join(_ONES[:10])})(?:\s+(?:{'|'.join(_ONES[:10])}))*)\b(?!\s+{_WORD})", re.IGNORECASE
)
_WORDS_IN_A_ROW = re.compile(rf"(?<![A-Za-z0-9-])(?:{_WORD}(?:(?:[\s-]+|\s+and\s+)(?={_WORD}\b))?)+(?![A-Za-z-])", re.I)
# "One of them", "no one", "the other one": a pronoun, not a number.
_PRONOUN = re.compile(
    r"\b(?:no|this|that|which|each|every|any|other|another|last|next|first|second|third|fourth|fifth)[ -]one\b"
    r"|\bonly[ -]one\b(?! (?!who|that|which|of|in|is|and|or)[a-z])|\bone (?:of|another|can|could|sees?|is|which)\b",
    re.IGNORECASE,
)

_HAN_BY_VALUE = ("零〇", "一", "二两兩", "三", "四", "五", "六", "七", "八", "九")
_HAN_DIGITS = {digit: value for value, digits in enumerate(_HAN_BY_VALUE) for digit in digits}
_HAN_POWERS = {"十": 1, "百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8}
_HAN = "".join((*_HAN_DIGITS, *_HAN_POWERS))
# Measure words for single things. A pair (双) or a multiple (倍) is not included.
_MEASURE = (
    "(?:[个個只隻名人次辆輛件张張条條位种種本杯台朵棵块塊米秒岁歲层層つ匹回頭头根支枚座间間把颗顆粒片艘架部幅瓶碗盏扇度元圆"
    "天年月日箱包盒盘袋串束脚滴句行列排级圈步声首封份门盆桶罐套笔轮局场集项处歳円分羽冊口道段页頁]"
    "|か所|ヶ所|千克|千米|千瓦|公里|公斤|厘米|毫米|小时|毫升)"
)
# "三个人": a numeral before a measure word, or as the whole answer.
_HAN_NUMERAL = re.compile(
    rf"(?<![0-9{_HAN}第几幾数數上成])([{_HAN}]+)(?=\s*{_MEASURE})|(?<![^\s负負约下])([{_HAN}]+)(?!\S)"
)

_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "trillion": 12, **_HAN_POWERS}
_SCALE = (
    r"(?:(?<=[0-9])k(?![A-Za-z/])|(?:hundred|thousand|million|billion|trillion)(?![A-Za-z-])"
    r"|[百千万萬亿億](?![克米瓦卡赫帕]))"
)
_SCALES = re.compile("|".join(sorted(_POWERS_OF_TEN, key=len, reverse=True)), re.IGNORECASE)
# A number with everything that affects its value: sign, currency, exponent or power, scale.
_COUNTED = re.compile(
    rf"(?<![A-Za-z0-9_.,:/^])(?P<sign>[+-]?)[€£¥]?(?P<number>{NUMBER})"
    r"(?:[eE](?P<e>[+-]?[0-9]{1,2})(?![A-Za-z0-9])|\s*(?:\*|×|x|\\times|·)\s*10\s*(?:\^|\*\*)\s*[({]?\s*"
    r"(?P<ten>[+-]?[0-9]{1,2})\s*[)}]?|(?:\^|\*\*)\s*[({]?(?P<power>[+-]?[0-9]{1,2})[)}]?)?"
    rf"(?P<scale>(?:\s*{_SCALE})*)",
    re.IGNORECASE,
)
_SPACED = re.compile(r"\s*[0-9]{1,3}(?:[ \u202f][0-9]{3})+\s*")
_APOSTROPHES = re.compile(r"(?<![0-9'’])[1-9][0-9]{0,2}(?:['’][0-9]{3})+(?![0-9'’])")
_FRACTION = re.compile(r"[\s$]*(-?)\s*\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}[\s$.]*")
_HALVES = {"½": "0.5", "¼": "0.25", "¾": "0.75"}
_BELOW_ZERO = re.compile(r"(?:\b(?:minus|negative)\s+|[负負]|零下)(?=[0-9])", re.IGNORECASE)
# Allowed directly before a count. Any other word may change its meaning: "double 3", "beyond 3", "Frame 3".
_BEFORE = re.compile(
    r"(?:^|[:：=≈~(\[，、。“\"]|,\s|(?:[a-z]{4}|approx)[.!;]\s"
    r"|(?<![A-Za-z'’-])(?:is|are|was|were|be|been|has|have|had|i|we|he|she|they|see|sees|saw|seen|counts?|counted"
    r"|counting"
    r"|identify|identified|observed?|find|found|spot|spotted|get|got|gives?|contains?|containing|includes?|features?"
    r"|shows?|shown|showing|says?|reads?|displays?|indicates?|appears?|appear|answer|sum|result|value|totals?"
    r"|totall?ing|only|just|exactly|precisely|about|approximately|approx|roughly|around|circa|ca|probably|likely|most"
    r"|the|these|those|all|with|equals?|(?:equal|comes?|comes? out|amounts?|adds? up|sums?(?: up)?|leads?) to|makes?"
    r"|in|on|at|for|so|then|us|usd|eur|there"
    r"|(?:total|number|sum|count|group|set|speed|temperature|price|height|length|weight|distance|cost|value|score"
    r"|age)\s+of"
    r"|(?:jump|lift|throw|take|make|perform|score|hit|kick|pick|hold|wear|eat|drink|pour|cut|turn|walk|knock|clap"
    r"|spin|roll"
    r"|open|close|use|put|place|shoot|drop|raise|buy|play|complete|attempt|visit|cross|passe|catche|touche|doe|run"
    r"|bounce|happen|occur|need|cost)(?:s|ed|d)?|took|did|made|threw|wore|ate|held|hits)"
    r"|[有共约約是为為了着见見现現计計数數は이がにで]|[看数听见得]到|上|中|里|答案)\s*$",
    re.IGNORECASE,
)
# Things that a number identifies instead of counting them, and words that change a number.
_NAMED_BY_NUMBER = re.compile(
    r"\b(?:frames?|steps?|scenes?|options?|parts?|pages?|levels?|versions?|channels?|rooms?|gates?|platforms?|figures?"
    r"|questions?|chapters?|doubles?|triples?|twice|half|every|each|or|to)\s$",
    re.IGNORECASE,
)
# Any verb in the third person and any participle: "carries 20", "marked 2500 kg", "filled to 0.75 cups".
_VERB = re.compile(
    r"(?<![A-Za-z])(?!(?:frames|steps|scenes|options|parts|pages|levels|versions|channels|rooms|gates|platforms|figures"
    r"|questions|chapters|seconds|minutes|hours|doubles|triples|halves|plus|minus|perhaps|unless|besides|always|times"
    r"|exceeds|nears|divided|multiplied|increased|reduced|increases|bus|lines|apartments|series|class)\s)"
    r"(?:[a-z]{2,}(?:s|ed|ing)|labell?ed|to|werden|wurden|sind|insgesamt|gibt|hay|son|tiene|sont)\s$"
)
_UNIT = re.compile(
    r"\s*(?:%|°\s?[CF]?|[€£¥$]|(?:km|cm|mm|m|kg|g|mg|ml|mL|cl|l|L|s|sec|secs|ms|h|hr|hrs|min|mins|in|ft|yd|mi|lbs?"
    r"|oz|mph|kph|fps|V|W|kW|kWh|Hz|kHz|MHz|GHz|GB|MB|KB|TB|dB|px|EUR|USD|RMB|CNY|GBP|bpm|kcal|cal)(?:\^?[23])?)"
    r"(?:/(?:km|h|s|m|min|kg|l|L|hr)\b)?(?![A-Za-z0-9^*×+])"
)
_AFTER_WORDS = r"(?:in|on|at|is|so|as|by|he|it|of (?:them|the|these|those|which)|to the|und|et|y|de|no)(?![A-Za-z])"
# Scales, shares, multiples and additions, which are not counted things. Words of one or two letters may be scales too.
_NO_NOUN = re.compile(
    r"\w*illi(?:on|ard|ón)\w*|millones|lakhs?|lacs?|crores?|mio|mrd|mln|mld|tsd|dozens?|scores?|gross|hundreds?"
    r"|thousands?|tens"
    r"|(?:hal(?:f|ves)|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|quarter|pair|couple"
    r"|double)s?"
    r"|mil|mille|bil|pp[mb]|down|off|short|mila|tausend|myriads?|squared|cubed|factorial|plus|minus|fold|odd"
    r"|something|more|less|fewer"
    r"|additional|extra|others?|point|below|above|over"
    r"|under|out|up|and (?:a|an|one|up|above|over|more|counting|another|some|several|many|change|half)\b|clock|pm|am"
    r"|percentile|per (?:cent )?mille",
    re.IGNORECASE,
)
_END = re.compile(r"\s*(?:$|[,.;:!)\]\"”“、。，；：](?![0-9])|\(|[-–—]\s)")
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|than|over|under|above|below|beneath|beyond|within|up to|or|between(?=\s*[0-9])"
    r"|exceed\w*|surpass\w*|upwards?|minimum|maximum|nearly|almost|barely|close to|nearing|near|approach\w*|short of"
    r"|as (?:many|few|much|little) as|or so|[0-9]+\s*-?\s*ish|tops|and (?:up|above|over|more|counting))\b"
    r"|[<>≥≤±‹›≦≧≶≷∓|]|\\(?:leq?|geq?|pm|mp|approx|lt|gt|sim)(?![a-z])|[0-9]\s*\+(?!\s*[0-9])"
    r"|至少|至多|最多|最少|最低|最高|以上|以下|以内|以外|以内|超过|超過|不到|不足|不止|不超|少于|多于|大于|小于|低于|高于|未満|高达|将近|近[0-9]"
    r"|接近|[余多几来][个個名人次位只辆]|左右还|或|\b(?:min|max)\b\.?(?=\s*[0-9])",
    re.IGNORECASE,
)
_RANGE = re.compile(rf"{NUMBER}\s*(?:-|~|〜|\bto\b|\bbis\b|到|至)\s*{NUMBER}", re.IGNORECASE)
# Sums, fractions, ordinals, times of day, shares. Units such as km/h are not included.
_NO_COUNT = re.compile(
    r"[0-9]\s*(?:[/√÷\\+-]|:\s*[0-9])|[*/√×÷]\s*[0-9]|[0-9]\s*[*×x]\s*[0-9]|[0-9](?:st|nd|rd|th)\b|第|倍|分之|根号|[双對对半]"
    r"|\b(?:half|halves|quarters?|dozens?|couple|pairs?|few|several|minus|negative|plus|twice|double|triple|additional"
    r"|hidden|another|many|more|fewer|less|extra|others|odd|each|apiece|besides|(?:apart|aside) from|per (?!hour"
    r"|second|minute|day|cent))\b|\band (?:an?|one|some)\b|[0-9]\s*(?:am|pm|a\.m|p\.m|o['’]clock)\b|\d\s*[!π]",
    re.IGNORECASE,
)
_ASIDE = re.compile(r"(?<=\S)\s*\(([^()]*)\)")
_UNSURE = re.compile(r"\b(?:maybe|perhaps|possibly|or|could|might|may|if)\b|也许|可能|或", re.IGNORECASE)
_CONVERTED = re.compile(r"°\s*[CF]\b|\b(?:km/h|mph|km|miles?|kg|lbs?|cm|inch(?:es)?)\b")
_BREAKDOWN = re.compile(r"[:：(]|其中|\bincluding\b|\bof which\b", re.IGNORECASE)
# After an answer, these words state another answer. A number without these words may be a frame number.
_RECOUNTED = re.compile(
    rf"\b(?:there (?:are|is|were)|it(?:['’]s| is)|i (?:now )?(?:count|see)|making|makes?|total(?:l?ing|s)?(?: of"
    rf"| is)?|brings? .{{1,20}} to"
    rf"|(?:should|must|would) be|becomes?|altogether|in total|plus|another|additional)\W{{0,3}}(?:now |actually "
    rf"|only )?"
    rf"(?={NUMBER})(\S+)",
    re.IGNORECASE,
)
_KEYS = {"answer", "count", "number", "value", "result", "total", "final_answer"}


def strict(text: str, task: str) -> str | None:
    """Return a text that parses strictly, with normalized white space and without a final period; otherwise None."""
    text = re.sub(r"(?<=[0-9])\.$", "", " ".join(text.split()))
    return text if parse_answer_body(text, task) is not None else None


def decimal_text(value: Decimal) -> str:
    """Return a decimal as text, without an exponent and without trailing zeros."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def digits_of_words(text: str) -> str:
    """Replace "three", "two hundred and five" and "three point five" by digits, but keep the pronoun "one"."""

    def digits(match: re.Match[str]) -> str:
        value = _value_of_words(re.findall(r"[a-z]+", match[0].lower()))
        return match[0] if value is None else str(value) + " " * match[0][-1].isspace()

    def decimals(match: re.Match[str]) -> str:
        whole = _WORDS.get(match[1].lower())
        return (
            match[0] if whole is None else f"{whole}." + "".join(str(_WORDS[word]) for word in match[2].lower().split())
        )

    # Pronouns are replaced by a placeholder during the search.
    text = _PRONOUN.sub(lambda match: re.sub("(?i)one", "\0", match[0]), text)
    text = re.sub(r"\ban? (?=(?:hundred|thousand|million)\b)", "one ", text, flags=re.IGNORECASE)
    return _WORDS_IN_A_ROW.sub(digits, _POINT.sub(decimals, text)).replace("\0", "one")


def _value_of_words(words: list[str]) -> int | None:
    """Return the number that words such as two, hundred, and, five spell; None if they do not spell one number."""
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
            # "twotwo" is not a number.
            if word not in _WORDS:
                return None
            value = _WORDS[word]
            # "twenty" is followed by a digit, "hundred" by anything smaller, and "three" by nothing.
            fits = last >= 100 or (20 <= last < 100 and 0 < value < 10)
            if not fits:
                return None
            group, last = group + value, value or 1
    return total + group


def read_number(body: str) -> str:
    """Return an answer as a decimal number. Raise Unreadable if it is not one number."""
    if as_it_is := strict(body, "numeric"):
        return as_it_is
    if re.fullmatch(r"\s*(?:one |a |the )?number[.\s]*", body, re.IGNORECASE):
        raise Unreadable("no_answer")
    if (fraction := _FRACTION.fullmatch(body)) and Decimal(fraction[3]):
        try:
            return fraction[1] + decimal_text(round(Decimal(fraction[2]) / Decimal(fraction[3]), 9))
        except ArithmeticError:
            raise Unreadable("not_a_number") from None
    if body.strip() in _HALVES:
        return _HALVES[body.strip()]
    text = plain(body)
    if record := without_remarks(json_object(text)):
        (value,) = record.values() if len(record) == 1 and set(record) <= _KEYS else [None]
        if not isinstance(value, str):
            raise Unreadable("not_a_number")
        return read_number(value)
    if (sides := contrast(text)) and _COUNTED.fullmatch(digits_of_words(sides[1])):
        text = sides[0]
    if is_doubted(text) or is_denied(text):
        raise Unreadable("a_range" if _BOUND.search(text) else "not_a_number")
    text = _with_digits(text)
    if _BOUND.search(text) or _RANGE.search(text):
        raise Unreadable("a_range")
    # "x = 3", "2 + 1 = 3": the side after the equals sign.
    sides = re.split(r"[=≈]", text)
    if len(sides) > 2:
        raise Unreadable("two_answers")
    text = _without_asides(sides[-1].strip())
    counts = list(_COUNTED.finditer(text))
    if not counts or re.search(r"(?<![A-Za-z])[0-9]", _COUNTED.sub(" ", text)):
        raise Unreadable("not_a_number")
    values = [_value(count) for count in counts]
    if len(set(values)) != 1 and not (
        # "4 cars: 2 red, 1 blue and 1 white".
        values[0] == sum(values[1:]) and _BREAKDOWN.search(text[counts[0].end() : counts[1].start()])
    ):
        raise Unreadable("two_answers")
    if is_retracted(text[counts[0].end() :]):
        raise Unreadable("two_answers")
    if _NO_COUNT.search(_COUNTED.sub("0", text)) or not _stands_as_a_count(text, counts[0]):
        raise Unreadable("not_a_number")
    # The number as written, with its zeros, if nothing changes its value.
    simple = counts[0]["number"].replace(",", "")
    return counts[0]["sign"].lstrip("+") + simple if abs(values[0]) == Decimal(simple) else decimal_text(values[0])


def recounted(sentence: str) -> set[Decimal]:
    """Return the counts in a sentence that follows an answer: "there are 4", "making 4", "plus 2"."""
    return {_value(_COUNTED.match(match[1])) for match in _RECOUNTED.finditer(digits_of_words(sentence))}


def _with_digits(text: str) -> str:
    """Replace number words by digits, and remove spaces from a number that is the whole answer."""
    if _SPACED.fullmatch(text):
        return re.sub(r"\s", "", text)
    text = _TWICE.sub(lambda match: "2 times" if match[1].lower() == "twice" else "3 times", text)
    text = _APOSTROPHES.sub(lambda match: re.sub("['’]", "", match[0]), digits_of_words(text))
    text = _HAN_NUMERAL.sub(lambda match: _han_digits(match[0]), text)
    return _BELOW_ZERO.sub("-", text)


def _value(count: re.Match[str]) -> Decimal:
    """Return the value of a number with its sign, exponent and scale. Raise Unreadable if it is too large."""
    try:
        return _scaled(count)
    except (ArithmeticError, ValueError):
        # Python converts at most 4300 digits, and decimals have a largest exponent.
        raise Unreadable("not_a_number") from None


def _scaled(count: re.Match[str]) -> Decimal:
    value = Decimal(count["number"].replace(",", ""))
    if count["power"]:
        # The 3 of "5³" may mark a footnote.
        if value != 10:
            raise Unreadable("not_a_number")
        value = value ** int(count["power"])
    value = value.scaleb(int(count["e"] or count["ten"] or 0))
    powers = [_POWERS_OF_TEN[scale.lower()] for scale in _SCALES.findall(count["scale"])]
    if powers != sorted(powers):
        raise Unreadable("not_a_number")
    value = value.scaleb(sum(powers))
    return -value if count["sign"] == "-" else value


def _stands_as_a_count(text: str, count: re.Match[str]) -> bool:
    """Return whether the words directly around a number do not change its value."""
    before, after = text[: count.start()], text[count.end() :]
    # Any verb may precede "3 times".
    near = before[-40:] if len(before) > 40 else before
    repeated = re.match(r"\s*times\b", after) and not _NAMED_BY_NUMBER.search(near)
    # "the number 20", but not "number 3 on the list".
    labeled = re.search(r"\bnumber\s$", near, re.IGNORECASE) and _END.match(after)
    if not (_BEFORE.search(near) or _VERB.search(near) or repeated or labeled):
        return False
    if _END.match(after) or _UNIT.match(after) or re.match(rf"\s*{_MEASURE}", after):
        return True
    noun = after.lstrip()
    if noun == after or _NO_NOUN.match(noun):
        return False
    return bool(re.match(rf"(?:[^\W\d_]{{3,}}|{_AFTER_WORDS})", noun, re.IGNORECASE))


def _without_asides(text: str) -> str:
    """Remove remarks in brackets: "2 times (at 0:03 and 0:09)", "7 (3 left, 4 right)".

    Raises:
        Unreadable: a remark gives another number: "3 (maybe 4)", "6 (seven)".
    """
    outside = _ASIDE.sub("", text)
    numbers = {Decimal(match["number"].replace(",", "")) for match in _COUNTED.finditer(outside)}
    if not numbers:
        return text
    for aside in _ASIDE.findall(text):
        counts = _COUNTED.finditer(re.sub(r"[0-9]+(?::[0-9]+)+", " ", aside))
        named = {Decimal(match["number"].replace(",", "")) for match in counts}
        if not named and re.match(
            r"\s*(?:in\s+)?(?:hundred|thousand|million|billion|trillion|[百千万亿])s?\b", aside, re.I
        ):
            raise Unreadable("not_a_number")
        converted = _CONVERTED.search(aside) and _CONVERTED.search(outside)
        if named - numbers and not converted and (len(named) == 1 or _UNSURE.search(aside)):
            raise Unreadable("two_answers")
    return outside


def _han_digits(numeral: str) -> str:
    """Convert a Chinese numeral below 10,000 to digits. Return other texts unchanged, such as "三四" (3 or 4)."""
    total, digit, last = 0, None, 4
    for sign in numeral:
        if sign in "零〇" and len(numeral) > 1:
            if digit is not None or not total:
                return numeral
        elif sign in _HAN_DIGITS:
            if digit is not None:
                return numeral
            digit = _HAN_DIGITS[sign]
        else:
            power = _HAN_POWERS[sign]
            # In 十五 (15), no digit precedes the ten.
            if power >= last or (digit is None and (power > 1 or total)):
                return numeral
            total, digit, last = total + (1 if digit is None else digit) * 10**power, None, power
    return str(total + (digit or 0))
