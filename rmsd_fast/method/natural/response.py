"""The answer of a whole response.

Looked for are, in this order: an `<answer>` block, also in other spellings; `\\boxed{}`; a sentence such as "The
answer is B."; a text that stands by itself behind the reasoning, or instead of it, and is an answer as a whole.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from ..answers import answer_body, has_outer_format, parse_answer
from .body import canonical_body, is_text_read
from .options import comparable, comparable_options, is_whole_option
from .reasons import Unreadable, the_only
from .text import json_object, strip_outside, visible

Options = Sequence[str] | None
# A longer text behind the reasoning is no answer to a closed question; searching it could take quadratic time.
MOST_CHARACTERS = 20_000

_THINK = r"(?:think|thinking|thoughts?|reasoning|reason|analysis|scratchpad|seed:think)"
_ANSWER = r"(?:answer|final[ _-]?answer|ans|solution|output|result)"
# Spellings of the four tags.
_TAGS = [
    (re.compile(rf"[<\[◁]\s*{_THINK}\s*[>\]▷]", re.IGNORECASE), "<think>"),
    (re.compile(rf"[<\[◁]\s*/\s*{_THINK}\s*[>\]▷]", re.IGNORECASE), "</think>"),
    (re.compile(rf"<\s*{_ANSWER}\s*>|\[\s*answer\s*\]|<\|begin_of_box\|>", re.IGNORECASE), "<answer>"),
    (re.compile(rf"<\s*/\s*{_ANSWER}\s*>|\[\s*/\s*answer\s*\]|<\|end_of_box\|>", re.IGNORECASE), "</answer>"),
]
# Qwen's marks of boxes in the reasoning are special tokens of the student too; what stands between them stays.
_REGION_MARKS = re.compile(r"<\|(?:box|quad|object_ref)_(?:start|end)\|>")
# GLM's marks of an answer, where they stand inside an answer block.
_BOX_MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>")
_ANY_TAG = re.compile(r"</?(?:think|answer)>")
# What servers leave at the end of a text.
_END_TOKENS = re.compile(r"(?:\s*(?:<\|(?:im_end|endoftext|eot_id|end|end_of_text)\|>|</s>|<eos>|<end_of_turn>))+\s*$")
_REFUSAL = re.compile(
    r"(?:i['’]?m|i am)\s+(?:very |so |really )?(?:sorry|afraid|unable|not able)"
    r"|(?:sorry|apologies|unfortunately)\b[^.]{0,40}\b(?:can(?:no|['’]?)t|unable|not able)"
    r"|i\s+(?:can(?:no|['’]?)t|can not|could(?:n['’]?t| not)|do(?:n['’]?t| not) have)\s+"
    r"(?:the ability |access |directly )*(?:to )?"
    r"(?:see|view|watch|access|assist|help|answer|process|analy[sz]e|open|play|provide|determine)"
    r"|(?:i (?:do(?:n['’]?t| not) (?:see|have)|can(?:no|['’]?)t see|see no)|there (?:is no|isn['’]?t any?)|no)"
    r"\s+(?:any |an? |the )?(?:video|image|picture|clip|frame|attachment|file)s?\b[^.!?]{0,40}"
    r"\b(?:attached|provided|included|uploaded|shared|here|in (?:your|this|our) (?:message|chat|conversation))"
    r"|(?:please|could you|can you) (?:upload|share|provide|attach|send)\b"
    r"|as an? (?:ai|language model)|(?:很|非常)?(?:抱歉|对不起)"
    r"|我(?:无法|不能|没有办法|看不到|没有看到)|(?:未|没有)(?:提供|看到|收到)(?:任何)?(?:视频|图片)"
    r"|申し訳|lo siento|es tut mir leid|ich (?:sehe|habe) (?:leider )?kein|je ne vois pas|no veo ning",
    re.IGNORECASE,
)
# A placeholder of the prompt, or the question once more.
_NO_ANSWER = re.compile(
    r"(?:your |the )?answer(?: here)?|text(?: read)?|\.{3}|…|the (?:question|user|task) (?:asks|wants|is asking)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_STATEMENT = re.compile(
    r"(?:\b(?:the|my|our)\s+)?(?:\b(?:final|correct|best|right|most\s+likely|overall)\s+)*\b(?:answer|choice|option|ans)\b"
    r"(?:\s+(?:here|to (?:the|this) question))?"
    r"(?:\**\s*(?:is|would be|should be|must be|will be|=)(?!\w)\**\s*(?:[:：]\**)?|\**\s*[:：=]\**)\s*"
    r"|\bI(?:['’]d|['’]ll| would| will)?\s+(?:go with|choose|pick|select|opt for)\s+"
    r"|\b(?:respuesta|antwort|lösung|réponse)(?:\s+(?:correcta|final|correcte))?(?:\s+(?:es|ist|lautet|est)\b|\s*:)\s*"
    r"(?:(?:la|el|die|der|das|opción|option)\s+)*"
    r"|[【\[]\s*(?:最终)?答案\s*[】\]]\s*[:：]?\s*"
    r"|(?:最终|正确|最佳|所以|因此|最後の|正解の)?(?:的)?(?:答案|选项|答え|正解|回答)(?:应该|应当)?"
    r"(?:是|为|選|选|：|:|は)+(?!不)\s*[:：]?\s*"
    r"|(?<![不别非])(?:故|应|所以|因此|我)?(?<![不别非])(?:选择|选)(?=\s*[(（]?[A-ZＡ-Ｚ])\s*",
    re.IGNORECASE,
)
_HEADED = re.compile(
    r"^[ \t]*(?:#{1,6}\s*|\*\*)?(?:final\s+)?(?:answer|答案|最终答案|解答)\s*[:：]?\s*(?:\*\*)?[ \t]*\n+",
    re.IGNORECASE | re.MULTILINE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CONCLUSION = re.compile(
    r"(?:(?:so|therefore|thus|hence|in total|overall|altogether|in conclusion|in summary|consequently)\b"
    r"|总共|一共|因此|所以|综上|总之|よって|したがって)[,，、\s]*"
    r"|(?=there (?:is|are)\b[^.]*\b(?:in total|altogether|overall)\b)",
    re.IGNORECASE,
)
# Words that take an answer back; and those that do so in a sentence, but may only qualify it behind an answer block.
_TAKES_BACK = (
    r"\b(?:however|wait|actually|alternatively|on second thought|or (?:maybe|perhaps|possibly)|hmm|unless|not sure"
    r"|unsure|uncertain|(?:could|may|might) also|answer (?:could|may|might)|possible|ambiguous)\b"
    r"|然而|等等|或者|不对|可能|无法|不确定"
)
_TAKEN_BACK = re.compile(_TAKES_BACK, re.IGNORECASE)
_TURN = re.compile(_TAKES_BACK + r"|\b(?:but|although)\b|但|不过", re.IGNORECASE)
# A sentence ends at a line break, or at a stop with no decimal or abbreviation around it.
_SENTENCE_END = re.compile(r"\n|(?<=[^\s.])[.!?](?=\s|$|[\"”*])|[。！？]")
# A line that talks about a picture rather than repeats what it reads.
_TALK = re.compile(
    r"\b(?:i|it|is|are|was|the|there|appears?|seems?|not|cannot|can't|unclear|legible|visible|frames?)\b|我|画面|视频",
    re.IGNORECASE,
)
_ANSWER_KEYS = ("answer", "final_answer", "correct_answer", "choice", "option")
_REASONING_KEYS = ("think", "thinking", "thought", "reasoning", "reason", "analysis", "explanation", "rationale")


def canonical_response(
    text: str, task_type: str, *, options: Options = None, finish_reason: str | None = None
) -> str | None:
    """The response as `<think>…</think><answer>…</answer>` with an answer that parses, or None where it has none.

    A response that is in this form already comes back as it is, unless its answer has a simpler spelling.

    Args:
        text: the whole response.
        task_type: one of TASK_TYPES.
        options: choices of an `mcq` question in order, bare or labelled; None = letters stand in the question's text.
        finish_reason: what the server said: `length` and `content_filter` make a response invalid.
    Raises:
        ValueError: unknown task type, or a number of options outside 1..26.
    """
    try:
        return read_response(text, task_type, options, finish_reason)
    except Unreadable:
        return None


def invalid_reason(
    text: str, task_type: str, *, options: Options = None, finish_reason: str | None = None
) -> str | None:
    """Why `canonical_response` gives None, as a key of REASONS; None where it gives a text."""
    try:
        read_response(text, task_type, options, finish_reason)
    except Unreadable as error:
        return error.reason
    return None


def read_response(text: str, task: str, options: Options, finish_reason: str | None) -> str:
    """`canonical_response` and `invalid_reason` in one pass: raises Unreadable, with the reason, in place of None."""
    if finish_reason in ("length", "max_tokens"):
        raise Unreadable("truncated")
    if finish_reason in ("content_filter", "safety"):
        raise Unreadable("filtered")
    if not text.strip():
        raise Unreadable("empty")
    ordered = has_outer_format(text)
    reasoning, final = _split(text if ordered else _one_spelling(text))
    if len(final) > MOST_CHARACTERS and not (ordered and task == "open"):
        raise Unreadable("no_answer")
    if _ANY_TAG.search(final):
        lead, body = _tagged(final, task, options, finish_reason)
    else:
        lead, body = _untagged(final, task, options, reasoned=reasoning is not None)
    # What is in order already stays as it was written, line breaks and all.
    if ordered and answer_body(text).strip() == body:
        return _REGION_MARKS.sub("", text)
    think = _REGION_MARKS.sub("", _ANY_TAG.sub("", lead if reasoning is None else reasoning)).strip()
    result = f"<think>{think}</think><answer>{body}</answer>"
    if parse_answer(result, task, options) is None:
        raise Unreadable("no_answer")
    return result


def _one_spelling(text: str) -> str:
    """The text with every spelling of a tag as the tag itself, and without end tokens and unseen characters."""
    text = visible(_END_TOKENS.sub("", text))
    if "&lt;" in text and "<answer>" not in text:
        text = html.unescape(text)
    for spelling, tag in _TAGS:
        text = spelling.sub(tag, text)
    return text.strip()


def _split(text: str) -> tuple[str | None, str]:
    """Reasoning that tags set apart, None where there are no such tags, and the text that holds the answer."""
    reasoning, closed, final = text.rpartition("</think>")
    if closed and final.strip():
        return reasoning, final
    if closed:
        # Everything stands inside the reasoning, or the answer in front of it.
        before, opened, inside = reasoning.partition("<answer>")
        if not opened:
            raise Unreadable("no_answer")
        return before, opened + inside
    if "<think>" in text:
        reasoning, opened, final = text.partition("<think>")[2].partition("<answer>")
        if not opened:
            raise Unreadable("unfinished")
        return reasoning, opened + final
    return None, text


def _tagged(final: str, task: str, options: Options, finish_reason: str | None) -> tuple[str, str]:
    """What stands before the first answer block, and the one answer of all blocks."""
    lead, opened, rest = final.partition("<answer>")
    if not opened:
        return "", _body(final.partition("</answer>")[0], task, options)
    inside, closed, after = rest.rpartition("</answer>")
    if not closed or "<answer>" in after:
        # Nothing says that "12" was not to become "125"; the letter of an option is whole or not there.
        if finish_reason != "stop" and task != "mcq":
            raise Unreadable("unfinished")
        inside, after = rest, ""
    blocks = [block for block in re.split(r"</?answer>", inside) if block.strip()]
    if not blocks:
        raise Unreadable("no_answer")
    answer = the_only([_body(block, task, options) for block in blocks])
    stated = [
        _or_none(_sentence(after[match.end() :], task, options), task, options) for match in _STATEMENT.finditer(after)
    ]
    if _TAKEN_BACK.search(after) or set(stated) - {answer, None}:
        raise Unreadable("two_answers")
    return lead, answer


def _untagged(final: str, task: str, options: Options, *, reasoned: bool) -> tuple[str, str]:
    """Reasoning and answer of a text without answer tags. reasoned: the reasoning was set apart already."""
    if _REFUSAL.match(final) and (task in ("ocr", "open") or not _STATEMENT.search(final)):
        raise Unreadable("refusal")
    whole = strip_outside(final)
    if record := json_object(whole):
        answers = [record[key] for key in _ANSWER_KEYS if key in record]
        if answers:
            reasoning = next((record[key] for key in _REASONING_KEYS if isinstance(record.get(key), str)), "")
            texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
            return reasoning, the_only([_body(answer, task, options) for answer in texts])
    if record or (whole.startswith("[") and task in ("temporal", "spatial")):
        return "", _body(whole, task, options)
    if task != "open" and (boxes := list(_BOXED.finditer(final))):
        start = max(final.rfind(mark, 0, boxes[0].start()) for mark in ("\n", ". ", "。", "! ", "? ")) + 1
        return final[:start], the_only([_body(box[1], task, options) for box in boxes])
    if stated := _stated(final, task, options):
        return stated
    if headed := list(_HEADED.finditer(final)):
        return final[: headed[-1].start()], _body(final[headed[-1].end() :], task, options)
    if task == "open":
        return "", _body(final, task, options)
    if task == "ocr":
        if not reasoned and not is_text_read(final) and ("\n" in final.strip() or _TALK.search(final)):
            raise Unreadable("no_answer")
        return "", _body(final, task, options)
    return _standing_alone(final, task, options, reasoned=reasoned)


def _stated(text: str, task: str, options: Options) -> tuple[str, str] | None:
    """What stands before the last sentence that states an answer, and that answer; None where none is stated."""
    stated = []
    for match in _STATEMENT.finditer(text):
        if task in ("open", "ocr") and not _starts_sentence(text, match.start()):
            continue
        if task == "open":
            return text[: match.start()], _body(text[match.end() :], task, options)
        sentence = _sentence(text[match.end() :], task, options)
        stated.append((match, sentence, _or_none(sentence, task, options)))
    answers = [answer for _, _, answer in stated if answer is not None]
    if not answers:
        return None
    last, sentence, answer = stated[-1]
    # The last word counts: one that cannot be read, or is taken back, leaves the answer open.
    if answer is None or _TURN.search(text, last.end() + len(sentence)):
        raise Unreadable("two_answers")
    return text[: last.start()], the_only(answers)


def _standing_alone(final: str, task: str, options: Options, *, reasoned: bool) -> tuple[str, str]:
    """An answer that is the text, or stands by itself at its end or beginning."""
    if answer := _short(final, task, options):
        return "", answer
    for separator in ("\n\n", "\n"):
        before, _, last = final.strip().rpartition(separator)
        if before.strip() and (answer := _short(last, task, options)):
            return before, answer
    first, _, explained = final.strip().partition("\n")
    if explained.strip() and not _TURN.search(explained) and (answer := _short(first, task, options)):
        return explained, answer
    before, last = _last_sentence(final)
    if before:
        concluded = _CONCLUSION.match(last)
        answer = _or_none(last[concluded.end() :], task, options) if concluded else _short(last, task, options)
        if answer is not None:
            return before, answer
        if not reasoned:
            raise Unreadable("no_answer")
    return "", _body(final, task, options)


def _body(text: str, task: str, options: Options) -> str:
    """The canonical form of a text that is known to be the answer."""
    text = visible(_BOX_MARKS.sub("", text)).strip()
    boxed = _BOXED.findall(text) if task not in ("open", "ocr") else []
    if _REFUSAL.match(text) and (task in ("ocr", "open") or _or_none(text, task, options) is None):
        raise Unreadable("refusal")
    if task == "open" and _NO_ANSWER.fullmatch(text):
        raise Unreadable("no_answer")
    return the_only([canonical_body(body, task, options) for body in boxed or [text]])


def _or_none(text: str, task: str, options: Options) -> str | None:
    try:
        return canonical_body(text, task, options)
    except Unreadable:
        return None


def _short(text: str, task: str, options: Options) -> str | None:
    """The answer that a few words are as a whole; None for a sentence that merely mentions one."""
    words = len(text.split())
    if task == "mcq":
        short = _or_none(text, task, options) is not None and is_whole_option(text, options)
    else:
        short = words <= (3 if task == "numeric" else 12)
    return _or_none(text, task, options) if short else None


def _starts_sentence(text: str, place: int) -> bool:
    before = text[:place].rstrip(" \t*#")
    return not before or before[-1] in ".!?\n。！？:：;"


def _sentence(text: str, task: str, options: Options) -> str:
    """The text up to the end of its first sentence. The stop in "B. milk" ends none."""
    line = text.lstrip().partition("\n")[0]
    if task == "ocr":
        return line
    if task == "mcq" and (letter := re.match(r"[(\[*]*[A-Za-z][)\]*]*[.]\**\s+", line)):
        rest = comparable(line[letter.end() :])
        # Behind "B. " comes the option's text, or another sentence.
        named = any(option and rest.startswith(option) for option in comparable_options(options))
        return line[: letter.end()] if line[letter.end() :][:1].isupper() and not named else line
    end = _SENTENCE_END.search(line)
    return line[: end.start()] if end else line


def _last_sentence(text: str) -> tuple[str, str]:
    """The text without its last sentence, and that."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() < len(text)]
    return (text[: ends[-1]].strip(), text[ends[-1] :].strip()) if ends else ("", text)
