"""Sample cards of the report: frames, question, options, ground truth and the students' answers side by side.

Everything shown here was written by a model or stands in a data file: it is escaped, and tags in it stay visible text.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

# Fewer would miss what is seen for a second or two of a short clip.
FRAMES_PER_SAMPLE = 8
MAX_THUMBNAIL_PX = 240
MAX_CARDS = 40
STUDENT_ORDER = ("untrained", "stage1", "stage2")
_TAGS = re.compile(r"(</?(?:think|answer)>)")
# Control characters other than tab and newline, and lone surrogates, which UTF-8 cannot carry.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(value: object) -> str:
    """Untrusted text as HTML: escaped, characters that cannot be shown replaced by U+FFFD."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n")), quote=True)


def thumbnails(path: str, count: int = FRAMES_PER_SAMPLE) -> list[tuple[str, str]]:
    """Evenly spaced frames of a video, or the picture itself, as ("data:image/jpeg;base64,...", caption).

    Raises:
        OSError, RuntimeError, ValueError, ImportError: the file or its decoder is missing, or it cannot be read.
    """
    from PIL import Image

    from rmsd_fast.data.video import read_preview

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    frames, times = read_preview(path, count)
    captions = [f"{time:.1f} s" for time in times] or ["picture"]
    return [(_jpeg(Image.fromarray(frame)), caption) for frame, caption in zip(frames, captions, strict=True)]


def _jpeg(image: object) -> str:
    image.thumbnail((MAX_THUMBNAIL_PX, MAX_THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _frames(paths: Sequence[str], cache: dict[str, str]) -> str:
    if not paths:
        return '<div class="frames"><figure class="lone"><div class="gone">no media recorded</div></figure></div>'
    return "".join(f'<div class="frames">{_media(str(path), cache)}</div>' for path in paths)


def _media(path: str, cache: dict[str, str]) -> str:
    if path in cache:
        return cache[path]
    try:
        shown = "".join(
            f'<figure><img src="{source}" alt="{visible(Path(path).name)}, {visible(caption)}" loading="lazy">'
            f"<figcaption>{visible(caption)}</figcaption></figure>"
            for source, caption in thumbnails(path)
        )
    # The media may have gone since the run, or no decoder is installed here: the page is still worth having.
    except (OSError, RuntimeError, ValueError, ImportError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        shown = (
            f'<figure class="lone"><div class="gone">no frames of {visible(Path(path).name)}: {visible(reason)}</div>'
            "</figure>"
        )
    cache[path] = shown
    return shown


def response_html(text: str) -> str:
    """A response with its tags muted and the text inside <answer> bold."""
    out, inside = [], False
    for part in _TAGS.split(text):
        if _TAGS.fullmatch(part):
            inside = part == "<answer>"
            out.append(f'<span class="tag">{escape(part)}</span>')
        elif part:
            out.append(f"<b>{visible(part)}</b>" if inside else visible(part))
    return "".join(out)


def _answer(name: str, row: Mapping[str, object]) -> str:
    if row.get("error"):
        fault = f'<p class="text">not asked: {visible(row["error"])}</p>'
        return f'<div class="answer bad"><header><b>{visible(name)}</b></header>{fault}</div>'
    score = row.get("score")
    if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
        # The bounds are those of the colour only: full marks, and less than what the teacher filter (0.3) keeps.
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
    for index, option in enumerate(options):
        mark = chr(ord("A") + index)
        text = str(option)
        # Options may be written bare or with their letter.
        shown = text if re.match(rf"\(?{mark}[.):]", text) else f"{mark}. {text}"
        body = visible(shown)
        items.append(f"<li><b>{body}</b> (true)</li>" if mark == letter else f"<li>{body}</li>")
    return f'<ul class="options" style="list-style:none">{"".join(items)}</ul>'


def sample_cards(rows: Sequence[Mapping[str, object]], names: Mapping[str, str]) -> str:
    """Cards, one per question, in the order of the file.

    Args:
        rows: lines of samples.jsonl.
        names: how each student is called on the page, by its key.
    """
    groups: dict[str, list[Mapping[str, object]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("id", "")), []).append(row)
    cache: dict[str, str] = {}
    order = {student: i for i, student in enumerate(STUDENT_ORDER)}
    cards = []
    for identity, group in list(groups.items())[:MAX_CARDS]:
        first = group[0]
        paths = [*(first.get("videos") or ()), *(first.get("images") or ())]
        group = sorted(group, key=lambda row: order.get(str(row.get("student")), len(order)))
        answers = "".join(_answer(names.get(str(r.get("student")), str(r.get("student"))), r) for r in group)
        truth = first.get("answer")
        cards.append(
            f'<article class="card sample"><div><span class="badge">{visible(first.get("task_type", ""))}</span>'
            f'<span class="muted small">{visible(identity)}</span></div>{_frames(paths, cache)}'
            f'<p class="text"><b>{visible(first.get("question", ""))}</b></p>{_options(first.get("options"), truth)}'
            f'<p class="small">Ground truth: {"none (open question)" if truth is None else visible(truth)}</p>'
            f'<div class="answers">{answers}</div></article>'
        )
    more = len(groups) - len(cards)
    tail = f'<p class="muted">{more} more questions are in samples.jsonl.</p>' if more > 0 else ""
    return "".join(cards) + tail
