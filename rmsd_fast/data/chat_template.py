"""What a model's chat template makes of a question. Everything that it adds is looked at before a prompt is built."""

from __future__ import annotations

import re
from typing import Any

from rmsd_fast.config import ModelError

END_TOKEN = "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

_SYSTEM, _FIRST, _SECOND, _REPLY = "probe-system", "probe-first", "probe-second", "probe-reply"


def render(tokenizer: Any, content: list[dict[str, str]], system: str | None = None) -> str:
    """The prompt of one user turn, up to where the response begins."""
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns += [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def response_opening(tokenizer: Any) -> str:
    """What the template writes at the beginning of a response: "", or `<think>` and blanks (Thinking models).

    Raises:
        ModelError: the template drops or moves parts of a question, ends turns in another way than the family does,
            writes the current date, or opens a response so that `<think>…</think><answer>…</answer>` cannot follow.
    """

    def refuse(what: str) -> ModelError:
        return ModelError(
            f"chat template of the model: {what}; use the template of a Qwen3-VL Instruct or Thinking model"
        )

    if "strftime_now" in str(tokenizer.chat_template):
        raise refuse("it writes the current date, so that a resumed run would see other prompts")
    content = [
        {"type": "text", "text": _FIRST},
        {"type": "video"},
        {"type": "image"},
        {"type": "text", "text": _SECOND},
    ]
    try:
        prompt = render(tokenizer, content, _SYSTEM)
        whole = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": _REPLY}]},
            ],
            tokenize=False,
        )
    # Templates raise whatever Jinja does, on purpose or not.
    except Exception as error:
        raise refuse(f"it cannot render a question ({str(error).strip().splitlines()[0]})") from error
    order = [_SYSTEM, _FIRST, VIDEO_PAD, IMAGE_PAD, _SECOND]
    if any(prompt.count(part) != 1 for part in order):
        lost = next(part for part in order if prompt.count(part) != 1)
        raise refuse(f"expected {lost!r} once in a prompt, got it {prompt.count(lost)} times")
    if sorted(order, key=prompt.index) != order:
        raise refuse("it moves media or turns to other places than the question gives them")
    if not re.search(rf"{_REPLY}\s*{re.escape(END_TOKEN)}\s*$", whole):
        raise refuse(f"expected it to end a response with {END_TOKEN}")
    tail = prompt.partition(_SECOND)[2]
    turn = re.fullmatch(rf"\s*{re.escape(END_TOKEN)}\s*<\|im_start\|>assistant\n(?P<opening>.*)", tail, re.DOTALL)
    if turn is None:
        raise refuse(f"expected {END_TOKEN} and an assistant turn after the question, got {tail!r}")
    opening = turn["opening"]
    if opening and not re.fullmatch(r"<think>\s*", opening):
        raise refuse(f"expected a response to begin empty or with <think>, got {opening!r}")
    return opening
