"""Detect doubt, denial and correction, for all closed task types.

An answer is tested as it was written, before labels, remarks and signs are removed, because they may deny it.
"""

from __future__ import annotations

import re

_UNCERTAIN = (
    r"(?:not|n['’]t|never)\s+(?:\w+\s+)?(?:sure|certain|confident|clear)\b|unsure|uncertain\w*|unclear|unknown"
    r"|undetermined"
    r"|(?:ca(?:n ?not|n['’]?t)|(?:could|do|does|did)(?: not|n['’]?t))\s+(?:\w+\s+)?(?:tell|know|determine|judge|say"
    r"|confirm|verify)"
    r"|(?:unable|impossible|hard|difficult)\s+to\s+(?:\w+\s+)?(?:tell|know|determine|judge|say|confirm|see|identify)"
    r"|(?:ca(?:n ?not|n['’]?t)|could(?: not|n['’]?t))\s+be\s+(?:\w+\s+)?(?:determined|confirmed|known|verified"
    r"|identified|told)"
    r"|without\s+(?:\w+\s+)?(?:seeing|watching|access|the (?:video|frames?|images?))|no\s+(?:idea|clue|way)"
    r"|(?<!\bno )(?<!\bwithout )(?<!\bwithout a )doubt\w*|guess\w*|(?:low|little|no) confidence|if (?:i|anything"
    r"|at all)|assum\w*|ambiguous|undecided|random\w*|none of the (?:options|choices|answers)"
)
# Words that make no claim: "maybe", "it could be", "I am not sure".
_DOUBTED = re.compile(
    rf"\b(?:{_UNCERTAIN})|\b(?:might|may|could|maybe|perhaps|possib\w*|seemingly|suppos\w*|suspect\w*|presum\w*"
    rf"|tentativ\w*|conceivabl\w*|arguabl\w*|seems? like|hopefully"
    r"|questionable|debatable|doubtful|disagree\w*|let['’]s say|allegedly|if|unless|whether"
    r"|either|tempting|(?<!most )plausible|or|oder|alternatively|however|vielleicht|quizás?|peut-être)\b"
    r"|[?？]|可能|也许|或|还是|猜|不确定|不清楚|不知道|大概不|如果|是否|无法|看不清|かもしれ|わから",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|none of|without|except|excluding|cannot|wrong|incorrect|false|rather than|instead of"
    r"|anything but|everything but|all but|nothing|far from|opposite|unlike|other than|contrary|mistake\w*"
    r"|fails?|hardly"
    r"|barely|scarcely|rarely|seldom|impossible|invalid|rul(?:e[sd]?|ing) out|eliminat\w*|exclud\w*|discard\w*"
    r"|reject\w*|nicht|pas|kein\w*|jamais|nunca)\b|n['’]t\b|不|没|未|非|错|排除|無|ない|ません|[✗✘❌]|~~|^\W*none\b"
    r"|\b(?:old|previous|initial|former|earlier|original) (?:box|answer|interval|count|estimate)\b",
    re.IGNORECASE,
)
# Absent things may be counted, but they are not in the picture.
_ABSENT = re.compile(
    r"\b(?:no(?! doubt)|fake|unlikely|least|outside|nearly|almost|absent|absence|missing|lacks?"
    r"|lacking|nowhere|invisible|used to|formerly|previous(?:ly)?|pretend\w*|refus\w*|avoid\w*|ignor\w*|replaced"
    r"|removed|elsewhere)\b",
    re.IGNORECASE,
)
_UNKNOWING = re.compile(
    rf"\b(?:{_UNCERTAIN})|^\W*not (?:visible|shown|seen)\W*$|无法(?:判断|确定|得知|看到)|不确定|不知道|看不清"
    rf"|わかりません",
    re.IGNORECASE,
)
# Words that retract an answer before them.
_TAKEN_BACK = re.compile(
    rf"\b(?:{_UNCERTAIN}|however|wait|actually|alternatively|on (?:second|further|closer) \w+|on reflection|on balance"
    r"|correction|scratch that|or (?:maybe|perhaps|possibly|rather)|hmm|oops|unless|(?:could|may|might) (?:also"
    r"|as well)"
    r"|answer (?:could|may|might)|(?:but|although) (?:it|i|this|that) (?:could|may|might)|there (?:may|might|could)"
    r"|possible|wrong answer|i (?:was|am|made|must have been)\b.{0,20}\b(?:wrong|mistake\w*)|my (?:mistake|bad)"
    r"|i misread|i['’]m (?:wrong|mistaken)|(?:disregard|ignore|retract) (?:the|my|that|this)|(?:edit|edited|update"
    r"|updated)\s*[:：]"
    r"|then again|changed my mind|tak(?:e|ing) (?:that|it|this) back|correct (?:that|it|this|myself|my)|make (?:that"
    r"|it)|i mean|more precisely|to be precise|never ?mind"
    r"|strike that|misspoke|(?:that|this|it)(?: is| was|['’]s) (?:not |in|un)?(?:correct|wrong|right|true)\b"
    r"|revis(?:ed|ion)|corrected|no,|sorry|instead(?! of)|honestly)(?![a-z])"
    r"|^\W*(?:or|rather)\b|然而|其实|但实际|更正|修正|说错|等等|或者|不对|可能|无法|不确定",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"(?:\s*[,，(;]\s*(?:and |but )?(?:not|rather than|instead of)|\s+(?:rather than|instead of|and not|but not)"
    r"|\s*[,，(]\s*(?:而)?不是)\s*([^()（）]{1,200}?)\s*\)?\s*[.。]?\s*$",
    re.IGNORECASE,
)


def is_denied(text: str) -> bool:
    return _DENIED.search(text) is not None


def is_absent(text: str) -> bool:
    return _ABSENT.search(text) is not None


def is_doubted(text: str) -> bool:
    return _DOUBTED.search(text) is not None


def is_unknowing(text: str) -> bool:
    """Return whether a sentence around an answer says that the answer is unknown."""
    return _UNKNOWING.search(text) is not None


def is_retracted(text: str) -> bool:
    """Return whether a text after an answer retracts it."""
    return _TAKEN_BACK.search(text) is not None


def contrast(text: str) -> tuple[str, str] | None:
    """Return the two sides of "B, not A", or None. The second side need not be an answer: "B, not sure"."""
    match = _CONTRAST.search(text)
    return (text[: match.start()], match[1]) if match else None
