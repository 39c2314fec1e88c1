"""Compare the answer of an `exact` question of a benchmark with its reference, by rules instead of a judge."""

from __future__ import annotations

import re
from fractions import Fraction

from .folding import fold_text

# Superscripts become exponents, because Unicode's normalization makes 10³ the number 103.
_SIGNS = {ord(sign): f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
# Spellings of the minus sign.
_SIGNS |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")
_LATEX = re.compile(r"\\[()\[\],;!]|\$|\\(?:left|right|text|mathrm|circ)\b|\^\{?\\circ\}?|°")
_AROUND = re.compile(r"\s*([=+*/^<>,;:(){}\[\]-])\s*")
_THOUSANDS = re.compile(r"(?<![\w.,])([-+]?\d{1,3}(?:,\d{3})+)(?![\d,])")
_SIGN_BEFORE_SPACE = re.compile(r"(^|[=(:,])\s*-\s+(?=[\d.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[*x×·])\s*10\s*\^\s*\{?([-+]?\d{1,3})\}?(?!\d)")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?(?!\.?\d|e[-+]?\d)")
_ONLY_NUMBER = re.compile(rf"({_NUMBER.pattern})\s*(?:degrees?|deg)?")
# Radians are numbers with decimals.
_DEGREES = re.compile(r"deg|°|\\circ", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\A.*\banswer(?:\s+is\b\s*:?|\s*[:=])", re.DOTALL)
# Python converts at most 4300 digits. A reference is far shorter.
_MOST_DIGITS = 40
# The exponent of a unit or the index of a variable; the exponent of a number changes its value.
_EXPONENT_OF_A_NAME = re.compile(r"(?<=[^\W\d_])[\^_]\{?[-+]?\w+\}?")
# A number next to one of these is part of an expression with another value.
_NAME_IN_BRACES = re.compile(r"\{([^\W\d_][^\W\d_/ ]*)\}")
_DENIED_NUMBER = re.compile(r"(?:\b(?:not|never)|n't)\s+(?:\w+\s+)?[-+]?\.?\d")
_EXPRESSION = re.compile(
    r"\^|√|π|\\?\b(?:sqrt|[dt]?frac|pi|log|ln|sin|cos|tan)(?![a-z])|(?<=\d)(?:sqrt|pi)\b|\d\s*\\|\d\s?[xyz]\b"
)
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|or)\b|n't\b")
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def exact_match(predicted: str, truth: str) -> float:
    """Return 1 if an answer states the reference of an `exact` question, otherwise 0.

    - A whole number must be the only number of the answer, and not denied. A number with decimals must equal the only
      number after it is rounded to these decimals. Powers, roots and fractions are not numbers; `1e3` and `1 x 10^3`
      are.
    - "yes", "no", "true" and "false" must begin or end the answer, without their opposite.
    - Any other reference must be the answer, or a phrase of it without a denial or an alternative ("not", "or").
    """
    answer, reference = _plain(predicted), _plain(truth)
    if answer == reference:
        return 1.0
    number = _joined(truth)
    if _NUMBER.fullmatch(number):
        return float(_only_number(_joined(predicted), number.partition("e")[0]) == _value(number))
    if reference in _OPPOSITES:
        return float(_states(answer, reference))
    return float(_contains(answer, reference))


def is_decided(predicted: str, truth: str) -> bool:
    """Return whether rules can tell if an answer is right: whether `exact_match` finds it right or wrong for sure.

    An answer that states the reference is right. Otherwise it is wrong for sure only if the reference is a number, or
    one of "yes", "no", "true" and "false", and the answer is another number, or the opposite, and nothing else. It may
    begin with words that end in "the answer is", and a whole number of degrees may have their unit. Any other answer
    may be right in another form: "2 hours" is 120 minutes, "5 thousand" is 5000, "50%" is 0.5, and "3 rows of four" are
    twelve.
    """
    if exact_match(predicted, truth):
        return True
    number, reference = _joined(truth), _plain(truth)
    if _NUMBER.fullmatch(number):
        # "$5" is an amount of money, and "$5$" a formula.
        match = None if predicted.count("$") % 2 else _ONLY_NUMBER.fullmatch(_alone(_joined(predicted)))
        is_angle = _DEGREES.search(predicted) is not None
        return match is not None and _value(match[1]) is not None and not (is_angle and "." in number)
    return reference in _OPPOSITES and _alone(_plain(predicted)) == _OPPOSITES[reference]


def _alone(answer: str) -> str:
    """Return what follows the last "the answer is" without marks around it, otherwise the whole answer."""
    return _ANSWER_IS.sub("", answer).strip("*_`() ").rstrip(".")


def _fold(text: str) -> str:
    return _LATEX.sub("", fold_text(text.translate(_SIGNS)))


def _plain(text: str) -> str:
    """Return a text without case, LaTeX's marks for formulas, and spaces around operators and commas."""
    return fold_text(_AROUND.sub(r"\1", _fold(text)))


def _joined(text: str) -> str:
    """Return a text whose numbers have no commas, no space after their sign, and powers of ten as exponents."""
    text = _fold(text).replace("{,}", ",")
    text = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    return _TIMES_TEN.sub(r"e\1", _SIGN_BEFORE_SPACE.sub(r"\1-", text)).strip()


def _only_number(answer: str, reference: str) -> Fraction | None:
    """Return the only number of an answer, rounded to the decimals of the reference; None if there is none."""
    answer = _EXPONENT_OF_A_NAME.sub("", _NAME_IN_BRACES.sub(r" \1", answer))
    if _EXPRESSION.search(answer) or _DENIED_NUMBER.search(answer):
        return None
    values = {_value(number) for number in _NUMBER.findall(answer)}
    if len(values) != 1 or None in values:
        return None
    (value,) = values
    decimals = len(reference.partition(".")[2])
    return round(value, decimals) if decimals else value


def _value(number: str) -> Fraction | None:
    return Fraction(number) if len(number) <= _MOST_DIGITS else None


def _states(answer: str, reference: str) -> bool:
    """Return whether an answer begins or ends with "yes", "no", "true" or "false", and does not have the opposite."""
    answer = answer.strip("*_`. ")
    if re.search(rf"\b{_OPPOSITES[reference]}\b", answer):
        return False
    begins = rf"{reference}(?:\Z|[,.;:!*]|\s+(?:it|he|she|they|there|this|that|the)\b)"
    ends = rf"(?:\bis|:|\banswer)\W*{reference}\Z"
    return re.match(begins, answer) is not None or re.search(ends, answer) is not None


def _contains(answer: str, reference: str) -> bool:
    """Return whether a phrase of the answer is the reference, and the rest has no denial or alternative."""
    if len(reference) < 2:
        return False
    # A number at an edge of the reference must be whole, too.
    before = r"(?<![\w.^/-])" if reference[0].isdigit() else r"(?<![\w.])"
    after = r"(?![\w^/]|\.\d)" if reference[-1].isdigit() else r"(?!\w)"
    around = re.sub(before + re.escape(reference) + after, " ", answer)
    return around != answer and not _DENIAL.search(around)
