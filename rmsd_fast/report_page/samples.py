"""Render the sample cards: frames, question, options, ground truth and the students' answers side by side.

All text shown here comes from a model or a data file. It is escaped, so tags in it are visible text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rmsd_fast.config import STUDENTS
from rmsd_fast.method.answers import bare_options, option_letters
from rmsd_fast.report_page.films import Film, Films
from rmsd_fast.report_page.marks import (
    TRUTH,
    Mark,
    box_overlay,
    mark_key,
    response_mark,
    time_line,
    truth_mark,
)
from rmsd_fast.report_page.text import visible

MAX_CARDS = 40
STUDENT_ORDER = STUDENTS
# Series colors of the students' marks, as in the charts.
STUDENT_COLORS, OTHER_COLOR = {"untrained": 6, "stage1": 1, "stage2": 2, "control": 4}, 5
_TAGS = re.compile(r"(</?(?:think|answer)>)")


def film_strip(
    row: Mapping[str, object],
    marks: Sequence[Mark],
    names: Mapping[str, str],
    films: Films,
) -> str:
    """Return the frames of a question's media, with boxes over them and intervals on a timeline below.

    Args:
        row: a line of samples.jsonl or rollouts.jsonl; its `videos`, `images`, `spans` and `duration` are read.
        marks: the answers to draw.
        names: name of each color, for the legend.
        films: reader of the media.
    """
    media = [(str(path), True, _span(row, index)) for index, path in enumerate(row.get("videos") or ())]
    media += [(str(path), False, None) for path in row.get("images") or ()]
    if not media:
        return '<div class="frames"><figure class="lone"><div class="gone">no media recorded</div></figure></div>'
    if row.get("error"):
        # The run could not read these files, so they are not read again.
        return (
            f'<div class="frames"><figure class="lone"><div class="gone">{visible(row["error"])}</div></figure></div>'
        )
    if len(media) > 1:
        # Boxes and intervals are not drawn, because it is unknown which file an answer refers to.
        return "".join(
            _strip(path, films.read(path, is_video=is_video, span=span), "") for path, is_video, span in media
        )
    ((path, is_video, span),) = media
    film = films.read(path, is_video=is_video, span=span)
    overlay = box_overlay(marks)
    length = film.seconds or row.get("duration")
    times = time_line(marks, length if is_number(length) else None, span)
    return _strip(path, film, overlay) + (mark_key(marks, names) if overlay and film.shots else "") + times


def _strip(path: str, film: Film, overlay: str) -> str:
    name = visible(Path(path).name)
    shots = [
        f'<figure><div class="shot"><img src="{source}" alt="{name}, {visible(caption)}" loading="lazy">{overlay}</div>'
        f"<figcaption>{visible(caption)}</figcaption></figure>"
        for source, caption in film.shots
    ]
    if film.fault:
        fault = f"no frames of {name}: {visible(film.fault)}"
        shots = [f'<figure class="lone"><div class="gone">{fault}</div></figure>']
    return f'<div class="frames">{"".join(shots)}</div>'


def _span(row: Mapping[str, object], index: int) -> tuple[float | None, float | None] | None:
    """Return the part of the video with this index that the question shows, in seconds; None = all of it."""
    spans = row.get("spans")
    span = spans[index] if isinstance(spans, list) and index < len(spans) else None
    if not (isinstance(span, list) and len(span) == 2 and all(at is None or is_number(at) for at in span)):
        return None
    return span[0], span[1]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def response_html(text: str) -> str:
    """Return a response as HTML, with muted tags and the text inside <answer> in bold."""
    out, inside = [], False
    for piece in _TAGS.split(text):
        if _TAGS.fullmatch(piece):
            inside = piece == "<answer>"
            out.append(f'<span class="tag">{escape(piece)}</span>')
        elif piece:
            out.append(f"<b>{visible(piece)}</b>" if inside else visible(piece))
    return "".join(out)


def _answer(name: str, row: Mapping[str, object]) -> str:
    if row.get("error"):
        fault = f'<p class="text">not asked: {visible(row["error"])}</p>'
        return f'<div class="answer bad"><header><b>{visible(name)}</b></header>{fault}</div>'
    score = row.get("score")
    if is_number(score):
        # Thresholds of the colors only: a full score, and less than the default quality threshold of the teacher (0.3).
        kind = "good" if score >= 0.995 else "bad" if score < 0.3 else "part"
        what = f"score {score:.2f}"
    else:
        kind, what = "", "not scored"
    extra = " · format broken" if row.get("valid") is False else ""
    return (
        f'<div class="answer {kind}"><header><b>{visible(name)}</b><span>{escape(what + extra)}</span></header>'
        f'<pre class="text">{response_html(str(row.get("response", ""))) or "(empty)"}</pre></div>'
    )


def _options(options: Sequence[object] | None, answer: object) -> str:
    if not options:
        return ""
    letter = str(answer or "").strip().strip("().[]").upper()
    items = []
    for mark, option in zip(option_letters(options), bare_options([str(option) for option in options]), strict=True):
        body = visible(f"{mark}. {option}")
        items.append(f"<li><b>{body}</b> (true)</li>" if mark == letter else f"<li>{body}</li>")
    return f'<ul class="options" style="list-style:none">{"".join(items)}</ul>'


def question_html(row: Mapping[str, object]) -> str:
    """Return the question as HTML with its options and its ground truth."""
    truth = row.get("answer")
    missing = "none (open question)" if row.get("task_type") == "open" else "none"
    return (
        f'<p class="text"><b>{visible(row.get("question", ""))}</b></p>{_options(row.get("options"), truth)}'
        f'<p class="small">Ground truth: {missing if truth is None else visible(truth)}</p>'
    )


def sample_cards(rows: Sequence[Mapping[str, object]], names: Mapping[str, str], films: Films) -> str:
    """Return one card per question, in the order of the file.

    Args:
        rows: lines of samples.jsonl.
        names: each student's name on the page, by key.
        films: reader of the media.
    """
    groups: dict[str, list[Mapping[str, object]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("id", "")), []).append(row)
    order = {student: i for i, student in enumerate(STUDENT_ORDER)}
    cards = []
    for identity, group in list(groups.items())[:MAX_CARDS]:
        group = sorted(group, key=lambda row: order.get(str(row.get("student")), len(order)))
        first, task = group[0], str(group[0].get("task_type", ""))
        marks, colors = truth_mark(task, first.get("answer")), {TRUTH: "ground truth"}
        for row in group:
            student = str(row.get("student"))
            color = STUDENT_COLORS.get(student, OTHER_COLOR)
            colors[str(color)] = names.get(student, student)
            marks += response_mark(names.get(student, student), color, task, row.get("response"))
        answers = "".join(_answer(names.get(str(r.get("student")), str(r.get("student"))), r) for r in group)
        cards.append(
            f'<article class="card sample"><div><span class="badge">{visible(task)}</span>'
            f'<span class="muted small">{visible(identity)}</span></div>'
            f"{film_strip(first, marks, colors, films)}{question_html(first)}"
            f'<div class="answers">{answers}</div></article>'
        )
    more = len(groups) - len(cards)
    tail = f'<p class="muted">{more} more questions are in samples.jsonl.</p>' if more > 0 else ""
    return "".join(cards) + tail
