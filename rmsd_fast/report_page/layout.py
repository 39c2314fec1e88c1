"""Parts that the pages of runs and of pools share: the document around the sections, tiles, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rmsd_fast.report_page.style import SCRIPT, content_policy, page_style
from rmsd_fast.report_page.text import visible


def document(title: str, body: str) -> str:
    """Return a self-contained page.

    Args:
        title: title of the window, as HTML.
        body: the sections, as HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{page_style()}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def tile(name: str, shown: str, below: str, kind: str = "") -> str:
    """Return a headline number. `shown` is HTML; `kind` is the CSS class of the line below it."""
    return (
        f'<div class="card tile"><span class="name">{visible(name)}</span><b>{shown}</b>'
        f'<span class="small {kind or "muted"}">{visible(below)}</span></div>'
    )


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a card with a table. The first cell of a row is its heading; all texts are escaped.

    Args:
        label: name of the table for screen readers.
        head: headings of the columns.
        rows: cells of each row.
    """
    columns = "".join(f'<th class="fold">{visible(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{visible(row[0])}</th>{"".join(f"<td>{visible(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{visible(label)}"><table><thead><tr>'
        f"{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )
