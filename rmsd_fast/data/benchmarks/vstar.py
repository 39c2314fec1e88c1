"""V-STaR (arXiv 2503.11495): what, when and where, in two chains. A record becomes five questions.

Annotation: `V_STaR_test.json` of V-STaR-Bench/V-STaR. Chain 1 asks what, when1 and where1, and chain 2 what, where2 and
when2. Later prompts contain the annotated times and boxes of earlier ones, as in the published script.

The published script lets a language model grade the answers to what. Here, this needs `evaluate.judge`; otherwise,
rules score them.
Source of prompts and metrics: V-STaR-Bench/V-STaR, inference_demo.py and eval.py at 1894682.
"""

from __future__ import annotations

import json
import math

from rmsd_fast.data.benchmarks.record import Record
from rmsd_fast.data.media_paths import is_number
from rmsd_fast.data.records import Question

PATTERNS = ("**/V_STaR_test.json", "**/V*STaR*.json")
# Records; each is five questions.
COUNTS = (2094 * 5,)
IGNORED = {"chain", "object"}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
ASKS = ("what", "when1", "where1", "where2", "when2")
_INDENT = " " * 20
_WHAT = (
    "Answer the question about the video: {question} \n (If the answer is a person, you don't need to identify the "
    "person.)"
)
_WHEN_1 = (
    "This video is {length} seconds long. Answer the question about the video: {question} \n Output the start and end "
    "moment timestamps."
)
_WHEN_2 = (
    "This video is {length} seconds long with a resolution of {width}x{height} (width x height). Answer the question "
    "about the video: {question} \n There are {count} bounding boxes of the key object related to the question in the "
    "video without knowing the time, which are:{boxes}. Output the start and end moment timestamps."
)
_WHERE = (
    "Please answer the question about the video: {question} with a series of bounding boxes in [x1, y1, x2, y2] "
    f"format. \n\n{_INDENT}"
)
_WHERE_1 = (
    f"{_WHERE}For each whole second within the time range {{seconds}} provided (inclusive of the boundaries), output a "
    "series of bounding boxes of the object in JSON format. The keys should be the whole seconds (as strings), and the "
    f"values should be the box in [x1, y1, x2, y2] format.\n{_INDENT}"
    f'Example output: {{{{"{{first}}": [x1, y1, x2, y2],...}}}}\n{_INDENT}'
)
_WHERE_2 = (
    f"{_WHERE}For each whole second that may related to the question, output a series of bounding boxes of the object "
    "in JSON format. You only need to output {count} bbox(es). You need to determine which frame is related to the "
    "question, and you don't need to output the bbox for the frames not related to the question.\n"
    f"{_INDENT}The keys should be the whole seconds (as strings), and the values should be the bounding box in "
    f"[x0,y0,x1,y1] format. \n{_INDENT}"
    f'\n Example output:\n{_INDENT}{{{{"0": [x0,y0,x1,y1], "1":..., ..., "{{count}}":...}}}} '
    f"(if the frames at 0~{{count}} second are related to the questions)\n{_INDENT}"
)


def read(record: Record) -> list[Question]:
    """Return the five questions of a record, with ids `<vid>#<n>/what` and so on."""
    video = str(record.need("vid"))
    domain = record.label("domain")
    path = record.medium("vid", [f"{video}.mp4"], [f"videos/{video}.mp4", f"{domain}/{video}.mp4"])
    length = round(record.number("frame_count", least=1) / record.number("fps", least=1e-3), 2)
    groups = {"duration": "short" if length < 60 else "medium" if length < 180 else "long"}
    groups |= record.groups(domain=domain)
    identity = record.nth(video)
    return [
        record.question(
            f"{identity}/{ask}",
            text,
            task,
            videos=(path,),
            answer=answer,
            duration=length,
            prompt=prompt,
            meta={"groups": {"ask": ask, **groups}},
        )
        for ask, (text, task, answer, prompt) in _asks(record, length).items()
    ]


def _asks(record: Record, length: float) -> dict[str, tuple[str, str, str, str]]:
    """Return, for each ask, the question in this package's words, its task type, its answer and the benchmark's prompt.

    Args:
        record: the record.
        length: duration of the video, in seconds.
    """
    size = int(record.number("width", least=1)), int(record.number("height", least=1))
    start, end = _times(record)
    seconds = list(range(math.ceil(start), math.floor(end) + 1)) or [math.ceil(start)]
    boxes = _boxes(record)
    corners = [[box[name] for name in _CORNERS] for box in boxes]
    relative = [[round(1000 * value / side) for value, side in zip(box, size * 2, strict=True)] for box in corners]
    what, when = record.text("question"), record.text("temporal_question")
    where_1, where_2 = record.text("spatial_question"), record.text("spatial_question_2")
    shown = {"length": length, "width": size[0], "height": size[1], "seconds": seconds, "first": seconds[0]}
    shown |= {"count": len(boxes), "boxes": corners}
    interval, truth = f"{start:.10g} to {end:.10g}", _truth(boxes, size)
    own = {
        "where1": f"{where_1} Give one box for each of the seconds {seconds}.",
        "where2": f"{where_2} Give {len(boxes)} boxes, each with its whole second.",
        "when2": f"{when} These are boxes of the object, from 0 to 1000 and without their times: {relative}.",
    }
    return {
        "what": (what, "exact", record.plain_answer("answer"), _WHAT.format(question=what)),
        "when1": (when, "temporal", interval, _WHEN_1.format(question=when, **shown)),
        "where1": (own["where1"], "boxes", truth, _WHERE_1.format(question=where_1, **shown)),
        "where2": (own["where2"], "boxes", truth, _WHERE_2.format(question=where_2, **shown)),
        "when2": (own["when2"], "temporal", interval, _WHEN_2.format(question=when, **shown)),
    }


def _times(record: Record) -> tuple[float, float]:
    times = record.list("timestamps") or []
    if len(times) != 2 or not all(map(is_number, times)) or times[1] <= times[0]:
        raise record.fail("timestamps", "[start, end] in seconds", times, "download the annotation again")
    return float(times[0]), float(times[1])


def _boxes(record: Record) -> list[dict]:
    boxes = record.list("bboxes") or []
    keys = {"timestamp", *_CORNERS}
    if not boxes or not all(
        isinstance(box, dict) and keys <= set(box) and all(is_number(box[name]) for name in keys) for box in boxes
    ):
        raise record.fail("bboxes", f"boxes with {', '.join(sorted(keys))}", boxes, "download the annotation again")
    return boxes


def _truth(boxes: list[dict], size: tuple[int, int]) -> str:
    """Return the boxes by second as JSON, from 0 to 1000. A second may have several boxes."""
    by_second: dict[str, list] = {}
    for box in boxes:
        corners = zip(_CORNERS, size * 2, strict=True)
        second = box["timestamp"]
        # Answers name whole seconds, which are compared as text.
        second = int(second) if second == int(second) else second
        by_second.setdefault(str(second), []).append([1000 * box[name] / length for name, length in corners])
    return json.dumps(by_second)
