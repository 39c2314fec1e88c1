"""Find the letter of an option that an answer gives by its letter, its words or both."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ..answers import bare_options, option_letters
from .doubts import contrast, is_absent, is_denied, is_doubted, is_retracted
from .reasons import Unreadable, the_only
from .text import compatible, json_value, plain, without_remarks

_ONE_LETTER = re.compile(r"[(\[{<【「]?\s*([A-Za-z])\s*[)\]}>】」]?\s*[.:、,)]?")
# "B. milk", "(b) milk", "B - milk", "B, milk". If only a space follows, the rest of the text decides: "A man" begins
# with a word.
_LED = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:、,-]?|([A-Za-z])\s*[.:、)]|([A-Z])\s*-+(?=\s)|([A-Z])\s*[,;(])\s*(.+)",
    re.DOTALL,
)
_LED_BY_BLANK = re.compile(r"([A-Z])(?:\s+|(?=[^\x00-\x7f]))(.+)", re.DOTALL)
# Words before an answer that do not affect it.
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|yes|well|ok|okay|and|but|honestly|probably|likely|most likely|definitely"
    r"|clearly|obviously|surely|i(?:['’]m| am)(?: very| quite| fairly)? (?:confident|sure|certain)(?: that)?"
    r"|i(?: would|['’]d|['’]ll| will)? (?:think|believe|say|choose|pick|select|go with|opt for)(?: that)?"
    r"|my (?:final )?(?:answer|choice) is|(?:it|that|this)(?:['’]s| is| was| must be| would be| should be| has to be)"
    r"|(?:the )?(?:correct |best |right )?(?:answer|option|choice|letter)(?: is| must be| should be| would be)?)\b"
    r"|应该|应当|应|我认为|我觉得|所以|因此|故|即|选项|选择|选|答案|是|为)[\s,:;.—-]*",
    re.IGNORECASE,
)
_AFFIRMED = re.compile(
    r"(?:(?:is|was|seems|looks|appears|would be|must be|should be|has to be)(?: to be)?\s+)?(?:the\s+)?"
    r"(?:(?:most|only|clearly|definitely|obviously|likely)\s+)*"
    r"(?:correct|right|best|true|accurate|answer|one|option|choice|likely|plausible|fits?|fitting|matche?s?)\b"
    r"|(?:because|since|as|given|due to|based on)\b|是?(?:最|更)?(?:正确|符合|合适|准确|对)|因为|由于|[✓✔✅]",
    re.IGNORECASE,
)
# A single capital, or any letter in brackets, inside a sentence.
_MENTION = re.compile(r"[(\[]([A-Za-z])[)\]]|(?<![A-Za-z0-9_'’.-])([A-Z])(?![A-Za-z0-9_'’-]|\.[A-Za-z0-9])")
_A_WORD = re.compile(r"\s+(?!(?:or|and|is|nor|vs)\b)[a-z]")
_NAMED = re.compile(
    r"(?:(?:option|choice|answer|letter)(?![A-Za-z])|选项|选择|选|答案)\s*(?:is|是|为"
    r"|:)?\s*[(\[]?([A-Za-z])(?![A-Za-z'’-])[)\]]?"
    r"|[(\[]([A-Za-z])[)\]]|(?:\b(?:is|be)|:|→|=|是|为)\s*([A-Z])(?=\s*[.。]?$)"
    r"|(?<![\w'’-])([B-HJ-Z])(?=\s+is\s+(?:the\s+)?(?:most|best|correct|right|only)\b)",
    re.IGNORECASE,
)
_EXPLAINED = re.compile(r"\b(?:because|since|as|given|due to)\b|因为|由于", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|a|an)\s+")
_MY = re.compile(r"\s+(?:the|a|an|his|her|its|their|glass of|cup of|bottle of|some)$")
# "The jacket is", "He wears": allowed before an option's words at the end of a sentence.
_TELLING = re.compile(
    r"(?:\b(?:is|are|was|were|wears?|wore|wearing|holds?|holding|has|have|shows?|showing|pours?|pouring|poured"
    r"|plays?|playing"
    r"|drinks?|drinking|eats?|eating|uses?|using|carries|carrying|rides?|riding|drives?|driving|says|reads|turns"
    r"|becomes?|in|on|at|into|made|[a-z]{3,}(?:ing|ed))|[是为為在了着到有穿拿])$"
)
# Options that affirm or deny a question. Inside a sentence, these words are not answers: "no idea", "not yes".
_POLAR = {
    "yes",
    "no",
    "not",
    "是",
    "不是",
    "否",
    "有",
    "没有",
    "对",
    "不对",
    "会",
    "不会",
    "能",
    "不能",
    "可以",
    "不可以",
}
_POLAR_ANSWER = re.compile(r"\W*([A-Za-z]+|[是不否有没对会能可以]+?)的?\s*(?:$|[,，.。!！;；:：—]|-\s)(.*)", re.DOTALL)
_CALLED_WRONG = re.compile(
    r"\W*(?:(?:which|that|this) is )?(?:wrong|incorrect|false|not (?:right|correct|true))\b|\W*[✗✘❌]", re.I
)
# Punctuation that the comparison of words ignores.
_CROSSED = re.compile(r"[?？✗✘❌]")
# "Option B is a trap": such a judgment counts only if it affirms the option.
_JUDGED = re.compile(r"\s+(?:is|was|are|looks?|seems?|sounds?|appears?|would|can|could|has)\b", re.IGNORECASE)
_KEYS = {"answer", "option", "choice", "letter", "final_answer", "correct_answer", "correct_option"}
# Keys for the option's words, next to its letter.
_TEXT_KEYS = {"text", "option_text", "answer_text"}
# A longer sentence may repeat an option without choosing it.
MOST_WORDS = 30
_ALL_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_letter(body: str, options: Sequence[str] | None) -> str:
    """Return the letter of the only option that an answer names. Raise Unreadable otherwise.

    Without options, the letter must be the whole text or be named as the answer, since a capital in a sentence may be a
    word.
    """
    text = plain(_inside_json(body))
    if not text:
        raise Unreadable("no_answer")
    letters = _ALL_LETTERS if options is None else option_letters(options)
    texts = comparable_options(options)
    if (sides := contrast(text)) and _is_another(sides[1], options, letters):
        text = sides[0]
    if letter := _as_a_whole(text, options, letters):
        return letter
    # A sentence that names one option by its letter or its words, without denial or doubt.
    named = {
        next(group for group in match.groups() if group).upper()
        for match in _NAMED.finditer(text)
        if not _JUDGED.match(text, match.end()) or _AFFIRMED.match(text[match.end() :].lstrip())
    }
    claim = _EXPLAINED.split(text)[0]
    named |= _told(claim, texts, letters) or _told_in_words(claim, texts, letters)
    mentioned = named | _quoted(text, texts, letters) | _mentioned(text, letters)
    if len(mentioned) > 1:
        raise Unreadable("two_answers")
    if not named or _is_unsure(text, options):
        raise Unreadable("not_an_option")
    return _among(the_only(sorted(named)), letters)


def whole_option(text: str, options: Sequence[str] | None) -> str | None:
    """Return the letter if the whole text is an option: its letter, its words, or both, possibly with an explanation.

    Raises:
        Unreadable: the text names two options.
    """
    letters = _ALL_LETTERS if options is None else option_letters(options)
    text = plain(text)
    if (sides := contrast(text)) and _is_another(sides[1], options, letters):
        text = sides[0]
    return _as_a_whole(text, options, letters)


def names_another(sentence: str, letter: str, options: Sequence[str] | None) -> bool:
    """Return whether a sentence after an answer names another option without denying it."""
    letters = _ALL_LETTERS if options is None else option_letters(options)
    mentioned = {name for name in _mentioned(sentence, letters) if name in letters}
    if mentioned - {letter} and not _is_denied_beside(sentence, options):
        return True
    for clause in re.split(r"[,，;；:：]", sentence):
        try:
            if whole_option(clause, options) not in (None, letter):
                return True
        except Unreadable as error:
            if error.reason == "two_answers":
                return True
    return False


def quotes_another(text: str, letter: str, options: Sequence[str] | None) -> bool:
    """Return whether a few words next to an answer contain another option's letter or words, even if they deny it."""
    letters = _ALL_LETTERS if options is None else option_letters(options)
    texts = comparable_options(options)
    polar = {
        of for of, word in zip(letters, texts, strict=False) if word in _POLAR and word in comparable(text).split()
    }
    return bool((_mentioned(text, letters) | _quoted(text, texts, letters) | polar) - {letter})


def is_whole_letter(text: str, options: Sequence[str] | None) -> bool:
    """Return whether a possibly truncated text is a complete option letter: "B", "(B)", "B. mi"; not "A" of "A man"."""
    text = plain(text)
    texts = bare_options(options) if options is not None else []
    if _ONE_LETTER.fullmatch(text):
        return not any(option.startswith(f"{text} ") for option in texts)
    led = _LED.fullmatch(text)
    letter = next((group for group in led.groups()[:4] if group), "").upper() if led else ""
    index = _ALL_LETTERS.find(letter) if letter else -1
    return 0 <= index < len(texts) and comparable(texts[index]).startswith(comparable(led[5]))


def comparable_options(options: Sequence[str] | None) -> Sequence[str]:
    """Return the options' words without their letters, normalized for comparison."""
    return () if options is None else _comparable_options(tuple(options))


@functools.lru_cache(maxsize=64)
def _comparable_options(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(comparable(option) for option in bare_options(options))


@functools.lru_cache(maxsize=64)
def _option_words(options: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return a pattern for the options' words in a sentence, longer options first."""
    texts = sorted((text for text in bare_options(options) if comparable(text) not in _POLAR), key=len, reverse=True)
    words = [rf"(?<!\w){re.escape(text)}(?!\w)" if text.isascii() else re.escape(text) for text in texts if text]
    return re.compile("|".join(words), re.IGNORECASE) if words else None


def comparable(text: str) -> str:
    """Return the words of an option or answer without case, punctuation and a leading article, for comparison."""
    text = compatible(text).casefold()
    text = " ".join(re.sub(r"[^\w\s.%+-]|[.](?!\d)", " ", text).split())
    return _ARTICLE.sub("", text)


def _as_a_whole(text: str, options: Sequence[str] | None, letters: str) -> str | None:
    texts = comparable_options(options)
    if _CROSSED.search(text) and _CROSSED.search(_without_option_words(text, options)):
        return None
    for _ in range(5):
        if len(text) > 3 and text[0] in "([" and text[-1] in ")]" and text.count(text[0]) == 1:
            text = text[1:-1].strip()
        if letter := _ONE_LETTER.fullmatch(text):
            return _among(letter[1].upper(), letters)
        # This is tested before the words are compared, because the A of "A. milk" is not an article.
        if led := _LED.fullmatch(text):
            letter = next(group for group in led.groups()[:4] if group).upper()
            return _followed(letter, led[5], options, letters)
        if same := _equal(text, texts, letters):
            return the_only(same)
        if led := _LED_BY_BLANK.fullmatch(text):
            letter, rest = led.groups()
            affirmed = _AFFIRMED.match(rest) and (
                letter not in "AI" or not _A_WORD.match(" " + rest) or "correct" in rest
            )
            if affirmed or letter in _equal(rest, texts, letters):
                return _followed(letter, rest, options, letters)
        lead = _LEAD_IN.match(text)
        # The lead-in may itself be an option, such as "Yes".
        if not lead or lead.end() == len(text) or _equal(lead[0].strip(" ,:;.—-"), texts, letters):
            return None
        text = text[lead.end() :].strip()
    return None


def _inside_json(body: str) -> str:
    """Return the answer of `{"answer": "B"}` or `["B"]`, and any other text unchanged."""
    text = body.strip()
    value = json_value(text) if text.startswith(("{", "[")) else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        record = without_remarks(value)
        answers = [item for key, item in record.items() if key in _KEYS]
        words = [item for key, item in record.items() if key in _TEXT_KEYS]
        # An unknown key may deny the answer.
        if len(answers) != 1 or len(answers) + len(words) < len(record) or len(words) > 1:
            raise Unreadable("not_an_option")
        value = answers[0]
        if words and isinstance(value, str) and isinstance(words[0], str):
            value = f"{value}. {words[0]}"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise Unreadable("not_an_option")
    return text if value is None else value


def _is_another(text: str, options: Sequence[str] | None, letters: str) -> bool:
    """Return whether the text after "not" is an option itself: "B, not A", but not "B, not sure"."""
    try:
        if _as_a_whole(text.strip(), options, letters) is not None:
            return True
    except Unreadable:
        return False
    # "coffee (B)".
    texts = comparable_options(options)
    return len(text.split()) <= 8 and len(_mentioned(text, letters) | _quoted(text, texts, letters)) == 1


def _without_option_words(text: str, options: Sequence[str] | None) -> str:
    words = _option_words(tuple(options)) if options is not None else None
    return words.sub(" ", text) if words else text


def _is_unsure(text: str, options: Sequence[str] | None) -> bool:
    """Return whether a sentence denies, doubts or retracts. A "not" in the words of an option does not count."""
    text = _without_option_words(text, options)
    return is_denied(text) or is_doubted(text) or is_absent(text) or is_retracted(text)


def _is_denied_beside(sentence: str, options: Sequence[str] | None) -> bool:
    text = _without_option_words(sentence, options)
    return is_denied(text) or is_absent(text)


def _followed(letter: str, rest: str, options: Sequence[str] | None, letters: str) -> str:
    """Return a letter that is followed by its option's words, or by an explanation that names no other option."""
    _among(letter, letters)
    texts = comparable_options(options)
    same = _equal(rest, texts, letters)
    # The option's words, possibly truncated.
    words = comparable(rest)
    begun = [letters[index] for index, text in enumerate(texts) if len(words) > 20 and text.startswith(words)]
    if letter in same or begun == [letter]:
        return letter
    # "B is wrong", "B, maybe"; but "B, because it is not brown", "B since A and C do not match".
    explained = _EXPLAINED.search(rest)
    claim = rest[: explained.start()] if explained else rest
    others = _mentioned(claim, letters) | _quoted(claim, texts, letters)
    if explained and not is_denied(rest[explained.start() :]):
        others |= _mentioned(rest, letters) | _quoted(rest, texts, letters)
    if not same and _is_denied_beside(claim, options):
        raise Unreadable("not_an_option")
    if same or others - {letter} or _is_unsure(claim, options):
        raise Unreadable("two_answers")
    return letter


def _equal(text: str, texts: Sequence[str], letters: str) -> list[str]:
    """Return the letters of options that equal a text; "No, he does not" equals the option "No"."""
    words = comparable(text)
    same = [letters[index] for index, option in enumerate(texts) if option and option == words]
    if same or not _POLAR.intersection(texts):
        return same
    answer = _POLAR_ANSWER.match(text)
    word = answer[1].casefold() if answer else ""
    if word not in _POLAR or word not in texts:
        return []
    letter = letters[texts.index(word)]
    rest = answer[2]
    others = (_mentioned(rest, letters) | _quoted(rest, texts, letters)) - {letter}
    opposite = any(text != word and f" {comparable(rest)}".endswith(f" {text}") for text in texts)
    if others or opposite or is_doubted(rest) or is_retracted(rest) or _CALLED_WRONG.match(rest):
        raise Unreadable("two_answers")
    return [letter]


def _told(text: str, texts: Sequence[str], letters: str) -> set[str]:
    """Return options whose words end or begin an affirming sentence: "The jacket is red", "Milk is the correct one"."""
    words, told = comparable(text), set()
    for index, option in enumerate(texts):
        if not option or option in _POLAR or option not in words:
            continue
        before = _MY.sub("", words[: -len(option)].rstrip()) if words.endswith(option) else ""
        after = words[len(option) :].lstrip() if words.startswith(f"{option} ") else ""
        if _TELLING.search(before) or (after and _AFFIRMED.match(after)):
            told.add(letters[index])
    return told


def _told_in_words(text: str, texts: Sequence[str], letters: str) -> set[str]:
    """Return the only option that a sentence repeats, if it has several words; a single word may be a coincidence."""
    quoted = _quoted(text, texts, letters)
    words = [texts[letters.index(letter)] for letter in quoted]
    several = len(words) == 1 and (" " in words[0] or (not words[0].isascii() and len(words[0]) > 3))
    return quoted if several and len(text.split()) <= MOST_WORDS else set()


def _mentioned(text: str, letters: str) -> set[str]:
    """Return the letters in a sentence that refer to options, without an A or I that is a word."""
    mentioned = set()
    for match in _MENTION.finditer(text):
        letter = (match[1] or match[2]).upper()
        is_word = match[2] in ("A", "I") and _A_WORD.match(text, match.end())
        if not is_word and (letter in letters or match[1] is None):
            mentioned.add(letter)
    return mentioned


def _quoted(text: str, texts: Sequence[str], letters: str) -> set[str]:
    """Return options whose words occur in a sentence. If one option contains another, only the longer one counts."""
    text = f" {comparable(text)} "
    quoted = set()
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        # Scripts without spaces have no word boundaries.
        words = f" {texts[index]} " if texts[index].isascii() else texts[index]
        if words.strip() and texts[index] not in _POLAR and words in text:
            quoted.add(letters[index])
            text = text.replace(words, " | ")
    return quoted


def _among(letter: str, letters: str) -> str:
    if letter not in letters:
        raise Unreadable("not_an_option")
    return letter
