"""Handle marks in a question's text: `<image>` and `<video>` show the positions of the media and are not text.

If a text has no marks, its media come before it, videos first. `<IMAGE>`, numbered marks in order (`<image_1>`, `<image
2>`) and the model family's own `<|vision_start|><|image_pad|><|vision_end|>` are also accepted. A mark with any other
whitespace inside is treated as text, as in a question about HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rmsd_fast.data.errors import counted

MARK = re.compile(r"<(image|video)>")
# The spelling of special tokens. Inside a question's text, the tokenizer would not read them as text.
SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_SPELLINGS = re.compile(
    r"<\|vision_start\|><\|(?P<token>image|video)_pad\|><\|vision_end\|>"
    r"|<(?P<name>image|video)(?:[ _-]?(?P<number>\d+))?/?>",
    re.IGNORECASE,
)


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode. JSON can contain lone surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mark_kinds(text: str) -> list[str]:
    """Return the kinds of the marks in a text, in any spelling, in order."""
    return [(match["token"] or match["name"]).lower() for match in _SPELLINGS.finditer(text)]


def without_marks(text: str) -> str:
    """Return a text without its marks, in any spelling, and without white space at its ends."""
    return _SPELLINGS.sub("", text).strip()


class MarkError(ValueError):
    """The marks do not match the files. The message lists the marks and says what to do."""


def with_video_mark(text: str) -> str:
    """Return the text of a record with one video and no other media, with its only `<image>` rewritten to `<video>`.

    LLaVA-Video marks videos this way. Any other text is returned unchanged, for `place_marks` to check.
    """
    marks = list(_SPELLINGS.finditer(text))
    if len(marks) != 1 or marks[0][0].lower() != "<image>":
        return text
    return text[: marks[0].start()] + "<video>" + text[marks[0].end() :]


def place_marks(texts: Sequence[str], *, videos: int, images: int) -> list[str]:
    """Return the texts with every mark as `<image>` or `<video>`, or without marks if all media come first anyway.

    Args:
        texts: parts of a prompt in order: the question, then its options.
        videos, images: number of files.
    Raises:
        MarkError: there are marks, but not exactly one for each file.
    """
    marks = [match for text in texts for match in _SPELLINGS.finditer(text)]
    if not marks:
        return list(texts)
    kinds = [(match["token"] or match["name"]).lower() for match in marks]
    wanted = ["video"] * videos + ["image"] * images
    if sorted(kinds) != sorted(wanted):
        got = f"{kinds.count('video')} <video> and {kinds.count('image')} <image>"
        raise MarkError(
            f"expected one mark for each of {counted(videos, 'video')} and {counted(images, 'image')}, got {got}; fix "
            "the marks or the files, or remove the marks (media then come before the text)"
        )
    for kind in ("image", "video"):
        written = [match["number"] for match, its_kind in zip(marks, kinds, strict=True) if its_kind == kind]
        numbers = [int(number) for number in written if number]
        if numbers and numbers != list(range(1, len(written) + 1)):
            got = ", ".join(map(str, numbers))
            raise MarkError(
                f"expected {kind} marks numbered 1 to {len(written)} in this order, got {got}; "
                f"reorder the files, or write <{kind}> at the position of each of them"
            )
    next_kinds = iter(kinds)
    placed = [_SPELLINGS.sub(lambda _: f"<{next(next_kinds)}>", text) for text in texts]
    front = re.match(r"\s*(?:<(?:image|video)>\s*)*", placed[0])[0]
    if MARK.findall(front) == wanted:
        placed[0] = placed[0][len(front) :]
    return placed
