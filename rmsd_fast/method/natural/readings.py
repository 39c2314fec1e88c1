"""Extract the text in a picture from sentences without answer tags: `The sign reads "EXIT", in green letters.`

If a sentence about a text contains one quoted or emphasized text, this is the reading, regardless of the rest of the
sentence. Two different quotations are rejected, unless the second one follows "not". The text in a picture may itself
contain quotation marks, so a quotation counts only in a sentence about a text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .doubts import is_denied, is_doubted, is_retracted, is_unknowing
from .reasons import Unreadable
from .text import unquoted

MOST_QUOTATIONS = 50

# Things that bear a text. In capitals, they may be the text itself: "Joe's Book Shop".
THING = (
    r"(?:texts?|sign(?:s|age|board|post)?|captions?|subtitles?|titles?|head(?:line|er|ing)s?|labels?|words?|wording"
    r"|phrases?|sentences?|letter(?:s|ing)?|inscription|writing|messages?|notes?|banner|display|screen|monitor"
    r"|(?:score|bill|white|black|chalk|key|dash|card)?board|plates?|plaque|placard|stickers?|posters?|flyer|logo|brand"
    r"|name|number|numeral|digits?|price|tags?|badge|clock|watch|timer|stopwatch|counter|scale|meter"
    r"|(?:speedo|odo|thermo)meter|gauge|panel|ticket|receipt|menu|cover|page|book|magazine|newspaper|card|box|can|bottle"
    r"|package|packaging|carton|jar|mug|cup|bag|(?:t-)?shirt|jersey|uniform|vest|jacket|hoodie|cap|hat|cake|awning"
    r"|storefront|(?:shop|store)?front|window|door|wall|van|truck|bus|taxi|envelope|letterhead|slide|chart|map|website"
    r"|url|address|tattoo|graffiti|credits?|watermark|username|handle|button|chyron|ticker|overlay|graphic|stamp|mat"
    r"|ribbon|flag|arrow|line|row|code)"
)
# Verbs for texts. With "is" and "has", the sentence must also name a thing that bears a text.
_WRITES = (
    r"(?:reads?|reading|says?|saying|spells?|spelling|shows?|showing|displays?|displayed|displaying|states?|stating"
    r"|indicates?|bears?|bearing|carries|writes?|written|writing|prints?|printed|painted|engraved|inscribed|embossed"
    r"|stamped|embroidered|etched|label(?:l?ed|s)|marked|titled|entitled|captioned|featur(?:es|ing)|contain(?:s|ing))"
)
_FOREIGN = re.compile(
    r"\b(?:steht|stehen|zeigt|lautet|sagt|aufschrift|schild|geschrieben|beschriftet|indique|affiche|enseigne|panneau"
    r"|pancarte|plaque|est (?:écrit|inscrit|marqué)|se lit|porte|dit|inscription|dice|pone|muestra|letrero|cartel"
    r"|rótulo|texto|palabra|escrit[oa]|se lee|diz|mostra|placa|lê-se|scritta|scritto|cartello|insegna|legge|riporta"
    r"|testo|staat|bord|toont|opschrift|napis|tabliczka|yazıyor|надпись|написано|вывеск\w*|табличк\w*|гласит)\b"
    r"|写|显示|文字|字样|标(?:有|着|注|识|题)|印|题字|牌|招牌|字幕|刻|名称|品牌|読め|書|表示|看板|文字|とあり|쓰여|적혀|표시"
    r"|간판|내용(?:是|为)|内容[是为]",
    re.IGNORECASE,
)
_SPEAKS = re.compile(
    rf"(?i:\b{_WRITES}\b)|(?i:\b(?:i|we|you|one)\s+(?:can\s+)?(?:see|read)\b)|\b{THING}\b[^.]*\b(?:is|are|was|has|have|with|appears?)\b"
    rf"|\b(?:is|are|was)\b[^.]*\b{THING}\b|\b(?:[Ii]t|[Tt]here)(?:['’]s| is)\b"
    rf"|(?i:^\W*(?:[\w'’-]+\s+){{0,6}}?{THING}(?:\s+[\w-]+){{0,8}}?\W*[:：]\W*$)"
)
_THING_NAMED = re.compile(rf"\b{THING}\b")
_PERSON = re.compile(
    r"\b(?:he|she|they|(?:wo)?man|boy|girl|person|people|narrator|speaker|voice|host|presenter|teacher|child|kid"
    r"|reporter|announcer|character)\s+(?:\w+ly\s+)?(?:says?|said|shouts?|asks?|replies|whispers?|yells?|sings?)\b",
    re.IGNORECASE,
)
_HEDGED = re.compile(
    r"\b(?:könnten?|wahrscheinlich|podrían?|pourrait|probablement|probablemente|tal vez|forse|potrebbe"
    r"|talvez)\b"
    r"|(?:可能|好像|似乎|大概|应该)是?|たぶん|おそらく|아마",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\bno (?:dice|pone|muestra|indica|es)\b|\bn['’]|\bnon (?:dice|è)\b|\bне\b", re.IGNORECASE)
# Words for a text that is not fully legible.
_BLURRED = re.compile(
    r"\b(?:blur\w*|illegible|unreadable|unclear|partial\w*|partly|covered|hidden|obscured|obstructed|cut off|washed out"
    r"|(?:hard|difficult) to (?:read|see|make out)|make out|made out|guess\w*|mirrored|(?:not|n['’]t) (?:\w+ )?"
    r"(?:legible|readable|visible|clear))\b|看不清|模糊|无法辨认|遮",
    re.IGNORECASE,
)
# "The other says ENTER."
_SAYS_UNQUOTED = re.compile(r"\b(?:says?|reads?|spells?)\b|\b(?:shows?|displays?)\s+(?-i:[A-Z0-9])", re.IGNORECASE)
_CONTRAST = re.compile(
    r"(?<=[\ue000-\ue0ff])(?P<kept>[^\ue000-\ue0ff]*?)[\s,，;(（—–-]*(?:and |but )?"
    r"(?:\b(?:not|rather than|instead of|as opposed to|nicht|non|pas)\b|而不是|不是|而非|并非)\s*"
    r"(?:(?:the|a|an|as)\s+)?(?:(?:word|text|name)\s+)?"
    r"[\ue000-\ue0ff]\s*[)）]?",
    re.IGNORECASE,
)
_MASK = re.compile(r"[\ue000-\ue0ff]")
_QUOTATION = re.compile(
    r"```[ \t]*\w*\n([^`]+?)\n?```|\*\*\*([^*\n]+)\*\*\*|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])"
    r"|`([^`\n]+)`|(?<![A-Za-z0-9])\"([^\"]{1,400})\"|[“„]([^“”„\"]{1,400})[”“\"]|«([^«»]{1,400})»|»([^«»]{1,400})«"
    r"|‹([^‹›]{1,400})›|「([^「」]{1,400})」|『([^『』]{1,400})』"
    r"|(?<![A-Za-z0-9])[‘']((?:[^’'‘\n]|(?<=\w)[’'](?=\w)){1,400})[’'](?![A-Za-z0-9])"
)
_STRAY = re.compile(r"[\"“”„«»「」『』]")
_STOP = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"”’'»*])\s+|(?<=[。！？])|\n+")
_NEXT = re.compile(r"[\ue000-\ue0ff]\s+[A-Z0-9]")
_BRIDGE = re.compile(r"\b(?:reads?|says?|spells?|states?)\b([^\ue000-\ue0ff.]*)[\ue000-\ue0ff]", re.IGNORECASE)
_CAPITAL = re.compile(r"\b(?!I\b)[A-Z]\w*|[0-9]")

_POLITE = re.compile(
    r"(?:please )?(?:(?:let me know|tell me|feel free|don['’]t hesitate|just (?:ask|let me know)|happy to help"
    r"|i(?:['’]d| would) be happy to|i hope (?:this|that)|hope (?:this|that) helps|is there anything else"
    r"|would you like|do you (?:want|need) (?:me|any)|if you(?:['’]d| would| need| have| want| share))\b"
    r"|如(?:果|有|需).{0,12}(?:请|可以|告诉)|请告诉我|希望(?:这|对)|还有(?:其他|什么))[^\n]*$",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"\n\s*(?:#{1,6}\s*)?\**(?:explanation|reasoning|reason|rationale|analysis|evidence|justification|解释|理由|分析|说明)\**"
    r"\s*[:：]?\**(?:\s|$)",
    re.IGNORECASE,
)
_TEXT_WORDS = r"(?:text|wording|inscription|transcription|transcript|ocr|words?|writing|文字|内容)"
_TEXT_LABEL = re.compile(
    rf"(?:(?:the|visible|detected|extracted|recogni[sz]ed|displayed|on-?screen|printed|written|sign|exact|full|main|final)"
    rf"(?:['’]s)?\s+)*{_TEXT_WORDS}(?:\s+(?:result|output|content|shown|visible|displayed))?"
    r"(?:\s+(?:on|in|of|from|at|above|over)\s+[\w\s'’-]{1,60})?",
    re.IGNORECASE,
)
_THING_LABEL = re.compile(rf"(?:[\w'’-]+\s+){{0,4}}?{THING}(?:\s+(?:on|in|of|at)\s+[\w\s'’-]{{1,60}})?", re.IGNORECASE)
_LABELED = re.compile(
    r"(?P<bold>\*\*)?(?P<label>[^\n:：*\ue000-\ue0ff]{2,80}?)(?:\*\*)?\s*(?:：|:(?![0-9/]))(?:\*\*)?\s*(?P<value>\S[^\n]*)"
)
_HEADING = re.compile(
    r"(?:#{1,6}\s+\**|\*\*)(?P<label>[^\n*]{2,80}?)[:：]?(?:\*\*)?[:：]?\s*\n\s*(?P<value>\S.*)", re.DOTALL
)


class Reading(NamedTuple):
    """A text that was read in a picture, and the parts of the response before and after it.

    quoted: the text was in quotation marks, so it does not contain a sentence about itself.
    """

    before: str
    text: str
    after: str
    quoted: bool = False


def split_ending(text: str) -> tuple[str, str, bool]:
    """Return the text without final polite sentences and explanation, the explanation, and whether either was cut."""
    cut = False
    while True:
        sentences = [0, *(stop.end() for stop in _STOP.finditer(text))]
        last = next((start for start in reversed(sentences) if text[start:].strip()), 0)
        if not last or not _POLITE.match(text[last:].strip()):
            break
        text, cut = text[:last].rstrip(), True
    if match := _EXPLANATION.search(text):
        return text[: match.start()].rstrip(), text[match.end() :].strip(), True
    return text, "", cut


def quoted_reading(text: str, *, stated: bool = False) -> Reading | None:
    """Return the only text that a response quotes in sentences about a text; None if there is no such quotation.

    Args:
        text: the response, or the part of it that may contain the quotation.
        stated: the text follows "The answer is".
    Returns:
        The reading, or None.
    Raises:
        Unreadable: the response quotes several texts, or doubts, denies or retracts the quotation.
    """
    body, explanation, _ = split_ending(text)
    masked, quotations = _masked(body)
    if not quotations:
        return None
    sentences = [sentence.strip() for sentence in _STOP.split(masked) if sentence.strip()]
    telling = [index for index, sentence in enumerate(sentences) if _tells(sentence, first=stated and not index)]
    spoken = [sentence for sentence in sentences if _MASK.search(sentence) and _PERSON.search(sentence)]
    if not telling and not spoken:
        if any(_HEDGED.search(sentence) or is_doubted(sentence) for sentence in sentences if _MASK.search(sentence)):
            raise Unreadable("two_answers")
        if any(_THING_NAMED.search(_MASK.sub(" ", sentence)) for sentence in sentences if _MASK.search(sentence)):
            raise Unreadable("no_answer")
        return None
    if not telling:
        raise Unreadable("no_answer")
    kept = [_CONTRAST.sub(r"\g<kept>", sentence) for sentence in sentences]
    texts = {_folded(quotations[ord(mark) - 0xE000]) for mark in _MASK.findall(" ".join(kept))}
    if len(texts) > 1:
        raise Unreadable("two_answers")
    for index in telling:
        _check_telling(kept[index])
    _check_others(kept[: telling[0]], kept[telling[-1] + 1 :], explanation)
    mark = _MASK.search(" ".join(kept))[0]
    # A stray quotation mark means that the response was cut inside a quotation.
    if _STRAY.search(masked):
        raise Unreadable("no_answer")
    reading = unquoted(quotations[ord(mark) - 0xE000]).rstrip(",，;")
    lead = " ".join(sentences[: telling[0]])
    return Reading("" if _MASK.search(lead) else lead, reading, explanation, quoted=True)


def _masked(text: str) -> tuple[str, list[str]]:
    """Return the text with a private-use character in place of each quotation, and the quotations."""
    quotations: list[str] = []

    def mask(match: re.Match[str]) -> str:
        inside = match[match.lastindex]
        # "**Text:** EXIT" and "The **red sign** reads": a label or a thing is emphasized, not a quotation.
        if match[0].startswith("*") and (
            inside.rstrip().endswith((":", "："))
            or re.match(r"\s*[:：]", match.string[match.end() :])
            or (re.search(rf"\b{THING}$", inside) and not re.search(r"[A-Z0-9]", inside))
        ):
            return inside
        if len(quotations) >= MOST_QUOTATIONS:
            raise Unreadable("two_answers")
        quotations.append(inside)
        mark = chr(0xE000 + len(quotations) - 1)
        # "It says 'Stop.' The sign is red.": the period inside the quotation ends the sentence.
        goes_on = re.match(r"\s+[A-Z]", match.string[match.end() :][:20])
        return f"{mark}." if inside.rstrip()[-1:] in (".", "!", "?") and goes_on else mark

    # Private-use characters in the text, such as icons, would look like masks.
    return _QUOTATION.sub(mask, _MASK.sub(" ", text)), quotations


def _folded(text: str) -> str:
    return " ".join(unquoted(text).casefold().rstrip(".,，。;!").split())


def _tells(sentence: str, *, first: bool) -> bool:
    """Return whether a sentence is about a text that it quotes, or consists of the quotation.

    first: the sentence directly follows "The answer is".
    """
    if not _MASK.search(sentence) or _PERSON.search(sentence):
        return False
    plain = _CONTRAST.sub("", sentence)
    if not _MASK.sub("", plain).strip(" \n.,;:!?。，()*>#-"):
        return True
    if first and re.match(r"\W*[\ue000-\ue0ff](?:\s*[^\w\s]|\s+[a-z]|\s*$)", sentence):
        return True
    return bool(_SPEAKS.search(_MASK.sub(" ", plain)) or _speaks_before(plain) or _FOREIGN.search(plain))


def _speaks_before(sentence: str) -> bool:
    """Return whether a label such as "Sign:" directly precedes the quotation."""
    before = _MASK.split(sentence)[0]
    return bool(_SPEAKS.search(before)) if before.rstrip().endswith((":", "：")) else False


def _check_telling(sentence: str) -> None:
    words = _MASK.sub(" ", sentence)
    if is_doubted(words) or _HEDGED.search(words):
        raise Unreadable("two_answers")
    # The quotation may be only part of the text: "The sign reads Welcome to "Joe's" Diner".
    bridge = _BRIDGE.search(sentence)
    if _NEXT.search(sentence) or (bridge and _CAPITAL.search(bridge[1])):
        raise Unreadable("two_answers")
    if is_denied(words) or _DENIED.search(words) or is_unknowing(words) or _BLURRED.search(words):
        raise Unreadable("no_answer")


def _check_others(before: list[str], after: list[str], explanation: str) -> None:
    """Raise Unreadable if sentences around the quotation make the text uncertain, or give another text."""
    for sentence in (*before, *after, explanation):
        words = _MASK.sub(" ", sentence)
        if is_unknowing(words) or _BLURRED.search(words):
            raise Unreadable("no_answer")
    for sentence in (*before, *after):
        announces = sentence.endswith((":", "："))
        if _SAYS_UNQUOTED.search(sentence) and not announces and not _MASK.search(sentence):
            raise Unreadable("two_answers")
    if any(is_retracted(text) for text in (*after, explanation)) or any(is_doubted(text) for text in after):
        raise Unreadable("two_answers")


def block_reading(text: str) -> Reading | None:
    """Return the block after "it reads:", or under a heading such as "### Text in the video"; None for other texts.

    Raises:
        Unreadable: the block has several paragraphs, or is a list of texts.
    """
    body, explanation, _ = split_ending(text)
    if heading := _HEADING.fullmatch(body):
        if _TEXT_LABEL.fullmatch(heading["label"].strip()):
            return Reading("", block_text(heading["value"]), explanation)
        return None
    announcing = next((end for end in re.finditer(r":[*]*[ \t]*\n", body)), None)
    lead, block = (body[: announcing.start()], body[announcing.end() :]) if announcing else ("", "")
    if not announcing or not block.strip():
        return None
    marked = block.lstrip().startswith((">", "```", "- ", "* ", "• "))
    if "\n\n" in block.strip() or ("\n" in block.strip() and not marked) or not (marked or block.startswith("\n")):
        return None
    if is_unknowing(lead) or _BLURRED.search(lead) or is_retracted(explanation) or is_unknowing(explanation):
        raise Unreadable("no_answer")
    return Reading(lead, block_text(block), explanation)


def block_text(text: str) -> str:
    """Return the text of a paragraph without the marks of a block quotation or a list item.

    Raises:
        Unreadable: there are several paragraphs, or a list of texts.
    """
    text = text.strip()
    if "\n\n" in text and not text.startswith("```"):
        raise Unreadable("no_answer")
    lines = text.split("\n")
    if all(line.lstrip().startswith(">") for line in lines):
        return "\n".join(line.lstrip()[1:].strip() for line in lines)
    items = [re.match(r"\s*(?:[-*•]|[0-9]{1,2}\.)\s+", line) for line in lines]
    if len(lines) > 1 and all(items):
        raise Unreadable("two_answers")
    return text[items[0].end() :] if len(lines) == 1 and items[0] and lines[0].lstrip()[0] in "-*•" else text


def labeled_reading(text: str) -> Reading | None:
    """Return the text after "Text on the sign:" in a single line; None for other texts.

    Raises:
        Unreadable: a label such as "Serial number:" may itself be part of the text.
    """
    body, explanation, _ = split_ending(text)
    labeled = _LABELED.fullmatch(body.strip())
    if not labeled:
        return None
    label = labeled["label"].strip()
    if _TEXT_LABEL.fullmatch(label) or (labeled["bold"] and _THING_LABEL.fullmatch(label)):
        return Reading("", labeled["value"], explanation)
    if _THING_LABEL.fullmatch(label) and not label.isupper():
        raise Unreadable("no_answer")
    return None


def speaks_of_a_text(text: str) -> bool:
    """Return whether a text without quotations begins like a sentence about a text in a picture."""
    return bool(
        re.match(
            rf"(?:(?:on|in|at|above|below)\s+)?(?:the|this|that|its|a|an|it|there|here)\b[^.:]{{0,120}}\b{THING}\b[^.]{{0,80}}"
            rf"\b(?:is|are|{_WRITES})\b|it (?:says|reads|shows|displays|spells)\b",
            text[:400],
            re.IGNORECASE,
        )
        and not text.isupper()
    )


def last_sentence(text: str) -> tuple[str, str] | None:
    """Return the text before the last sentence, and that sentence, if it is about a text; otherwise None.

    Raises:
        Unreadable: an earlier sentence makes the text uncertain, or gives another text.
    """
    sentences = [sentence.strip() for sentence in _STOP.split(text) if sentence.strip()]
    if len(sentences) < 2 or "\n" in text or not speaks_of_a_text(sentences[-1]):
        return None
    *before, last = sentences
    _check_others(before, [], "")
    return " ".join(before), last
