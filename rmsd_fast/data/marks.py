"""Marks in a question's text, which are not text: `<image>` and `<video>` stand where the media do.

A text without marks has its media in front of it, videos first. Read are also `<IMAGE>`, numbered marks in their order
(`<image_1>`, `<image 2>`) and the family's own `<|vision_start|><|image_pad|><|vision_end|>`. Other blanks inside make
them text, as in a question about HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rmsd_fast.data.errors import counted

MARK = re.compile(r"<(image|video)>")
# How tokenizers spell their special tokens. In a text of ours they would not be read as text.
SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_SPELLINGS = re.compile(
    r"<\|vision_start\|><\|(?P<token>image|video)_pad\|><\|vision_end\|>"
    r"|<(?P<name>image|video)(?:[ _-]?(?P<number>\d+))?/?>",
    re.IGNORECASE,
)


def is_unicode(text: str) -> bool:
    """Whether a text is whole: JSON can carry lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class MarkError(ValueError):
    """Marks that do not fit the files. The message says which there are and what to do."""


def with_video_mark(text: str) -> str:
    """The text of a record with one video and nothing else, its one `<image>` written `<video>`.

    LLaVA-Video marks its video so. Anything else comes back as it is, for `place_marks` to judge.
    """
    marks = list(_SPELLINGS.finditer(text))
    if len(marks) != 1 or marks[0][0].lower() != "<image>":
        return text
    return text[: marks[0].start()] + "<video>" + text[marks[0].end() :]


def place_marks(texts: Sequence[str], *, videos: int, images: int) -> list[str]:
    """The texts with every mark as `<image>` or `<video>`, and none where all media stand in front anyway.

    Args:
        texts: the parts of a prompt in order: the question, then its options.
        videos, images: number of files.
    Raises:
        MarkError: there are marks, and not one for each file.
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
            "the marks or the files, or write no marks "
            "(media then stand in front)"
        )
    for kind in ("image", "video"):
        written = [match["number"] for match, its_kind in zip(marks, kinds, strict=True) if its_kind == kind]
        numbers = [int(number) for number in written if number]
        if numbers and numbers != list(range(1, len(written) + 1)):
            got = ", ".join(map(str, numbers))
            raise MarkError(
                f"expected {kind} marks numbered 1 to {len(written)} in this order, got {got}; "
                f"reorder the files, or write <{kind}> where each of them stands"
            )
    next_kinds = iter(kinds)
    placed = [_SPELLINGS.sub(lambda _: f"<{next(next_kinds)}>", text) for text in texts]
    front = re.match(r"\s*(?:<(?:image|video)>\s*)*", placed[0])[0]
    if MARK.findall(front) == wanted:
        placed[0] = placed[0][len(front) :]
    return placed
