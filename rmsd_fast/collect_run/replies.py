"""Read the replies of servers: answers, token counts, and errors with what to do about them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from rmsd_fast.config import UserError
from rmsd_fast.teacher.usage import read_usage

# Longer pauses are cut, so that a wrong clock cannot stop a collection for days.
LONGEST_PAUSE_S = 3600.0
SHOWN_CHARACTERS = 300
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum context|max_model_len|too many tokens|prompt is too long|"
    r"(?:input|prompt|request)[^.]{0,40}(?:too (?:long|large)|exceeds?)|encoder cache size",
    re.IGNORECASE,
)
_TOO_MANY_MEDIA = re.compile(r"at most [1-9]\d* (?:image|video)", re.IGNORECASE)
# vLLM reports this as an error of the server.
_NO_FILES = re.compile(r"allowed-local-media-path", re.IGNORECASE)
_NO_MODEL = re.compile(r"\bmodel\b.{0,200}(?:does not exist|not found)|model_not_found", re.IGNORECASE)
_NO_VISION = re.compile(
    r"not (?:a )?multi-?modal|(?:does not|doesn't|not) support[^.]{0,30}(?:image|vision|video|multi-?modal)|"
    r"(?:image|video)_url[^.]{0,40}(?:not supported|unsupported|invalid)|no endpoints found that support image|"
    r"at most 0 (?:image|video)",
    re.IGNORECASE,
)
_QUOTA = re.compile(
    r"insufficient_quota|exceeded your current quota|insufficient (?:credit|balance|funds)", re.IGNORECASE
)
_FILTER = re.compile(
    r"content_filter|content management policy|data_inspection_failed|content_policy|moderation|flagged", re.IGNORECASE
)
# llama.cpp reports this as an error of the server.
_ONE_CHOICE = re.compile(r"only one (?:completion )?choice|multiple choices|\bn\b must be 1", re.IGNORECASE)
# Finish reasons of answers that the server could not complete; their text may be an error message.
_FAILED = ("error", "abort")
# Reasons for which a server rejects a request for good, and what to do.
REFUSALS = {
    "context_too_long": "lower video.num_frames, video.max_frame_pixels or collect.max_tokens, or serve more context",
    "no_vision": "use a model that accepts pictures, and with collect.video_as=base64 or file one that accepts videos",
    "too_many_media": "lower video.num_frames, or raise the limit of the server (vLLM: --limit-mm-per-prompt)",
    "no_files": "start the server with --allowed-local-media-path=<media folder>, or set collect.video_as=base64",
    "filtered": "the provider's filter rejected the prompt; leave the question out",
    "refused": "change the setting that the server names",
    "media": "fix the file, or leave the question out",
}


class Fatal(UserError, RuntimeError):
    """An error that every request would meet. The collection stops; what was collected is kept."""


class Forbidden(Fatal):
    """Status 403 without another reason: usually, the key has no access. `said` is what the server said."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class Refused(Exception):
    """A request that can never succeed. `reason` is a key of REFUSALS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Transient(Exception):
    """A failure that another attempt may not meet.

    Attributes:
        kind: short name for counts, such as "429".
        overloaded: whether fewer requests should be in flight.
        retry_after_s: pause that the server asks for; None = none.
        wrong_server: whether the failure suggests that the endpoint is not a chat server at all.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        overloaded: bool = False,
        retry_after_s: float | None = None,
        wrong_server: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.overloaded, self.retry_after_s = kind, overloaded, retry_after_s
        self.wrong_server = wrong_server


@dataclass(frozen=True)
class Reply:
    """The answers of one reply: text and finish reason of each, and the token counts of all together."""

    answers: list[tuple[str, str | None]]
    usage: dict[str, Any] = field(default_factory=dict)


def read_reply(data: bytes, key: str = "", section: str = "collect") -> Reply:
    """Read the body of a reply with status 200.

    Args:
        data: the body.
        key: API key, which errors do not contain even if the server repeats it.
        section: section of the settings, for messages.
    Raises:
        Transient, Refused, Fatal: the body is not a chat completion, or an error in place of one.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Transient("garbage", f"expected JSON, got {_shown(data, key)}", wrong_server=True) from None
    if isinstance(body, dict) and body.get("error"):
        code = body["error"].get("code") if isinstance(body["error"], dict) else None
        raise failure(code if isinstance(code, int) and code >= 400 else 500, {}, data, key, section)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        raise Transient("garbage", f"expected a list of choices, got {_shown(data, key)}", wrong_server=True)
    answers = [answer for choice in choices if (answer := _answer(choice)) is not None]
    if not answers:
        raise Transient("no answer", f"expected at least one choice with a message, got {_shown(data, key)}")
    usage = body.get("usage")
    return Reply(answers, usage if isinstance(usage, dict) else {})


def _answer(choice: Any) -> tuple[str, str | None] | None:
    """Return text and finish reason of a choice, or None if it has no message, or an error in place of one.

    Reasoning that the server returns in a separate field becomes `<think>…</think>` before the text.
    """
    if not isinstance(choice, dict) or choice.get("error") or not isinstance(choice.get("message"), dict):
        return None
    message, reason = choice["message"], choice.get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    if reason in _FAILED:
        return None
    reasoning, text = _content(message.get("content"))
    separate = (message.get(name) for name in ("reasoning_content", "reasoning"))
    reasoning = reasoning or next((value for value in separate if isinstance(value, str) and value.strip()), "")
    refusal = message.get("refusal")
    text = text or (refusal if isinstance(refusal, str) else "")
    # Some servers repeat the reasoning in the content.
    if reasoning and reasoning.strip() not in text:
        text = f"<think>{reasoning}</think>{text}"
    return text, reason if isinstance(reason, str) else None


def _content(content: Any) -> tuple[str, str]:
    """Return reasoning and text of a message's content, which is a text or a list of parts."""
    if isinstance(content, str):
        return "", content
    reasoning, text = [], []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif isinstance(part, dict) and "thinking" in part:
            thinking = part["thinking"]
            reasoning.append(thinking if isinstance(thinking, str) else _content(thinking)[1])
    return "".join(reasoning), "".join(text)


def tokens_of(usage: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return prompt and completion tokens of a reply, or None if the server did not count them."""
    prompt, completion, _ = read_usage(usage)
    return None if math.isnan(prompt + completion) else (math.ceil(prompt), math.ceil(completion))


def failure(status: int, headers: Mapping[str, str], data: bytes, key: str = "", section: str = "collect") -> Exception:
    """Return the error to raise for a reply with this status: Transient, Refused or Fatal, without the key."""
    text = _message(data, status, key)
    said = f"status {status}: {text}"
    wait = retry_after_s(headers)
    if status == 402 or (status == 429 and _QUOTA.search(text)):
        return Fatal(f"{section}.endpoint: expected an account with credit, got {said}; check it, then start again")
    if status == 404 and _NO_MODEL.search(text):
        return Fatal(
            f"{section}.model: expected a model that the server has, got {said}; set it to a name that the server "
            "lists at /v1/models"
        )
    if status >= 500 and _ONE_CHOICE.search(text):
        return Refused("refused", said)
    if _NO_FILES.search(text):
        return Refused("no_files", said)
    if status == 429 or status >= 500:
        return Transient(str(status), said, overloaded=True, retry_after_s=wait)
    if status in (408, 409, 425):
        return Transient(str(status), said, retry_after_s=wait)
    if status == 403 and _FILTER.search(text):
        return Refused("filtered", said)
    if status in (401, 403):
        message = (
            f"{section}.api_key_env: expected a key that the server accepts, got {said}; set the environment variable "
            "that it names"
        )
        return Fatal(message) if status == 401 else Forbidden(message, said)
    if status in (400, 413, 414, 415, 422):
        return Refused(_refusal(status, text), said)
    # The endpoint is wrong, or a gateway has lost its server for a moment.
    return Transient(str(status), said, wrong_server=True)


def _refusal(status: int, text: str) -> str:
    if _FILTER.search(text):
        return "filtered"
    if _NO_VISION.search(text):
        return "no_vision"
    if _TOO_MANY_MEDIA.search(text):
        return "too_many_media"
    return "context_too_long" if _TOO_LONG.search(text) or status in (413, 414) else "refused"


def _message(data: bytes, status: int, key: str) -> str:
    """Return the message of an error reply in the form of any server, without a code that repeats the status."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _shown(data, key)
    if isinstance(body, dict):
        error = body.get("error") or body
        if isinstance(error, dict):
            said = [str(error[name]) for name in ("code", "message", "detail") if error.get(name)]
            said = said[said[:1] == [str(status)] :]
            return _cut(": ".join(said), key) if said else _shown(data, key)
        return _cut(str(error), key)
    return _shown(data, key)


def _shown(data: bytes, key: str) -> str:
    """Return the start of a body for messages; a page of HTML is shown by its title."""
    if data.lstrip()[:1] == b"<":
        title = _TITLE.search(data[:100_000])
        return f"an HTML page{' titled ' + repr(_cut(title[1].decode(errors='replace').strip(), key)) if title else ''}"
    return repr(_cut(data.decode(errors="replace"), key)) if data.strip() else "an empty body"


def _cut(text: str, key: str) -> str:
    """Return the start of a text on one line. The key is replaced first, because a part of it is a secret too."""
    text = " ".join((text.replace(key, "[API key]") if key else text).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the pause that a server asks for in seconds, at most LONGEST_PAUSE_S; None = none.

    `retry-after-ms` holds milliseconds; `retry-after` holds seconds or an HTTP date.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    seconds = _number(milliseconds)
    if seconds is not None:
        seconds /= 1000
    elif value is not None:
        seconds = _number(value)
        if seconds is None:
            try:
                date = parsedate_to_datetime(value)
            except ValueError:
                return None
            date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
            seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and value == value else None
