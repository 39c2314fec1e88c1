"""Records of other trainers' question files, turned into ours.

========  =====================================================  ===================================================
format    keys                                                   task type
========  =====================================================  ===================================================
ms-swift  `messages` (role, content as text or parts), or        key `task_type`, else by the answer
          `query` and `response`; `videos` | `images`
llava     `conversations` (from, value), `video` | `image`       key `task_type`, else by the answer
video-r1  `problem`, `problem_type`, `options`; media in         `problem_type`, else by the answer
          `path` with `data_type` (Video-R1), or in `videos`,
          `images` (EasyR1, EasyVideoR1), `image_path`;
          `solution` | `answer`
========  =====================================================  ===================================================

A record that names no task type gets one from its options and its answer, unless `data.task_type` names one: options
or a letter are mcq, "3.5 to 10" is temporal, four numbers are spatial, a number is numeric, anything else is open. The
summary at the start counts them (`meta["inferred"]`). Yes/no questions (`boolean`) become mcq with the options Yes and
No. What no task type can grade (tracking, code, a formula) is an error.

The answer is the key `answer` or `solution`, else the assistant's turn; where it holds one `<answer>…</answer>`, the
text inside. The extra keys `task_type`, `options`, `duration`, `system` and `id` are read where a record has them; null
is the same as a missing key; other keys are kept in `meta["source"]`. More than one user turn is an error. Ids: `id`
(Video-R1: `problem_id`), else "<file stem>-<index from 0>". Video-R1's regression questions are graded like every
numeric one: choose `teacher.numeric_metric=mra` for them.
"""

from __future__ import annotations

import re
from typing import Any

from rmsd_fast.data.records import DataError, answer_text
from rmsd_fast.method.answers import parse_answer_body
from rmsd_fast.method.natural import Unreadable

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MULTIPLE_CHOICE, _YES_NO, _MATH = "mcq", "boolean", "math"
_PROBLEM_TYPES = {
    "multiple choice": "mcq",
    "mcq": "mcq",
    "numerical": "numeric",
    "number": "numeric",
    "regression": "numeric",
    "ocr": "ocr",
    "free form": "open",
    "open ended": "open",
    "video qa": "open",
    "video description": "open",
    "caption": "open",
    "temporal grounding": "temporal",
    "spatial grounding": "spatial",
    "boolean": _YES_NO,
    "binary classification": _YES_NO,
    "math": _MATH,
    "mathematics": _MATH,
}
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
_EXTRA = ("options", "duration", "system")

Converted = tuple[dict[str, Any], dict[str, str]]


def detect_format(record: dict[str, Any], where: str) -> str:
    """The format that a record's keys belong to; DataError where none fits."""
    for key, name in (
        ("messages", "ms-swift"),
        ("query", "ms-swift"),
        ("conversations", "llava"),
        ("problem", "video-r1"),
        ("question", "rmsd"),
    ):
        if key in record:
            return name
    raise DataError(
        f"{where}: expected a key 'question' (our format), 'messages' or 'query' (ms-swift), 'conversations' (llava) "
        f"or 'problem' (video-r1), got the keys {', '.join(map(repr, record)) or 'none'}; name one of these formats in "
        "data.format"
    )


def convert(record: dict[str, Any], format: str, where: str, fallback_id: str, task_type: str = "auto") -> Converted:
    """A record in our schema, not yet checked, and what its source calls our fields (for messages).

    Args:
        task_type: of a record that names none; "auto" = by its options and answer.
    Raises:
        DataError: the record lacks what its format promises, or holds what cannot be used.
    """
    record = {key: value for key, value in record.items() if value is not None}
    if format == "rmsd":
        return _own(record)
    for key in ("audios", "audio"):
        if record.get(key):
            raise DataError.at(where, key, "videos and images only", record[key], "leave such questions out")
    if format == "video-r1":
        raw, names, used = _problem(record, where)
    else:
        key = "conversations" if format == "llava" else "messages"
        raw, names, used = _chat(record, where, key)
    raw = {"id": fallback_id, **raw}
    meta = {"format": format}
    if "task_type" not in raw:
        raw["task_type"] = _inferred(raw) if task_type == "auto" else task_type
        meta |= {"inferred": True} if task_type == "auto" else {}
    if raw["task_type"] != "mcq" and raw.get("options") == []:
        del raw["options"]
    rest = {key: value for key, value in record.items() if key not in used}
    raw["meta"] = meta | ({"source": rest} if rest else {})
    return raw, names


def _own(record: dict[str, Any]) -> Converted:
    """Our own format, with `video` for `videos` and one path in place of a list."""
    names = {}
    for ours, other in (("videos", "video"), ("images", "image")):
        if other in record and ours not in record:
            record[ours], names[ours] = record.pop(other), other
        if isinstance(record.get(ours), str):
            record[ours] = [record[ours]]
    return record, names


def _chat(record: dict[str, Any], where: str, key: str) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    speaker_key, text_key = ("from", "value") if key == "conversations" else ("role", "content")
    used = {key, "query", "response", "id", "answer", "solution", "task_type", *_EXTRA}
    turns = record.get(key)
    if turns is None and "query" in record:
        turns = [{speaker_key: "user", text_key: record["query"]}]
        turns += [{speaker_key: "assistant", text_key: record["response"]}] if "response" in record else []
        if record.get("history"):
            raise DataError.at(where, "history", "one question and its answer", record["history"], _SPLIT_TURNS)
        used.add("history")
    if not isinstance(turns, list):
        raise DataError.at(where, key, "a list of turns", turns, f"write [{{{speaker_key!r}: …, {text_key!r}: …}}]")
    media: dict[str, list[Any]] = {"videos": [], "images": []}
    system, question, reply = _turns(turns, where, key, (speaker_key, text_key), media)
    raw: dict[str, Any] = {"question": question}
    names = {"question": key, "answer": key}
    for ours, other in (("videos", "video"), ("images", "image")):
        value = record.get(ours, record.get(other))
        if other in record and ours not in record:
            names[ours] = other
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if listed and media[ours]:
            raise DataError.at(where, ours, f"files either here or in the parts of '{key}'", listed, "give them once")
        if listed or media[ours]:
            raw[ours] = listed or media[ours]
        used |= {ours, other}
    if "<bbox>" in question + (reply or "") or "<ref-object>" in question + (reply or ""):
        raise DataError.at(
            where,
            key,
            "boxes as numbers",
            "marks <bbox> or <ref-object>",
            "write the numbers of 'objects' into the text",
        )
    answer = next((record[name] for name in ("answer", "solution") if name in record), None)
    if answer is not None:
        names["answer"] = "answer" if "answer" in record else "solution"
    raw["answer"] = _inside_answer(reply if answer is None else answer)
    raw |= {name: record[name] for name in ("id", "task_type", *_EXTRA) if name in record}
    if system and "system" not in raw:
        raw["system"] = system
    return raw, names, used


_SPLIT_TURNS = "split conversations of several turns into questions of their own"


def _turns(
    turns: list[Any], where: str, key: str, turn_keys: tuple[str, str], media: dict[str, list[Any]]
) -> tuple[str | None, str, str | None]:
    """System text, the user's text, the assistant's text. Media of content parts go into `media`."""
    speaker_key, text_key = turn_keys
    system, users, replies = [], [], []
    for index, turn in enumerate(turns):
        name = f"{key}[{index}]"
        if isinstance(turn, dict) and text_key in turn and turn[text_key] is None:
            continue
        text = turn.get(text_key) if isinstance(turn, dict) else None
        if isinstance(text, list):
            text = "".join(_part(part, where, f"{name}.{text_key}[{place}]", media) for place, part in enumerate(text))
        if not isinstance(text, str):
            raise DataError.at(where, name, f"an object with the text {text_key!r}", turn, "fix the turn")
        speaker = turn.get(speaker_key)
        if speaker == "system":
            system.append(text)
        elif speaker in _USER:
            users.append(text)
        elif speaker in _ASSISTANT:
            replies.append(text)
        else:
            expected = f"{speaker_key!r} to be system, {' or '.join(_USER)}, {' or '.join(_ASSISTANT)}"
            raise DataError.at(where, f"{name}.{speaker_key}", expected, speaker, "fix the turn")
    if len(users) != 1 or len(replies) > 1:
        got = f"{len(users)} user and {len(replies)} assistant turns"
        raise DataError(
            f"{where}: field '{key}': expected one user turn and at most one answer, got {got}; {_SPLIT_TURNS}"
        )
    return "\n".join(system) or None, users[0], replies[0] if replies else None


def _part(part: Any, where: str, name: str, media: dict[str, list[Any]]) -> str:
    """The text of one content part; a medium leaves its mark."""
    if isinstance(part, dict):
        # Tables give every part the keys of all of them.
        part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("video", "image") and kind in part:
        if unknown := sorted(set(part) - {"type", kind, "video_start", "video_end"}):
            todo = "set frames and pixels for the whole run (video.*) and remove it"
            raise DataError.at(
                where, f"{name}.{unknown[0]}", f"type, {kind}, video_start and video_end", unknown[0], todo
            )
        span = {
            ours: part[theirs] for ours, theirs in (("start", "video_start"), ("end", "video_end")) if theirs in part
        }
        media[f"{kind}s"].append({"path": part[kind], **span} if span else part[kind])
        return f"<{kind}>"
    raise DataError.at(where, name, "a part of type text, video or image with its content", part, "fix the part")


def _problem(record: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    problem, kind, data_type = (record.get(name) for name in ("problem", "problem_type", "data_type"))
    if not isinstance(problem, str):
        raise DataError.at(where, "problem", "the question's text", problem, "add it")
    names = {"id": "problem_id" if "problem_id" in record else "id", "question": "problem"}
    used = {"problem", "problem_id", "data_type", "solution", "answer", "path", "task_type", *_EXTRA}
    answer = next((record[name] for name in ("solution", "answer") if name in record), None)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        raise DataError.at(where, "solution", "text such as '<answer>B</answer>'", answer, "fix it")
    names["answer"] = "answer" if "answer" in record and "solution" not in record else "solution"
    raw: dict[str, Any] = {"question": problem, "answer": _inside_answer(answer)}
    raw |= {name: record[name] for name in _EXTRA if name in record}
    if "problem_id" in record or "id" in record:
        raw["id"] = record.get("problem_id", record.get("id"))
        used.add("id")
    for ours, others in (("videos", ("videos", "video")), ("images", ("images", "image", "image_path"))):
        for other in others:
            if record.get(other):
                raw.setdefault(ours, []).extend(record[other] if isinstance(record[other], list) else [record[other]])
                names[ours] = other
            used.add(other)
    if "path" in record or not (raw.get("videos") or raw.get("images")):
        if data_type not in ("video", "image"):
            raise DataError.at(where, "data_type", "'video' or 'image'", data_type, "say what the file at 'path' is")
        path = record.get("path")
        ours = f"{data_type}s"
        raw[ours] = (path if isinstance(path, list) else [path]) + raw.get(ours, [])
        names[ours] = "path"
    if task := record.get("task_type") or (kind is not None and _task_of(kind, raw, where)):
        raw["task_type"] = task
    if raw.get("task_type") == _YES_NO:
        raw |= {"task_type": "mcq", "options": ["Yes", "No"]}
    if raw.get("task_type") not in (None, "mcq"):
        raw.pop("options", None)
    return raw, names, used


def _task_of(kind: object, raw: dict[str, Any], where: str) -> str:
    """Our task type for a `problem_type`."""
    task = _PROBLEM_TYPES.get(" ".join(re.split(r"[\s_-]+", kind.strip().lower()))) if isinstance(kind, str) else None
    if task == _MATH:
        task = _inferred(raw)
        task = task if task in ("mcq", "numeric") else None
    if task is None:
        expected = (
            "one of multiple choice, numerical, regression, OCR, free-form, open-ended, temporal grounding, spatial "
            "grounding, boolean, math (a letter or a number)"
        )
        raise DataError.at(
            where, "problem_type", expected, kind, "leave out what no task type can grade, or name the type"
        )
    return task


def _inferred(raw: dict[str, Any]) -> str:
    """The task type that options and answer speak for."""
    answer = raw.get("answer")
    if raw.get("options") or (isinstance(answer, str) and re.fullmatch(r"[(\[]?[A-Z][)\]]?\.?", answer.strip())):
        return "mcq"
    for task in ("temporal", "spatial", "numeric"):
        try:
            text = answer_text(answer, task)
        except Unreadable:
            continue
        # Only what is written as such: "3 cups" and "from one to two" may be parts of a longer answer.
        if (
            not isinstance(answer, str)
            or parse_answer_body(answer, task) is not None
            or answer.strip().startswith(("[", "{"))
        ):
            return task if parse_answer_body(text, task) is not None else "open"
    return "open"


def _inside_answer(text: Any) -> Any:
    """The text inside one `<answer>…</answer>`; anything else as it is, and nothing for an empty text."""
    if not isinstance(text, str):
        return text
    found = _ANSWER.findall(text)
    return (found[0] if len(found) == 1 else text).strip() or None
