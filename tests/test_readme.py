"""What README.md and the manual in docs/ say can be done."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from rmsd_fast.config import RECIPES, RunConfig
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.method.natural import REASONS
from rmsd_fast.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Tensors of an example that must have a gradient when it has run.
GRADIENTS = {"README.md": ("hidden", "head", "student"), "docs/shared_prefix.md": ("q", "k", "v")}
# Pages that must have an example that runs.
WITH_EXAMPLES = {"README.md", "docs/data.md", "docs/media.md", "docs/shared_prefix.md"}
SECTIONS = {field.name: field.default_factory for field in fields(RunConfig) if is_dataclass(field.default_factory)}
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?![\w/])")
# `report.html` and `teacher.json` are files of a run, though some sections have the same name.
FILE_ENDINGS = ("json", "jsonl", "html", "md", "py", "yaml", "svg")
FILE = re.compile(r"(?<![\w./<-])((?:rmsd_fast|kernels|csrc|bench|tests|docs)/(?:[\w.-]+/)*[\w.-]*)(?![\w/<*])")
DOTTED = re.compile(r"(?<![\w./])((?:rmsd_fast|rmsd_kernels|bench)(?:\.\w+)+)")


def blocks(page: Path, kind: str) -> list[str]:
    """Return the fenced blocks of a page that are marked with exactly this kind."""
    found = re.findall(r"^( *)```([^\n]*)\n(.*?)^ *```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for _, mark, text in found if mark == kind]


def prose(page: Path) -> str:
    """Return a page without its Python blocks and the targets of its links."""
    text = re.sub(r"^```python.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)|^\[\w+\]: .*$", "]", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path, program: str) -> list[list[str]]:
    """Return the arguments of each shell command on a page that starts this program, comments left out."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split(f"-m {program} ")[1], comments=True) for line in lines if f"-m {program} " in line]


def module_file(dotted: str) -> Path | None:
    """Return the file of one of our modules or packages."""
    path = (ROOT / "kernels" if dotted.startswith("rmsd_kernels") else ROOT).joinpath(*dotted.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_the_examples_run(page: Path) -> None:
    examples = blocks(page, "python")
    assert bool(examples) == (label(page) in WITH_EXAMPLES)
    for code in examples:
        checks = "".join(f"\nassert {name}.grad is not None" for name in GRADIENTS.get(label(page), ()))
        subprocess.run([sys.executable, "-c", code + checks], check=True)


def test_no_example_is_overlooked() -> None:
    """A block of another kind, such as `py`, would neither run nor be marked as one that does not."""
    for page in PAGES:
        marks = set(re.findall(r"^ *```([^\n]+)$", page.read_text(), flags=re.MULTILINE))
        assert marks <= {"python", "python no-run"}, label(page)


def test_the_wiring_it_names_exists() -> None:
    (code,) = blocks(ROOT / "docs" / "shared_prefix.md", "python no-run")
    (names,) = re.findall(r"from rmsd_fast.models.shared_prefix import (.*)", code)
    source = (ROOT / "rmsd_fast" / "models" / "shared_prefix.py").read_text()
    for name in names.split(", "):
        assert re.search(rf"^def {name}\b", source, flags=re.MULTILINE), name


def test_the_integrations_it_names_exist() -> None:
    (code,) = blocks(ROOT / "docs" / "integrations.md", "python no-run")
    names = set(re.findall(r"import (Fused\w+)|fused\.(\w+)\(", code))
    folder = ROOT / "rmsd_fast" / "integrations"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    assert len(names) == 5
    for name in (first or second for first, second in names):
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), name


def test_the_manual_shows_the_prompt_and_every_reason() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    for last_line in ANSWER_FORMAT.values():
        assert f"`{last_line}`" in text
    for reason in REASONS:
        assert f"`{reason}`" in text, reason


def test_the_manual_shows_every_recipe() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for recipe in RECIPES.glob("*.yaml"):
        assert f"`{recipe.stem}`" in text, recipe.stem


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in text, page.name


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert "PLACEHOLDER" not in text
    references = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, flags=re.MULTILINE))
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *references.values()]
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_files_it_names_exist(page: Path) -> None:
    for path in FILE.findall(prose(page)):
        assert (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_settings_it_names_exist(page: Path) -> None:
    for section, name in SETTING.findall(prose(page)):
        known = {field.name for field in fields(SECTIONS[section])}
        assert name in known or name in FILE_ENDINGS, f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_modules_and_functions_it_names_exist(page: Path) -> None:
    """`a.b.c` is a module, or a class or function that module `a.b` defines or lists as its own."""
    for dotted in DOTTED.findall(prose(page)):
        module, _, name = dotted.rpartition(".")
        if module_file(dotted) is None:
            file = module_file(module)
            assert file and re.search(rf"^(?:def|class) {name}\b|\"{name}\"", file.read_text(), flags=re.MULTILINE), (
                dotted
            )


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_can_be_given(page: Path) -> None:
    """Settings of the commands have effect in a copy of the 4B recipe, as which the pages introduce `my.yaml`."""
    for program in ("rmsd_fast.train", "rmsd_fast.evaluate"):
        for arguments in commands(page, program):
            if "--help" not in arguments:
                load_settings("rmsd_qwen3vl_4b", [a for a in arguments if re.match(r"[a-z_.]+=", a)])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets


def test_the_first_run_is_there() -> None:
    """The commands that the checks above read are found at all."""
    trained, evaluated = (commands(ROOT / "README.md", f"rmsd_fast.{name}") for name in ("train", "evaluate"))
    assert len(trained) == 3 and len(evaluated) == 1
    (tiny,) = (
        arguments for arguments in commands(ROOT / "docs" / "training.md", "rmsd_fast.train") if len(arguments) > 9
    )
    assert "rollout.n=4" in tiny
