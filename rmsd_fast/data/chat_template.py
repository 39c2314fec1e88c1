"""Render questions with a model's chat template, and check first that the template keeps every part of a question."""

from __future__ import annotations

import re
from typing import Any

from rmsd_fast.config import ModelError, first_line

END_TOKEN = "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

# Probe texts contain everything in a question that a template could change: HTML, quotes, repeated spaces and line
# breaks, capitals, other scripts, and more than a page of text. Texts between two media begin and end with a space.
_HARD = ' <b>"it\'s"</b> &amp;  {{ two }}\n\n\tCafé 漢 ' + "a long text " * 400
_SYSTEM, _FIRST, _SECOND = f"system{_HARD}end of system", f"first{_HARD}end of first ", f" second{_HARD}end of second"
_REPLY = f"reply{_HARD}end of reply"


def render(tokenizer: Any, content: list[dict[str, str]], system: str | None = None) -> str:
    """Return the prompt of one user turn, up to the start of the response."""
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns += [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def response_opening(tokenizer: Any, family: str) -> str:
    """Return the text that opens a response in the template: "", or `<think>` and whitespace (Thinking models).

    Args:
        tokenizer: tokenizer with a chat template.
        family: name of the model's family in messages.
    Raises:
        ModelError: the template drops or moves parts of a question, ends turns differently from the model family,
            writes the current date, or opens a response so that `<think>…</think><answer>…</answer>` cannot follow.
    """

    def refuse(what: str) -> ModelError:
        return ModelError(f"chat template of the model: {what}; use the template of an original {family} model")

    if "strftime_now" in str(tokenizer.chat_template):
        raise refuse("it writes the current date, so a resumed run would get different prompts")
    content = [
        {"type": "text", "text": _FIRST},
        {"type": "video"},
        {"type": "image"},
        {"type": "text", "text": _SECOND},
    ]
    try:
        prompt, with_system = (render(tokenizer, content, system) for system in (None, _SYSTEM))
        whole = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": _REPLY}]},
            ],
            tokenize=False,
        )
    # Templates raise arbitrary exceptions, some of them intentionally.
    except Exception as error:
        reason = first_line(error)
        raise refuse(f"it cannot render a question ({reason})") from error
    parts = {"the first text": _FIRST, "the video": VIDEO_PAD, "the image": IMAGE_PAD, "the second text": _SECOND}
    for rendered, system in ((prompt, {}), (with_system, {"the system text": _SYSTEM})):
        expected = system | parts
        for name, part in expected.items():
            if rendered.count(part) != 1:
                raise refuse(
                    f"expected {name} once and unchanged in a prompt {'with' if system else 'without'} a system turn, "
                    f"got it {rendered.count(part)} times"
                )
        if sorted(expected.values(), key=rendered.index) != list(expected.values()):
            raise refuse("it changes the order of media or turns")
    if prompt[prompt.index(_FIRST) :] != with_system[with_system.index(_FIRST) :]:
        raise refuse("it renders a question differently if there is a system turn")
    if not re.search(rf"{re.escape(_REPLY)}\s*{re.escape(END_TOKEN)}\s*$", whole):
        raise refuse(f"expected it to keep a response unchanged and to end it with {END_TOKEN}")
    tail = prompt.partition(_SECOND)[2]
    turn = re.fullmatch(rf"\s*{re.escape(END_TOKEN)}\s*<\|im_start\|>assistant\n(?P<opening>.*)", tail, re.DOTALL)
    if turn is None:
        raise refuse(f"expected {END_TOKEN} and an assistant turn after the question, got {tail[:80]!r}")
    opening = turn["opening"]
    if opening and not re.fullmatch(r"<think>\s*", opening):
        raise refuse(f"expected a response to begin with nothing or with <think>, got {opening!r}")
    return opening
