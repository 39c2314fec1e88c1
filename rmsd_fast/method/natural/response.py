"""Find the answer in a whole response.

The search tries, in this order: an `<answer>` block in any spelling, `\\boxed{}`, a sentence such as "The answer is
B.", and a text after the reasoning (or without reasoning) that consists of an answer. If another part of the response
outside the reasoning gives another answer, the response is unreadable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..answers import answer_body, has_outer_format, parse_answer
from ..finish_reasons import finish_reason_of
from .body import canonical_body, is_legible, said_text
from .doubts import is_absent, is_denied, is_doubted, is_retracted, is_unknowing
from .options import is_whole_letter, names_another, quotes_another
from .readings import (
    Reading,
    block_reading,
    block_text,
    labeled_reading,
    last_sentence,
    quoted_reading,
    speaks_of_a_text,
    split_ending,
)
from .reasons import Unreadable, the_only
from .refusals import is_refusal
from .sentences import (
    check_lead,
    concluded,
    heading,
    is_taken_back,
    read_or_reason,
    sentences_in,
    short,
    standing_alone,
    statements,
    takes_back,
    text_statement,
)
from .tags import has_tags, one_spelling, split_reasoning, without_answer_marks, without_region_marks, without_tags
from .text import REASONING_KEYS, find_json, strip_outside, visible, without_courtesy

Options = Sequence[str] | None
# A longer text without an answer block is not an answer to a closed question.
MOST_CHARACTERS = 20_000
# A text without reasoning that is at most this long may give its only answer in any sentence.
MOST_WORDS = 60
_LIST_MARK = re.compile(r"^\s*[-*•]\s+(?=[A-Za-z*])", re.MULTILINE)
_NOT_WHOLE = {"length": "truncated", "content_filter": "filtered"}
# A placeholder from the prompt, or a repeated question.
_NO_ANSWER = re.compile(
    r"\[?(?:your |the )?answer(?: here)?\]?|(?:the )?text(?: read)?|\.{3}|…"
    r"|the (?:question|user|task) (?:asks|wants|is asking)\b.*|null|n/a|(?:图中|图片中|视频中|画面中)?(?:没有"
    r"|无)(?:看到|发现|出现)?(?:可见|清晰)?的?文字[。.]?|(?:unreadable|illegible|not (?:readable|legible|visible))\.?"
    r"|(?:there is )?no (?:(?:visible|readable|legible) )?text(?: (?:is )?(?:visible|present|shown|found"
    r"|detected))?\.?",
    re.IGNORECASE | re.DOTALL,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CLAUSE_START = re.compile(r"[;；]|\b(?:so|therefore|thus|hence)\b|[所因]以?此?", re.IGNORECASE)
# Words of a line that describes a picture instead of quoting its text.
_TALK = re.compile(
    r"\b(?:is|are|appears?|seems?|cannot|can't|unclear|legible|visible|frames?|video|picture|image)\b|画面|视频",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"\s*(?:#{1,6}\s*)?\**(?:explanation|reasoning|reason|rationale|analysis|解释|理由|分析)\**\s*[:：]\**\s*",
    re.IGNORECASE,
)
_ANSWER_KEYS = ("answer", "final_answer", "correct_answer", "choice", "option")


def canonical_response(
    text: str, task_type: str, *, options: Options = None, finish_reason: str | None = None
) -> str | None:
    """Return the response as `<think>…</think><answer>…</answer>` whose answer parses, or None if no answer is clear.

    A response that already has this form is returned unchanged, unless its answer has a simpler spelling.

    Args:
        text: the whole response.
        task_type: one of TASK_TYPES.
        options: choices of an `mcq` question in order, bare or labeled; None = the options are in the question's text.
        finish_reason: finish reason of any server (see `method.finish_reasons`). A response that was truncated, or
            stopped by an error or a filter, is invalid. None = unknown.
    Returns:
        The canonical response, or None.
    Raises:
        ValueError: the task type is unknown, or the number of options is outside 1..26.
    """
    try:
        return read_response(text, task_type, options, finish_reason)
    except Unreadable:
        return None


def invalid_reason(
    text: str, task_type: str, *, options: Options = None, finish_reason: str | None = None
) -> str | None:
    """Return why `canonical_response` returns None, as a key of REASONS; None if it returns a text."""
    try:
        read_response(text, task_type, options, finish_reason)
    except Unreadable as error:
        return error.reason
    return None


def read_response(text: str, task: str, options: Options, finish_reason: str | None) -> str:
    """Return the canonical response. Raise Unreadable with the reason if there is none."""
    finish_reason = finish_reason_of(finish_reason)
    if finish_reason in _NOT_WHOLE:
        raise Unreadable(_NOT_WHOLE[finish_reason])
    if not text.strip():
        raise Unreadable("empty")
    ordered = has_outer_format(text)
    if ordered and task in ("open", "ocr"):
        return _text_in_order(text, task)
    reasoning, final = split_reasoning(text if ordered else one_spelling(text))
    final = final if ordered else without_courtesy(final)
    if has_tags(final):
        before, answer, after = _tagged(final, task, options, finish_reason)
    elif len(final) > MOST_CHARACTERS and task != "open":
        raise Unreadable("no_answer")
    else:
        before, answer, after = _untagged(final, task, options, reasoned=reasoning is not None)
    # A response in canonical form keeps its text, including line breaks.
    if ordered and answer_body(text).strip() == answer:
        result = without_region_marks(text)
    else:
        result = f"<think>{_reasoning(reasoning, before, after)}</think><answer>{answer}</answer>"
    if parse_answer(result, task, options) is None:
        raise Unreadable("no_answer")
    return result


def _text_in_order(text: str, task: str) -> str:
    """Return a canonical response whose answer is a text, without tokens that mark boxes and regions."""
    body = without_answer_marks(answer_body(text)).strip()
    if is_refusal(body, task=task, inside_answer=True):
        raise Unreadable("refusal")
    if _NO_ANSWER.fullmatch(body):
        raise Unreadable("no_answer")
    answer = canonical_body(body, task, as_sent=True)
    text = without_region_marks(text)
    return text if answer == answer_body(text).strip() else text.replace(answer_body(text), answer)


def _reasoning(tagged: str | None, before: str, after: str) -> str:
    """Return the first of these that is not empty: tagged reasoning, text before the answer, explanation after it."""
    for text in (tagged or "", before, after):
        if clean := without_tags(text):
            return clean[match.end() :] if (match := _EXPLANATION.match(clean)) else clean
    return ""


def _tagged(final: str, task: str, options: Options, finish_reason: str | None) -> tuple[str, str, str]:
    """Return the text before the first answer block, the only answer of all blocks, and the text after the last one."""
    lead, opened, rest = final.partition("<answer>")
    if not opened:
        body, _, after = final.partition("</answer>")
        return "", _body(body, task, options), after
    inside, closed, after = rest.rpartition("</answer>")
    if not closed or "<answer>" in after:
        # A truncated "12" might be part of "125", and "red" of "red and blue". Only a letter is certainly complete.
        if finish_reason != "stop" and not (task == "mcq" and is_whole_letter(rest, options)):
            raise Unreadable("unfinished")
        inside, after = rest, ""
    blocks = [block for block in re.split(r"</?answer>", inside) if block.strip()]
    if not blocks:
        raise Unreadable("no_answer")
    answer = the_only([_body(block, task, options) for block in blocks])
    if task in ("open", "ocr"):
        contradicted = takes_back(after)
    else:
        check_lead(lead, task, options)
        _check_beside(lead, answer, after, task, options)
        others = [statement.answer for text in (lead, after) for statement in statements(text, task, options)]
        others += [read_or_reason(box, task, options)[0] for text in (lead, after) for box in _BOXED.findall(text)]
        contradicted = bool(set(others) - {answer, None}) or is_taken_back(after, answer, task, options)
    if contradicted:
        raise Unreadable("two_answers")
    return lead, answer, after


# The parts of a sentence before and after an answer block: "at least <answer>3</answer> million".
_BEGINS = re.compile(r"[^\n.!?:。！？：]*\Z")
_GOES_ON = re.compile(r"(?! *\n)(?: ?[(（]?[a-z%+*/^°~-]|[百千万亿个倍秒分帧])[^\n.!?。！？]*")


def _check_beside(lead: str, answer: str, after: str, task: str, options: Options) -> None:
    """Raise Unreadable if other words of the same sentence change the answer of a block, or deny it."""
    before, behind = _BEGINS.search(lead[-200:])[0], _GOES_ON.match(after[:200])
    # "It is not tea, so <answer>B</answer>": only the clause of the block counts.
    before = re.split(r"[,，]\s", _CLAUSE_START.split(before)[-1])[-1]
    before = "" if before.strip() in ("", "-", "*", "**", "•", ">") and before[-1:] != "-" else before
    rest = behind[0] if behind else ""
    if not (before.strip() or rest.strip()):
        return
    words = f"{before} {rest}"
    if len(words.split()) > 6:
        changed = is_denied(words) or is_doubted(words)
    else:
        changed = read_or_reason(f"{before}{answer}{rest}", task, options)[0] != answer
    if changed:
        raise Unreadable("two_answers")


def _untagged(final: str, task: str, options: Options, *, reasoned: bool) -> tuple[str, str, str]:
    """Return the parts of a text without answer tags: the text before the answer, the answer, and the text after it.

    reasoned: the reasoning was in tags and is not part of the text.
    """
    whole = strip_outside(final)
    if (split := find_json(whole)) and (read := _in_json(split, task, options)):
        return read
    if task in ("open", "ocr"):
        return _untagged_text(whole, task, options, reasoned=reasoned)
    if read := _boxed(whole, task, options) or _stated(whole, task, options):
        check_lead(read[0], task, options)
        if task == "mcq" and _opening_letter(whole, options) not in (None, read[1]):
            raise Unreadable("two_answers")
        return read
    if is_refusal(whole, task=task, inside_answer=False):
        raise Unreadable("refusal")
    if headed := heading(whole):
        return headed[0], _body(headed[1], task, options), ""
    read = _standing_alone(whole, task, options, reasoned=reasoned)
    check_lead(read[0], task, options)
    return read


def _opening_letter(text: str, options: Options) -> str | None:
    """Return the option with which a response begins, before an explanation: "B. milk" and a reason."""
    first = sentences_in(text, "mcq", options)[0]
    try:
        alone = standing_alone(text, "mcq", options)
    except Unreadable:
        return None
    # A longer sentence may describe an option without choosing it.
    return alone[0][1] if alone and alone[0][0] == first and len(first.text.split()) <= 4 else None


def _in_json(split: tuple[str, object, str], task: str, options: Options) -> tuple[str, str, str] | None:
    """Return the answer of a text that `find_json` has split, or None where its JSON does not answer this task."""
    before, value, after = split
    record = value[0] if isinstance(value, list) and len(value) == 1 else value
    names = record if isinstance(record, dict) else {}
    answers = [names[key] for key in _ANSWER_KEYS if key in names]
    before = next((names[key] for key in REASONING_KEYS if isinstance(names.get(key), str)), before)
    if answers and task in ("open", "ocr"):
        texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
        answer = the_only([_body(text, task, options) for text in texts])
    elif answers or task not in ("open", "mcq"):
        answer = _body(json.dumps(value, ensure_ascii=False), task, options)
    else:
        return None
    if task != "open" and after and (_stated(after, task, options) or is_taken_back(after, answer, task, options)):
        raise Unreadable("two_answers")
    return before, answer, after


# "EXIT. Or maybe EXIST.", and a note in a separate paragraph.
_ANOTHER_TEXT = re.compile(r"[.!?\n]\s*(?:or|or maybe|maybe|perhaps|possibly|alternatively)\b|或者", re.IGNORECASE)
# "Hard to see, perhaps EXIT" in Chinese.
_UNSURE_TEXT = re.compile(r"(?:看不(?:太)?清楚?)?[，,]?\s*(?:可能|好像|似乎|大概|应该)是|看不(?:太)?清楚?[，,]")
_NOTE = re.compile(r"\n\s*\n\s*(?:note|please note|the text|this|however|but)\b", re.IGNORECASE)


def _untagged_text(text: str, task: str, options: Options, *, reasoned: bool) -> tuple[str, str, str]:
    if is_refusal(text, task=task, inside_answer=False):
        raise Unreadable("refusal")
    if task == "ocr":
        return _untagged_reading(text, reasoned=reasoned)
    if stated := text_statement(text) or heading(text):
        return stated[0], _body(stated[1], task, options), ""
    return "", _body(text, task, options), ""


def _untagged_reading(text: str, *, reasoned: bool) -> tuple[str, str, str]:
    """Return the same as `_untagged` for a text that was read in a picture."""
    if read := _boxed_text(text):
        return read
    if stated := text_statement(text) or heading(text):
        before, read = stated[0], _stated_reading(stated[1])
        return before, _reading_body(read), read.after
    if read := block_reading(text) or quoted_reading(text) or labeled_reading(text):
        return read.before, _reading_body(read), read.after
    text, explanation, cut = split_ending(text)
    _check_one_text(text)
    if cut and ("\n" in text or _TALK.search(text)) and said_text(text) is None:
        raise Unreadable("no_answer")
    if _UNSURE_TEXT.match(text):
        raise Unreadable("two_answers")
    if (told := last_sentence(text)) and (said := said_text(told[1])):
        return told[0], said, explanation
    if said_text(text) is None and (speaks_of_a_text(text) or (not reasoned and ("\n" in text or _TALK.search(text)))):
        raise Unreadable("no_answer")
    return "", _body(text, "ocr", None), explanation


def _reading_body(read: Reading) -> str:
    if not read.quoted:
        return _body(read.text, "ocr", None)
    if not read.text or _NO_ANSWER.fullmatch(read.text) or not is_legible(read.text):
        raise Unreadable("no_answer")
    return read.text


def _stated_reading(text: str) -> Reading:
    """Return the text after "The answer is", without its explanation."""
    if read := quoted_reading(text, stated=True):
        return read
    text, explanation, _ = split_ending(text)
    _check_one_text(text)
    first, _, rest = text.strip().partition("\n\n")
    if _TALK.search(rest) or re.match(r"\s*not\s", first):
        raise Unreadable("no_answer")
    return Reading("", text if rest else block_text(text), explanation)


def _boxed_text(text: str) -> tuple[str, str, str] | None:
    """Return the content of a text's only `\\boxed{}` as a text that was read in a picture, or None."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    first, last = boxes[0], boxes[-1]
    before, after = text[: first.start()], text[last.end() :]
    sentence = re.split(r"[.!?\n]", before.rstrip("$ \n"))[-1]
    if takes_back(after.lstrip("$ .\n")) or is_retracted(after) or is_doubted(sentence) or is_denied(sentence):
        raise Unreadable("two_answers")
    return before, the_only([_body(box[0], "ocr", None) for box in boxes]), after


def _check_one_text(text: str) -> None:
    """Raise Unreadable if remarks or a second reading follow a text that was read in a picture."""
    if _ANOTHER_TEXT.search(text):
        raise Unreadable("two_answers")
    if _NOTE.search(text):
        raise Unreadable("no_answer")


def _boxed(text: str, task: str, options: Options) -> tuple[str, str, str] | None:
    """Return the answer of sentences with a `\\boxed{}`; each sentence is read with the content in place of the box."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    around = _BOXED.sub(" ", text)
    plain_text, spans, end = "", [], 0
    for box in boxes:
        plain_text += text[end : box.start()]
        content = box[1].strip()
        spans.append((len(plain_text), len(plain_text) + len(content)))
        plain_text, end = plain_text + content, box.end()
    plain_text += text[end:]
    sentences = sentences_in(plain_text, task, options)
    answers, first, last = [], len(plain_text), 0
    for start, end in spans:
        covering = [sentence for sentence in sentences if sentence.start < max(end, start + 1) and sentence.end > start]
        if not covering:
            raise Unreadable("no_answer")
        first, last = min(first, covering[0].start), max(last, covering[-1].end)
        answers.append(_in_its_sentence(plain_text, (covering[0].start, start, end, covering[-1].end), task, options))
    answer = the_only(answers)
    if is_taken_back(plain_text[last:], answer, task, options):
        raise Unreadable("two_answers")
    if {statement.answer for statement in statements(around, task, options)} - {answer, None}:
        raise Unreadable("two_answers")
    return plain_text[:first], answer, plain_text[last:]


def _in_its_sentence(text: str, bounds: tuple[int, int, int, int], task: str, options: Options) -> str:
    """Return the answer of a box, read in its clause.

    bounds: start of the sentence, start and end of the box, end of the sentence.
    """
    first, start, end, last = bounds
    before, content, after = text[first:start], text[start:end], text[end:last]
    answer = canonical_body(content, task, options)
    if not (before + after).strip(" $*\\()[].。\n"):
        return answer
    if is_unknowing(before) or after.rstrip(" $*").endswith("?"):
        raise Unreadable("no_answer")
    # "It is not brown, so \\boxed{B}": only the clause of the box counts.
    lead = _CLAUSE_START.split(before)[-1]
    aside, _, clause = lead.rpartition(", ")
    if task == "mcq" or not (re.search("[0-9]", aside) or is_denied(aside) or is_absent(aside)):
        lead = clause
    around = f"{lead} {after}"
    if is_denied(around) or is_doubted(around) or is_absent(around):
        raise Unreadable("two_answers")
    if task == "mcq":
        if names_another(lead, answer, options) or quotes_another(after, answer, options) or is_retracted(after):
            raise Unreadable("two_answers")
        return answer
    return canonical_body(f"{lead}{content}{after}", task, options)


def _stated(text: str, task: str, options: Options) -> tuple[str, str, str] | None:
    """Return the answer of the sentences that state one, with the text before and after; None without a statement."""
    stated = statements(text, task, options)
    if any(statement.reason in ("two_answers", "a_range") for statement in stated):
        raise Unreadable("two_answers")
    answers = [statement.answer for statement in stated if statement.answer is not None]
    if not answers:
        return None
    last = stated[-1]
    # The last statement decides. If it cannot be read or is retracted, the answer is not clear.
    if last.answer is None or is_taken_back(text[last.end :], last.answer, task, options):
        raise Unreadable("two_answers")
    return text[: last.start], the_only(answers), text[last.end :]


def _standing_alone(final: str, task: str, options: Options, *, reasoned: bool) -> tuple[str, str, str]:
    """Return an answer that is the whole text, or a separate sentence at its end or beginning."""
    sentences = sentences_in(final, task, options)
    if len(sentences) > 1:
        alone = standing_alone(final, task, options)
        ends = [(sentence, answer) for sentence, answer in alone if sentence in (sentences[0], sentences[-1])]
        if ends:
            sentence, answer = ends[-1]
            # At the beginning of a text, "No." does not retract anything.
            if (sentence.start > 0 and takes_back(sentence.text)) or is_taken_back(
                final[sentence.end :], answer, task, options
            ):
                raise Unreadable("two_answers")
            return final[: sentence.start], the_only([answer, *(answer for _, answer in alone)]), final[sentence.end :]
        joined = " ".join(_LIST_MARK.sub("", final).split())
        if task in ("temporal", "spatial") and (answer := short(joined, task, options)):
            # "Start: 3 s" and "End: 5 s" on separate lines.
            return "", answer, ""
        before, _, paragraph = final.strip().rpartition("\n\n")
        if before and not takes_back(paragraph) and (answer := short(" ".join(paragraph.split()), task, options)):
            return before, answer, ""
        last = sentences[-1]
        if answer := concluded(last.text, task, options):
            return final[: last.start], answer, ""
        if not reasoned:
            if len(final.split()) > MOST_WORDS:
                raise Unreadable("no_answer")
            answer, reason = read_or_reason(final, task, options)
            if answer is None:
                raise Unreadable(reason if reason in ("two_answers", "a_range") else "no_answer")
            return "", answer, ""
    elif answer := short(final, task, options) or concluded(final, task, options):
        return "", answer, ""
    return "", _body(final, task, options), ""


def _body(text: str, task: str, options: Options) -> str:
    """Return the canonical form of a text that is known to be the answer."""
    text = visible(without_answer_marks(text)).strip()
    if task in ("open", "ocr"):
        answer, reason = read_or_reason(text, task, options)
    elif boxed := _boxed(text, task, options):
        return boxed[1]
    else:
        answer, reason = read_or_reason(text, task, options)
    if (answer is None or task in ("open", "ocr")) and is_refusal(text, task=task, inside_answer=True):
        raise Unreadable("refusal")
    if answer is None:
        raise Unreadable(reason)
    if task in ("open", "ocr") and _NO_ANSWER.fullmatch(text):
        raise Unreadable("no_answer")
    return answer
