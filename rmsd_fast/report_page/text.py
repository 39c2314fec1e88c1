"""Convert untrusted text to HTML."""

from __future__ import annotations

import re
from html import escape

# Control characters other than tab and newline, and lone surrogates, which UTF-8 cannot represent.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(value: object) -> str:
    """Return untrusted text as HTML: escaped, with unprintable characters replaced by U+FFFD."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n")), quote=True)
