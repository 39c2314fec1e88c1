"""Normalize the tags around reasoning and answer, and split a response at them."""

from __future__ import annotations

import html
import re

from .reasons import Unreadable
from .text import visible

_THINK = r"(?:think|thinking|thoughts?|reasoning|reason|analysis|scratchpad|seed:think)"
_ANSWER = r"(?:answer|final[ _-]?answer|ans|solution|output|result)"
_SPELLINGS = [
    # Harmony's channels.
    (re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>"), "<think>"),
    (re.compile(r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>"), "</think>"),
    (re.compile(rf"[<\[◁]\s*{_THINK}\s*[>\]▷]", re.IGNORECASE), "<think>"),
    (re.compile(rf"[<\[◁]\s*/\s*{_THINK}\s*[>\]▷]", re.IGNORECASE), "</think>"),
    (re.compile(rf"<\s*{_ANSWER}\s*>|\[\s*answer\s*\]|<\|begin_of_box\|>", re.IGNORECASE), "<answer>"),
    (re.compile(rf"<\s*/\s*{_ANSWER}\s*>|\[\s*/\s*answer\s*\]|<\|end_of_box\|>", re.IGNORECASE), "</answer>"),
]
# Qwen's box marks in the reasoning are also special tokens of the student. Only the marks are removed.
_REGION_MARKS = re.compile(r"<\|(?:box|quad|object_ref)_(?:start|end)\|>")
# GLM's answer marks, which may occur inside an answer block.
_BOX_MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>")
_ANY_TAG = re.compile(r"</?(?:think|answer)>")
# Tokens that servers leave at the end of a text.
_END_TOKENS = ("im_end", "endoftext", "eot_id", "end", "end_of_text", "return")
_END_TOKENS = (*(f"<|{token}|>" for token in _END_TOKENS), "</s>", "<eos>", "<end_of_turn>")


def one_spelling(text: str) -> str:
    """Return the text with all spellings of the tags normalized, and without end tokens and invisible characters."""
    text = text.rstrip()
    while text.endswith(_END_TOKENS):
        text = text[: text.rindex("<")].rstrip()
    text = visible(text)
    if "&lt;" in text and "<answer>" not in text:
        text = html.unescape(text)
    if any(mark in text for mark in "<[◁"):
        for spelling, tag in _SPELLINGS:
            text = spelling.sub(tag, text)
    return text.strip()


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Return the reasoning inside tags (None without such tags), and the text that contains the answer."""
    reasoning, closed, final = text.rpartition("</think>")
    if closed and final.strip():
        return reasoning, final
    if closed:
        # The answer is inside the reasoning, or before it.
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


def has_tags(text: str) -> bool:
    return _ANY_TAG.search(text) is not None


def without_tags(text: str) -> str:
    """Return reasoning without tags and marks that are not allowed inside `<think>`."""
    return without_region_marks(_ANY_TAG.sub("", text)).strip()


def without_region_marks(text: str) -> str:
    return _REGION_MARKS.sub("", text)


def without_answer_marks(text: str) -> str:
    return _BOX_MARKS.sub("", text)
