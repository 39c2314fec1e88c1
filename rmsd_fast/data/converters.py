"""Convert question records of other trainers to this package's schema.

========  =====================================================  ===================================================
format    keys                                                   task type
========  =====================================================  ===================================================
ms-swift  `messages` (role, content as text or parts), or        key `task_type`, otherwise from the answer
          `query` and `response`; `videos` | `images`
llava     `conversations` (from, value), `video` | `image`       key `task_type`, otherwise from the answer
video-r1  `problem`, `problem_type`, `options`; media in         `problem_type`, otherwise from the answer
          `path` with `data_type` (Video-R1), or in `videos`,
          `images` (EasyR1, EasyVideoR1), `image_path`;
          `solution` | `answer`
========  =====================================================  ===================================================

The task type of a record without one is inferred from its options and its answer, unless `data.task_type` specifies it
(see `task_types`). The summary at the start counts these records (`meta["inferred"]`). If a record has no options, a
list of options in the question (`A. tea`, `B. milk`, one per line) is used. An answer that is a letter does not make a
question mcq, because without options it might be a letter on a sign. Yes/no questions (`boolean`) are mcq, with the
options Yes and No if the record has none. Questions that no task type can grade (tracking, code, a formula) are errors.

The answer is the key `answer` or `solution`, otherwise the assistant's turn. If both exist and differ, the record is an
error. If the answer contains exactly one `<answer>…</answer>`, only the text inside is used. The optional keys
`task_type`, `options`, `duration`, `system`, `hints` and `id` are read from every format, and so are the fields of
other projects for teachers, see `hint_converters`. A null value is treated as a missing key. All other keys are stored
in `meta["source"]`. Keys with the same meaning must agree: a record that states its media, answer, task type or system
text twice with different values is an error. Keys of two formats, or more than one user turn, are also errors. The id
is `id` (Video-R1: `problem_id`), otherwise "<file stem>-<index from 0>", which the summary at the start counts
(`meta["id_by_position"]`).

Video-R1's regression questions are graded as numeric questions. Set `teacher.numeric_metric=mra` for them.
"""

from __future__ import annotations

import re
from typing import Any

from rmsd_fast.data.easyvideor1 import groups_of, tagged_letter, with_video_marks, without_copies
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.ground_truths import GroundTruthError, read_ground_truth
from rmsd_fast.data.hint_converters import convert_hints
from rmsd_fast.data.marks import with_video_mark
from rmsd_fast.data.option_lists import find_options, shows_options
from rmsd_fast.data.task_types import (
    infer_task,
    is_yes_or_no,
    letter_of_reply,
    looks_like_a_letter,
    names_an_option,
)
from rmsd_fast.method.answers import bare_options, parse_answer_body
from rmsd_fast.method.folding import fold_text

# Keys that identify a format, in order of precedence.
RECORD_KEYS = {
    "messages": "ms-swift",
    "query": "ms-swift",
    "conversations": "llava",
    "problem": "video-r1",
    "question": "rmsd",
}
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_YES_NO, _MATH = "boolean", "math"
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
    # OVO-Bench: repeated events are counted, steps and clues are confirmed or denied.
    "rec": "numeric",
    "ssr": _YES_NO,
    "crr": _YES_NO,
    "math": _MATH,
    "mathematics": _MATH,
}
# Possible task types of problem types that are not task types themselves.
_TASKS_OF = {_YES_NO: ("mcq",), _MATH: ("mcq", "numeric")}
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
_EXTRA = ("options", "duration", "system", "hints")
# Fields of other projects from which hints come, by the hint that an error may be about.
_SOURCES = {"keyframes": "key_frames", "cue": "key_items", "media.images": "teacher_images"}
_SPLIT_TURNS = "split conversations of several turns into separate questions"

Converted = tuple[dict[str, Any], dict[str, str]]


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the keys whose value is null, which tables add."""
    return {key: value for key, value in record.items() if value is not None}


def detect_format(record: dict[str, Any], where: str) -> str:
    """Return the format that a record's keys belong to.

    Args:
        record: the record as read, including nulls.
    Raises:
        DataError: no format fits, or the key that identifies the format is null.
    """
    if format := _format_of(record):
        return format
    if empty := [key for key in RECORD_KEYS if key in record]:
        name = "question" if "question" in empty else empty[0]
        raise DataError.at(where, name, "the question", None, "add it, or remove the record")
    if "prompt" in record:
        raise DataError(
            f"{where}: expected a supported format, got the keys {', '.join(map(repr, record))}, as verl writes them; "
            "rename 'prompt' to 'messages', and write the ground truth of 'reward_model' under 'solution'"
        )
    raise DataError(
        f"{where}: expected a key 'question' (our format), 'messages' or 'query' (ms-swift), 'conversations' (llava) "
        f"or 'problem' (video-r1), got the keys {', '.join(map(repr, record)) or 'none'}; name one of these formats in "
        "data.format"
    )


def check_format(record: dict[str, Any], format: str, where: str, *, named: bool) -> None:
    """Raise DataError if a record's keys identify a different format from that of its file.

    Args:
        named: whether the setting names the format; otherwise the first record determines it.
    """
    looks = _format_of(record)
    has_its_own = any(record.get(key) is not None for key, other in RECORD_KEYS.items() if other == format)
    if looks and looks != format and not has_its_own:
        why = f"data.format={format}" if named else "the format of the first record"
        raise DataError(
            f"{where}: expected a record of the format {format} ({why}), got one that looks like {looks}; "
            "use a separate file for each format"
        )


def _format_of(record: dict[str, Any]) -> str | None:
    return next((format for key, format in RECORD_KEYS.items() if record.get(key) is not None), None)


def convert(record: dict[str, Any], format: str, where: str, fallback_id: str, task_type: str = "auto") -> Converted:
    """Return a record in this package's schema, not yet checked, and the source's field names for messages.

    Args:
        record: the record without nulls.
        task_type: task type of a record without one; "auto" infers it from options and answer.
    Raises:
        DataError: the record lacks required keys of its format, or holds a value that cannot be used.
    """
    if format == "video-r1":
        record = without_copies(record)
    first, *others = [key for key in RECORD_KEYS if record.get(key) not in (None, [], "")] or [""]
    if others:
        raise DataError.at(where, others[0], f"no value next to '{first}'", record[others[0]], "keep one of the two")
    if format == "rmsd":
        return _convert_own(record, where)
    for key in ("audios", "audio"):
        if record.get(key):
            raise DataError.at(where, key, "only videos and images", record[key], "leave such questions out")
    if format == "video-r1":
        raw, names, used = _problem(record, where)
    else:
        raw, names, used = _chat(record, where, "conversations" if format == "llava" else "messages")
    if format == "llava" and len(raw.get("videos") or ()) == 1 and not raw.get("images"):
        raw["question"] = with_video_mark(raw["question"])
    hints, read = convert_hints(record, raw, where)
    if hints:
        raw["hints"] = hints
        names |= {f"hints.{name}": key for name, key in _SOURCES.items() if key in read}
    used |= read
    meta = {"format": format} | ({} if "id" in raw else {"id_by_position": True})
    raw = {"id": fallback_id, **raw}
    reply = raw.pop("reply", None)
    meta |= _settle_task(raw, names, where, task_type, prose=format != "video-r1")
    if reply is not None and _meaning(reply, raw) != _meaning(raw["answer"], raw):
        expected = f"no answer in it, or the same as '{names['answer']}' ({raw['answer']!r:.60})"
        raise DataError.at(where, names["reply"], expected, reply, "keep one of the two")
    others = {key: value for key, value in record.items() if key not in used}
    groups = groups_of(record, used) if format == "video-r1" else {}
    raw["meta"] = meta | ({"source": others} if others else {}) | ({"groups": groups} if groups else {})
    return raw, names


def _settle_task(
    raw: dict[str, Any], names: dict[str, str], where: str, task_type: str, *, prose: bool
) -> dict[str, bool]:
    """Infer a missing task type, options or answer from the others; return notes for the record's meta.

    Args:
        prose: whether the answer is a reply, in which "A. tea is poured" may give a letter.
    """
    listed = None if raw.get("options") else find_options(raw["question"])
    options = raw.get("options") or (listed[1] if listed else [])
    options = list(options.values()) if isinstance(options, dict) else options
    answer = raw.get("answer")
    task = raw.get("task_type", task_type)
    inferred = task == "auto"
    if inferred or task == _MATH:
        is_choice = (
            raw.get("options")
            or (looks_like_a_letter(answer) and shows_options(raw["question"]))
            or (listed and names_an_option(answer, listed[1]))
        )
        by_answer = "mcq" if is_choice else infer_task(answer)
        if task == _MATH and by_answer not in ("mcq", "numeric"):
            expected = "a number, or the letter of an option in the record, since its type is math"
            todo = "write it in this form, without formula markup, or leave the record out"
            raise DataError.at(where, names["answer"], expected, answer, todo)
        task = by_answer
    if task == _YES_NO:
        task = "mcq"
        if not options:
            options = raw["options"] = ["Yes", "No"]
            if not is_yes_or_no(answer):
                todo = "give the record its options"
                raise DataError.at(where, names["answer"], "Yes or No, since there are no options", answer, todo)
    raw["task_type"] = task
    if task == "mcq" and listed:
        raw["question"], raw["options"] = listed
    if task == "mcq" and prose and (letter := letter_of_reply(answer, options)):
        # The text is included because options may be letters themselves.
        raw["answer"] = f"{letter}. {bare_options(options)[ord(letter) - ord('A')]}"
    return {"inferred": True} if inferred else {}


def _meaning(answer: object, raw: dict[str, Any]) -> object:
    """Return a value that is equal for all spellings of an answer: "B" and "B. milk", 2 and "2"."""
    options = raw.get("options") or None
    options = list(options.values()) if isinstance(options, dict) else options
    if raw["task_type"] == "mcq" and options and (letter := letter_of_reply(answer, options)):
        return fold_text(letter)
    try:
        value = parse_answer_body(read_ground_truth(answer, raw["task_type"], options), raw["task_type"], options)
        return fold_text(value) if isinstance(value, str) else value
    # The answer fits another task type, or the options have a wrong type. The check of the record reports it.
    except (GroundTruthError, TypeError, ValueError):
        return fold_text(str(answer))


def _convert_own(record: dict[str, Any], where: str) -> Converted:
    """Convert a record in this package's own format; `video` may replace `videos`, and a path may replace a list.

    Empty lists are kept only if both are there, which makes a question about text alone.
    """
    names = {}
    about_text = record.get("videos") == [] == record.get("images") and not (record.get("video") or record.get("image"))
    for ours, other in (("videos", "video"), ("images", "image")):
        name = _agreed_key(record, (ours, other), where, _listed)
        values = _listed(record[name]) if name else []
        record = {key: value for key, value in record.items() if key not in (ours, other)}
        if name:
            record[ours], names[ours] = values, name
    return (record | {"videos": [], "images": []} if about_text else record), names


def _listed(value: Any) -> list[Any]:
    """Return media as a list; a single path becomes a list of one."""
    return value if isinstance(value, list) else [value]


def _agreed_key(record: dict[str, Any], keys: tuple[str, ...], where: str, read=lambda value: value) -> str | None:
    """Return the first key that a record has, of several keys with the same meaning.

    Raises:
        DataError: the record has two of them, and the values returned by `read` differ.
    """
    present = [key for key in keys if record.get(key) not in (None, [], "")]
    for key in present[1:]:
        if read(record[key]) != read(record[present[0]]):
            expected = f"the same as '{present[0]}' ({read(record[present[0]])!r:.60})"
            raise DataError.at(where, key, expected, record[key], "keep one of the two")
    return present[0] if present else None


def _chat(record: dict[str, Any], where: str, key: str) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    speaker_key, text_key = ("from", "value") if key == "conversations" else ("role", "content")
    used = {key, "query", "response", "history", "id", "answer", "solution", "task_type", *_EXTRA}
    turns = record.get(key)
    names = {"question": key, "reply": key}
    if turns is None and "query" in record:
        names = {"question": "query", "reply": "response"}
        turns = [{speaker_key: "user", text_key: record["query"]}]
        turns += [{speaker_key: "assistant", text_key: record["response"]}] if "response" in record else []
    elif "response" in record:
        raise DataError.at(where, "response", f"no value next to '{key}'", record["response"], "keep one of the two")
    if record.get("history"):
        raise DataError.at(where, "history", "one question and its answer", record["history"], _SPLIT_TURNS)
    if not isinstance(turns, list):
        raise DataError.at(where, key, "a list of turns", turns, f"write [{{{speaker_key!r}: …, {text_key!r}: …}}]")
    media: dict[str, list[Any]] = {"videos": [], "images": []}
    system, question, reply = _turns(turns, where, key, (speaker_key, text_key), media)
    raw: dict[str, Any] = {"question": question}
    for ours, other in (("videos", "video"), ("images", "image")):
        name = _agreed_key(record, (ours, other), where, _listed)
        if name and media[ours] and _listed(record[name]) != media[ours]:
            raise DataError.at(
                where, name, f"no files, or those in the parts of '{key}'", record[name], "list them only once"
            )
        if name or media[ours]:
            raw[ours] = _listed(record[name]) if name else media[ours]
            names[ours] = name or key
        used |= {ours, other}
    if "<bbox>" in question + (reply or "") or "<ref-object>" in question + (reply or ""):
        todo = "write the numbers from 'objects' into the text"
        raise DataError.at(where, key, "boxes as numbers", "marks <bbox> or <ref-object>", todo)
    name = _agreed_key(record, ("answer", "solution"), where, _inside_answer)
    names["answer"] = name or names["reply"]
    reply = _inside_answer(reply)
    raw["answer"] = _inside_answer(record[name]) if name else reply
    if name and reply is not None:
        raw["reply"] = reply
    raw |= {name: record[name] for name in ("id", "task_type", *_EXTRA) if name in record}
    if system:
        _agreed_key({"system": record.get("system"), key: system}, ("system", key), where, _stripped)
        raw.setdefault("system", system)
    return raw, names, used


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _turns(
    turns: list[Any], where: str, key: str, turn_keys: tuple[str, str], media: dict[str, list[Any]]
) -> tuple[str | None, str, str | None]:
    """Return the system text, the user's text and the assistant's text. Media of content parts are added to `media`."""
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
            expected = f"{speaker_key!r} to be one of system, {', '.join(_USER)}, {', '.join(_ASSISTANT)}"
            raise DataError.at(where, f"{name}.{speaker_key}", expected, speaker, "fix the turn")
    if len(users) != 1 or len(replies) > 1:
        got = f"{len(users)} user and {len(replies)} assistant turns"
        raise DataError(
            f"{where}: field '{key}': expected one user turn and at most one answer, got {got}; {_SPLIT_TURNS}"
        )
    return "\n".join(system) or None, users[0], replies[0] if replies else None


def _part(part: Any, where: str, name: str, media: dict[str, list[Any]]) -> str:
    """Return the text of one content part; for a medium, its mark."""
    if isinstance(part, dict):
        # Tables give every part the keys of all parts.
        part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("video", "image") and kind in part:
        if unknown := sorted(set(part) - {"type", kind, "video_start", "video_end"}):
            todo = "set frames and pixels for the whole run (video.*) and remove the key"
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
    names = {"question": "problem", "kind": "problem_type"}
    used = {"problem", "data_type", "solution", "answer", "path", "task_type", *_EXTRA}
    names["answer"] = _agreed_key(record, ("solution", "answer"), where, _inside_answer) or "solution"
    answer = record.get(names["answer"])
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        raise DataError.at(where, names["answer"], "text such as '<answer>B</answer>'", answer, "fix it")
    raw: dict[str, Any] = {"question": problem, "answer": _inside_answer(answer)}
    raw |= {name: record[name] for name in _EXTRA if name in record}
    raw["answer"] = tagged_letter(answer, raw.get("options")) or raw["answer"]
    # If there is a `problem_id`, `id` has a different meaning and is stored in the meta.
    names["id"] = "problem_id" if "problem_id" in record else "id"
    if names["id"] in record:
        raw["id"] = record[names["id"]]
        used.add(names["id"])
    keys = {"videos": ("videos", "video"), "images": ("images", "image", "image_path")}
    used |= {*keys["videos"], *keys["images"]}
    has_media = any(record.get(key) for key in (*keys["videos"], *keys["images"]))
    if "path" in record or not has_media:
        if data_type not in ("video", "image"):
            raise DataError.at(
                where, "data_type", "'video' or 'image'", data_type, "state the type of the file at 'path'"
            )
        if not record.get("path"):
            raise DataError.at(where, "path", "paths of media", record.get("path"), "add it")
        keys[f"{data_type}s"] = ("path", *keys[f"{data_type}s"])
    for ours, theirs in keys.items():
        if name := _agreed_key(record, theirs, where, _listed):
            raw[ours], names[ours] = _listed(record[name]), name
    raw["question"] = with_video_marks(problem, len(raw.get("videos", ())), len(raw.get("images", ())))
    if task := _task_of(kind, record.get("task_type"), where):
        raw["task_type"] = task
    return raw, names, used


def _task_of(kind: object, named: object, where: str) -> object:
    """Return the task type of a record with this `problem_type` and `task_type`; None if it has neither.

    Raises:
        DataError: the two differ, or the record has only a `problem_type` that maps to no task type.
    """
    task = _PROBLEM_TYPES.get(" ".join(re.split(r"[\s_-]+", kind.strip().lower()))) if isinstance(kind, str) else None
    if kind is None or (task is None and named is not None):
        return named
    if task is None:
        raise _no_task(where, "problem_type", kind)
    if named is not None and named not in _TASKS_OF.get(task, (task,)):
        expected = f"the task type of its 'problem_type' {kind!r:.60}, {' or '.join(_TASKS_OF.get(task, (task,)))}"
        raise DataError.at(where, "task_type", expected, named, "keep one of the two")
    # Yes/no questions may need their options set.
    return named if named is not None and task != _YES_NO else task


def _no_task(where: str, name: str, kind: object) -> DataError:
    expected = (
        "one of multiple choice, numerical, regression, OCR, free-form, open-ended, temporal grounding, spatial "
        "grounding, boolean, math (a letter or a number)"
    )
    todo = "leave out questions that no task type can grade, or name the type"
    return DataError.at(where, name, expected, kind, todo)


def _inside_answer(text: Any) -> Any:
    """Return the text inside one `<answer>…</answer>`, None for an empty text, and anything else unchanged."""
    if not isinstance(text, str):
        return text
    blocks = _ANSWER.findall(text)
    return (blocks[0] if len(blocks) == 1 else text).strip() or None
