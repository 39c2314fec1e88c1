"""Add the files of the repository that the pages link to to the site (hooks of mkdocs.yml).

GitHub shows README.md and docs/ at their paths in the repository. In the site, README.md is the home page, the pages of
docs/ are at the top level, and every other linked page or picture (tables of results, CONTRIBUTING.md) keeps its path.
Links are rewritten to match. Links to other files, such as source files, are unchanged, so `mkdocs build --strict`
reports them as errors.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages that get a new path: MkDocs would use docs/README.md as the home page.
MOVED = {"README.md": "index.md", "docs/README.md": "manual.md"}
# Pages outside docs/ that are in the navigation.
FIRST = ("README.md", "docs/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SHOWN = (".md", ".svg", ".png")
LINK = re.compile(r"(\]\(|^\[\w+\]: )([^)\s#]+)", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside docs/ that a page, or a page added this way, links to."""
    index = files.get_file_from_path("README.md")
    if index is not None:
        files.remove(index)
    inside = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    queue, seen = [*FIRST, *inside], {*FIRST, *inside}
    for path in queue:
        if path not in inside:
            added = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
            files.append(added)
        if path.endswith(".md"):
            links = [link for link in linked_files(path) if link not in seen]
            seen.update(links)
            queue += [link for link in links if not link.startswith("docs/") or link in MOVED]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page to the paths that the files have in the site."""
    source = page.file.src_uri
    path = repository_path(source)

    def moved(match: re.Match[str]) -> str:
        target = resolve(path, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(source) or ".")

    return LINK.sub(moved, markdown)


def linked_files(path: str) -> list[str]:
    """Return the files of the repository that a page links to, without duplicates."""
    text = (ROOT / path).read_text(encoding="utf-8")
    targets = [resolve(path, match[2]) for match in LINK.finditer(text)]
    return list(dict.fromkeys(target for target in targets if target is not None))


def resolve(page: str, link: str) -> str | None:
    """Return the page or picture that a relative link refers to, as a path in the repository, or None."""
    if "://" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    shown = target.endswith(SHOWN) and not target.startswith("..")
    return target if shown and (ROOT / target).is_file() else None


def site_path(path: str) -> str:
    """Return the path of a file of the repository among the sources of the site."""
    return MOVED.get(path, path.removeprefix("docs/"))


def repository_path(source: str) -> str:
    """Return the path in the repository of a page of the site; the inverse of `site_path`."""
    for path, moved in MOVED.items():
        if source == moved:
            return path
    return f"docs/{source}" if (ROOT / "docs" / source).is_file() else source
