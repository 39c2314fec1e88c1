"""Read what other projects tell a teacher and not the student: their fields become `hints` of a question.

===================  =====================================  ==========================================================
field                of                                     hint
===================  =====================================  ==========================================================
`teacher_prompt`     ms-swift (OPSD): text, or turns        `context`: its last user text without the student's
`teacher_images`     ms-swift (OPSD): image files           `media`
`privileged_context` TRL (SDFT): text                       `context`
`key_frames`         STGR (Open-o3 Video, VISD): objects    `keyframes`: their times
                     with `time`
`key_items`          STGR: objects by frame, with their     `cue`: their names
                     names as keys
===================  =====================================  ==========================================================
"""

from __future__ import annotations

from typing import Any

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.marks import without_marks
from rmsd_fast.data.media_paths import is_number
from rmsd_fast.method.hints import MEDIA_VIEW

HINT_KEYS = ("teacher_prompt", "teacher_images", "privileged_context", "key_frames", "key_items")


def convert_hints(record: dict[str, Any], raw: dict[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """Return the hints of a record, with those under its key `hints`, and the other keys that were read.

    Args:
        record: the record without nulls.
        raw: the record in this package's schema, with the student's text under `question`.
        where: "<file>:<line>".
    Raises:
        DataError: a field has another form, or states a hint that the record also states elsewhere.
    """
    found: list[tuple[str, str, Any]] = []
    if "teacher_prompt" in record:
        found.append(("teacher_prompt", "context", _added_text(record["teacher_prompt"], raw["question"], where)))
    if "privileged_context" in record:
        found.append(("privileged_context", "context", record["privileged_context"]))
    if "teacher_images" in record:
        found.append(("teacher_images", MEDIA_VIEW, _images(record["teacher_images"], raw, where)))
    frames, items = record.get("key_frames"), record.get("key_items")
    # Other data sets use these names for other things, which stay in the record's meta.
    if isinstance(frames, list) and all(isinstance(frame, dict) and is_number(frame.get("time")) for frame in frames):
        found.append(("key_frames", "keyframes", sorted({frame["time"] for frame in frames}) or None))
    if isinstance(items, dict) and all(isinstance(objects, dict) for objects in items.values()):
        names = dict.fromkeys(name.strip() for objects in items.values() for name in objects)
        found.append(("key_items", "cue", ", ".join(filter(None, names)) or None))
    hints = record.get("hints")
    if not found or (hints is not None and not isinstance(hints, dict)):
        return ({} if hints is None else hints), set()
    hints = dict(hints or {})
    for key, name, hint in found:
        if hint is not None and hints.setdefault(name, hint) != hint:
            raise DataError.at(where, key, f"no other hint '{name}'", hints[name], "keep one of the two")
    return hints, {key for key, _, _ in found}


def _added_text(value: object, question: str, where: str) -> str | None:
    """Return what a teacher's prompt adds to the student's question; None if it adds nothing."""
    if isinstance(value, list):
        users = [turn.get("content") for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        value = users[-1] if users else None
        if isinstance(value, list):
            value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    if not isinstance(value, str):
        raise DataError.at(where, "teacher_prompt", "a text, or turns with a user's text", value, "fix it")
    asked, prompt = without_marks(question), without_marks(value)
    before, found, after = prompt.partition(asked)
    if not found:
        todo = "write what it adds under hints.context"
        raise DataError.at(where, "teacher_prompt", "a text that contains the user's turn", value, todo)
    return "\n".join(filter(None, (before.strip(), after.strip()))) or None


def _images(value: object, raw: dict[str, Any], where: str) -> dict[str, Any]:
    if raw.get("videos"):
        expected = "none in a record with videos, since it does not say whether the teacher is shown them too"
        raise DataError.at(where, "teacher_images", expected, value, "write the teacher's files under hints.media")
    return {"images": value if isinstance(value, list) else [value]}
