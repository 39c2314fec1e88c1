"""Records of other trainers' question files, turned into ours.

========  ==================================================  ==================================================
format    keys                                                task type
========  ==================================================  ==================================================
ms-swift  `messages` (role, content), `videos` | `images`     key `task_type`; without it the question is `open`
llava     `conversations` (from, value), `video` | `image`    key `task_type`; without it the question is `open`
video-r1  `problem`, `problem_type`, `path`, `data_type`,     `problem_type`: multiple choice is mcq, numerical
          `options`, `solution`                               and regression numeric, OCR ocr, free-form open
========  ==================================================  ==================================================

Conversations seldom say how their answer is to be graded. Nothing is guessed from the looks of the answer ("B" may be
a letter or a grade): a record that does not name its `task_type` is `open`, its answer kept as a reference, never
scored. The extra keys `task_type`, `options`, `answer`, `duration` and `id` are read where a record has them; other
keys are not. The assistant's turn gives the answer; where it holds one `<answer>…</answer>`, the text inside. More
than one user turn is an error. A system turn is kept under `meta["system"]`. `<video>` and `<image>` marks are taken
out of the question. Ids: `id` (Video-R1: `problem_id`), else "<file stem>-<index from 0>". Video-R1's regression
questions are graded like every numeric one: choose `teacher.numeric_metric=mra` for them.
"""

from __future__ import annotations

import re
from typing import Any

from rmsd_fast.data.records import DataError

_MARKS = re.compile(r"[ \t]*<(?:video|image)>[ \t]*\n?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_VIDEO_R1_TASKS = {
    "multiple choice": "mcq",
    "numerical": "numeric",
    "regression": "numeric",
    "ocr": "ocr",
    "free-form": "open",
}
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")

Converted = tuple[dict[str, Any], dict[str, str]]


def detect_format(record: dict[str, Any], where: str) -> str:
    """The format that a record's keys belong to; DataError where none fits."""
    for key, name in (
        ("messages", "ms-swift"),
        ("conversations", "llava"),
        ("problem", "video-r1"),
        ("question", "rmsd"),
    ):
        if key in record:
            return name
    raise DataError(
        f"{where}: expected a key 'question' (our format), 'messages' (ms-swift), 'conversations' (llava) or 'problem' "
        f"(video-r1), got the keys {', '.join(map(repr, record)) or 'none'}; name one of these formats in data.format"
    )


def convert(record: dict[str, Any], format: str, where: str, fallback_id: str) -> Converted:
    """A record in our schema, not yet checked, and what its source calls our fields (for messages).

    Raises:
        DataError: the record lacks what its format promises.
    """
    if format == "rmsd":
        return record, {}
    if format == "ms-swift":
        return _chat(record, where, fallback_id, "messages", ("role", "content"))
    if format == "llava":
        return _chat(record, where, fallback_id, "conversations", ("from", "value"))
    return _video_r1(record, where, fallback_id)


def _chat(record: dict[str, Any], where: str, fallback_id: str, key: str, turn_keys: tuple[str, str]) -> Converted:
    system, question, reply = _turns(record.get(key), where, key, turn_keys)
    raw: dict[str, Any] = {
        "id": record.get("id", fallback_id),
        "question": _MARKS.sub("", question).strip(),
        "task_type": record.get("task_type", "open"),
        "answer": record.get("answer", _inside_answer(reply)),
    }
    names = {"question": key, "answer": "answer" if "answer" in record else key}
    for ours, other in (("videos", "video"), ("images", "image")):
        value = record.get(ours, record.get(other))
        if other in record and ours not in record:
            names[ours] = other
        if value is not None and value != []:
            raw[ours] = value if isinstance(value, list) else [value]
    for name in ("options", "duration"):
        if name in record:
            raw[name] = record[name]
    meta = {"format": "ms-swift" if key == "messages" else "llava"}
    raw["meta"] = meta | ({"system": system} if system else {})
    return raw, names


def _turns(turns: object, where: str, key: str, turn_keys: tuple[str, str]) -> tuple[str | None, str, str | None]:
    """System text, the user's text, the assistant's text."""
    speaker_key, text_key = turn_keys
    if not isinstance(turns, list):
        raise DataError.at(where, key, "a list of turns", turns, f"write [{{{speaker_key!r}: …, {text_key!r}: …}}]")
    system, users, replies = [], [], []
    for index, turn in enumerate(turns):
        name = f"{key}[{index}]"
        text = turn.get(text_key) if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise DataError.at(where, name, f"an object with the text {text_key!r}", turn, "mend the turn")
        speaker = turn.get(speaker_key)
        if speaker == "system":
            system.append(text)
        elif speaker in _USER:
            users.append(text)
        elif speaker in _ASSISTANT:
            replies.append(text)
        else:
            expected = f"{speaker_key!r} to be system, {' or '.join(_USER)}, {' or '.join(_ASSISTANT)}"
            raise DataError.at(where, f"{name}.{speaker_key}", expected, speaker, "mend the turn")
    if len(users) != 1 or len(replies) > 1:
        got = f"{len(users)} user and {len(replies)} assistant turns"
        todo = "split conversations of several turns into questions of their own"
        raise DataError(f"{where}: field '{key}': expected one user turn and at most one answer, got {got}; {todo}")
    return "\n".join(system) or None, users[0], replies[0] if replies else None


def _video_r1(record: dict[str, Any], where: str, fallback_id: str) -> Converted:
    problem, kind, data_type = (record.get(name) for name in ("problem", "problem_type", "data_type"))
    if not isinstance(problem, str):
        raise DataError.at(where, "problem", "the question's text", problem, "add it")
    task = _VIDEO_R1_TASKS.get(kind.strip().lower()) if isinstance(kind, str) else None
    if task is None:
        expected = "one of multiple choice, numerical, regression, OCR, free-form"
        raise DataError.at(where, "problem_type", expected, kind, "name the type")
    if data_type not in ("video", "image"):
        raise DataError.at(where, "data_type", "'video' or 'image'", data_type, "say what the file at 'path' is")
    solution = record.get("solution")
    if solution is not None and not isinstance(solution, str | int | float):
        raise DataError.at(where, "solution", "text such as '<answer>B</answer>'", solution, "mend it")
    raw = {
        "id": record.get("problem_id", fallback_id),
        "question": _MARKS.sub("", problem).strip(),
        "task_type": task,
        "answer": _inside_answer(solution) if isinstance(solution, str) else solution,
        "videos" if data_type == "video" else "images": [record.get("path")],
        "meta": {"format": "video-r1", "problem_type": kind},
    }
    if task == "mcq" and record.get("options"):
        raw["options"] = record["options"]
    if record.get("data_source"):
        raw["meta"]["data_source"] = record["data_source"]
    names = {"id": "problem_id", "question": "problem", "answer": "solution", "videos": "path", "images": "path"}
    return raw, names


def _inside_answer(text: str | None) -> str | None:
    if text is None:
        return None
    found = _ANSWER.findall(text)
    return (found[0] if len(found) == 1 else text).strip() or None
