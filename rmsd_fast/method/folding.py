"""Normalize differences between texts that are not errors, and split texts into words."""

import re
import unicodedata

_QUOTES = str.maketrans("\u2018\u2019\u201b\u2032\u201c\u201d\u201e\u201f\u2033", "''''" + '"""""')
# Thai, Lao, Burmese, Khmer, kana and Han have no spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def fold_text(text: str) -> str:
    """Normalize differences that are not errors: case, width, quotes, outer quotes, white space, a final period."""
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold().split())
    if len(text) > 1 and text.endswith((".", "。")):
        text = text[:-1].rstrip()
    inside = text[1:-1].strip()
    return inside if text[:1] in ("'", '"') and text.endswith(text[0]) and inside and text[0] not in inside else text


def words_of(text: str) -> list[str]:
    """Return the words of a text; in scripts without spaces between words, each character is a word."""
    return _WORD.findall(fold_text(text))
