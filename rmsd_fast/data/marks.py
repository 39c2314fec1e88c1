"""Marks in a question's text: `<image>` and `<video>` stand where the media do.

A text without marks has its media in front of it, videos first. Read are also `<IMAGE>`, numbered marks in their order
(`<image_1>`, `<image 2>`) and the family's own `<|vision_start|><|image_pad|><|vision_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARK = re.compile(r"<(image|video)>")
_SPELLINGS = re.compile(
    r"<\|vision_start\|><\|(?P<token>image|video)_pad\|><\|vision_end\|>"
    r"|<\s*(?P<name>image|video)(?:[ _-]?(?P<number>\d+))?\s*/?>",
    re.IGNORECASE,
)


class MarkError(ValueError):
    """Marks that do not fit the files; the message says what was found and what to do."""


def place_marks(texts: Sequence[str], *, videos: int, images: int) -> list[str]:
    """The texts with every mark as `<image>` or `<video>`, and none where all media stand in front anyway.

    Args:
        texts: the parts of a prompt in order: the question, then its options.
        videos, images: number of files.
    Raises:
        MarkError: there are marks, and not one for each file.
    """
    found = [match for text in texts for match in _SPELLINGS.finditer(text)]
    if not found:
        return list(texts)
    kinds = [(match["token"] or match["name"]).lower() for match in found]
    wanted = ["video"] * videos + ["image"] * images
    # LLaVA-Video marks its videos with <image>.
    renamed = len(set(kinds)) == len(set(wanted)) == 1 and len(kinds) == len(wanted)
    kinds = wanted if renamed else kinds
    if sorted(kinds) != sorted(wanted):
        got = f"{kinds.count('video')} <video> and {kinds.count('image')} <image>"
        raise MarkError(
            f"expected one mark for each of {videos} videos and {images} images, got {got}; fix them, or write none "
            "(media then stand in front)"
        )
    for kind in ("image", "video"):
        own = [match["number"] for match, its_kind in zip(found, kinds, strict=True) if its_kind == kind]
        numbers = [int(number) for number in own if number]
        if numbers and numbers != list(range(1, len(own) + 1)):
            raise MarkError(
                f"expected {kind} marks numbered 1 to {len(own)} in this order, got {', '.join(map(str, numbers))}; "
                f"reorder the files, or write <{kind}> where each of them stands"
            )
    rest = iter(kinds)
    placed = [_SPELLINGS.sub(lambda _: f"<{next(rest)}>", text) for text in texts]
    front = re.match(r"\s*(?:<(?:image|video)>\s*)*", placed[0])[0]
    if MARK.findall(front) == wanted:
        placed[0] = placed[0][len(front) :]
    return placed
