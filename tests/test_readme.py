"""Test that README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ are accurate, and that the site builds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import train_runs
import yaml
from teacher_server import TeacherServer, completion

from rmsd_fast import __version__
from rmsd_fast.config import RECIPES, RunConfig
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.method.natural import REASONS
from rmsd_fast.report_page.curves import GROUPS
from rmsd_fast.runtime.metrics import MAIN_NUMBERS
from rmsd_fast.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *MANUAL)
README_BYTES = 9 * 1024
# These tensors of an example must have a gradient after it has run.
GRADIENTS = {"README.md": ("hidden", "head", "student"), "docs/shared_prefix.md": ("q", "k", "v")}
# These pages must have an example that runs.
WITH_EXAMPLES = {"README.md", "docs/data.md", "docs/media.md", "docs/shared_prefix.md"}
SECTIONS = {field.name: field.default_factory for field in fields(RunConfig) if is_dataclass(field.default_factory)}
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?![\w/])")
# `report.html` and `teacher.json` are files of a run, though some sections have the same name.
FILE_ENDINGS = ("json", "jsonl", "html", "md", "py", "yaml", "svg")
FOLDERS = "rmsd_fast|kernels|csrc|bench|tests|docs|examples"
FILE = re.compile(rf"(?<![\w./<-])((?:{FOLDERS})/(?:[\w.-]+/)*[\w.-]*)(?![\w/<*])")
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
    """Return the arguments of each shell command on a page that starts this program, without comments."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split(f"-m {program} ")[1], comments=True) for line in lines if f"-m {program} " in line]


def module_file(dotted: str) -> Path | None:
    """Return the file of one of our modules or packages."""
    path = (ROOT / "kernels" if dotted.startswith("rmsd_kernels") else ROOT).joinpath(*dotted.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of the second level, without its first two lines."""
    (section,) = re.findall(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def keys_of(page: Path, heading: str) -> set[str]:
    """Return the names in backquotes in the first column of that table."""
    return {name for row in rows_of(page, heading) for name in re.findall(r"`([^`]+)`", row[0])}


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documented_examples_run(page: Path) -> None:
    examples = blocks(page, "python")
    assert bool(examples) == (label(page) in WITH_EXAMPLES)
    for code in examples:
        checks = "".join(f"\nassert {name}.grad is not None" for name in GRADIENTS.get(label(page), ()))
        subprocess.run([sys.executable, "-c", code + checks], check=True)


def test_all_code_blocks_are_marked_correctly() -> None:
    """A block of another kind, such as `py`, would neither run nor be marked as an example that does not run."""
    for page in PAGES:
        marks = set(re.findall(r"^ *```([^\n]+)$", page.read_text(), flags=re.MULTILINE))
        assert marks <= {"python", "python no-run"}, label(page)


def test_documented_functions_of_the_loop_exist() -> None:
    (code,) = blocks(ROOT / "docs" / "shared_prefix.md", "python no-run")
    (names,) = re.findall(r"from rmsd_fast.models.shared_prefix import (.*)", code)
    source = (ROOT / "rmsd_fast" / "models" / "shared_prefix.py").read_text()
    for name in names.split(", "):
        assert re.search(rf"^def {name}\b", source, flags=re.MULTILINE), name


def test_documented_integrations_exist() -> None:
    (code,) = blocks(ROOT / "docs" / "integrations.md", "python no-run")
    names = set(re.findall(r"import (Fused\w+)|fused\.(\w+)\(", code))
    folder = ROOT / "rmsd_fast" / "integrations"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    assert len(names) == 6
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
    for page in MANUAL:
        assert page.name == "README.md" or f"]({page.name})" in text, page.name


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_resolve(page: Path) -> None:
    text = page.read_text()
    assert "PLACEHOLDER" not in text
    references = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, flags=re.MULTILINE))
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *references.values()]
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        # The site shows only these file types, and its hooks add no others.
        assert target.suffix in (".md", ".svg", ".png"), f"{link}: write it as plain code instead of a link"
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documented_files_exist(page: Path) -> None:
    for path in FILE.findall(prose(page)):
        assert (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documented_settings_exist(page: Path) -> None:
    for section, name in SETTING.findall(prose(page)):
        known = {field.name for field in fields(SECTIONS[section])}
        assert name in known or name in FILE_ENDINGS, f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documented_modules_and_functions_exist(page: Path) -> None:
    """`a.b.c` is a module, or a class or function that module `a.b` defines or exports."""
    for dotted in DOTTED.findall(prose(page)):
        module, _, name = dotted.rpartition(".")
        if module_file(dotted) is None:
            file = module_file(module)
            assert file and re.search(rf"^(?:def|class) {name}\b|\"{name}\"", file.read_text(), flags=re.MULTILINE), (
                dotted
            )


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documented_commands_are_valid(page: Path) -> None:
    """Settings in the documented commands take effect in their recipe, or in `my.yaml`.

    The pages introduce that file as a copy of the 4B recipe.
    """
    for program in ("rmsd_fast.train", "rmsd_fast.evaluate"):
        for arguments in commands(page, program):
            if "--help" not in arguments:
                settings = [a for a in arguments if re.match(r"[a-z_.]+=", a)]
                named = [a for a in arguments if (RECIPES / f"{a}.yaml").is_file()]
                recipe = named[0] if named else "rmsd_qwen3vl_4b"
                load_settings(recipe, settings, trains=program == "rmsd_fast.train")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets


def test_documented_commands_are_found() -> None:
    """This verifies that the checks above find commands."""
    trained, evaluated = (commands(ROOT / "README.md", f"rmsd_fast.{name}") for name in ("train", "evaluate"))
    assert len(trained) == 3 and len(evaluated) == 1
    (tiny,) = (
        arguments for arguments in commands(ROOT / "docs" / "training.md", "rmsd_fast.train") if len(arguments) > 9
    )
    assert "rollout.n=4" in tiny


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_the_readme_explains_terms_before_using_them() -> None:
    text = (ROOT / "README.md").read_text()
    method = text.index("## The method")
    assert method < text.index("teacher answers each question K times") < text.index("The quality q_k of answer k is")
    for term in ("K", "N", "tau", "q_k", "p_k", r"groups?", r"rollouts?", r"pairs?", "[Ww]arm-up"):
        first = re.search(rf"(?<![\w/.]){term}(?![\w.])", text)
        assert first and method < first.start() < text.index("## A first real run"), term


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_documentation_lines_are_short(page: Path) -> None:
    """Tables and code blocks may be longer."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = text.splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.lstrip().startswith("|")]
    # Inline code that is broken over two lines cannot be copied.
    assert not [line for line in lines if line.count("`") % 2]


GLOSSARY = ROOT / "docs" / "glossary.md"
METRICS = (
    "Metrics of every stage",
    "Time",
    "Media",
    "Imitation",
    "Discriminator",
    "Rewards and advantages",
    "Policy",
    "Imitated answers",
    "Learned weights",
    "Self-teacher and token credit",
    "Rollout engine and trainer",
    "Rollouts",
    "Teacher answers",
    "What stage 2 can gain",
)


def glossary_metrics() -> set[str]:
    return set().union(*(keys_of(GLOSSARY, heading) for heading in METRICS))


def test_the_glossary_lists_the_metrics_of_the_report() -> None:
    """The report names all metrics except the phases, which the trainer names where it measures them."""
    charted = {key for _, charts in GROUPS for chart in charts for key, _ in chart.keys}
    sources = [path.read_text() for path in (ROOT / "rmsd_fast").rglob("*.py")]
    phases = {name for source in sources for name in re.findall(r"\btimer\(\"(\w+)\"\)", source)} | {"step"}
    assert glossary_metrics() == charted | {f"seconds/{phase}" for phase in phases} | {"stage", "step"}


def test_the_glossary_explains_the_progress_line() -> None:
    rows = {row[0].strip("`"): row[1].strip("`") for row in rows_of(GLOSSARY, "The progress line")}
    shown = {label: key for key, label in MAIN_NUMBERS.items()}
    assert list(rows)[2:] == list(shown)
    assert {label: rows[label] for label in shown} == shown


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_referenced_functions_exist(page: Path) -> None:
    """`path/file.py:name` must be a function or a method of that file."""
    for path, name in re.findall(r"`([\w/]+\.py):(\w+)`", page.read_text()):
        assert re.search(rf"^ *def {name}\b", (ROOT / path).read_text(), flags=re.MULTILINE), f"{path}:{name}"


@pytest.mark.slow
def test_the_glossary_lists_the_numbers_of_a_run(tmp_path: Path) -> None:
    """The test takes one step of every stage, with the settings that add metrics."""
    more = ("sft.steps=1", "distill.steps=1", "distill.warmup_steps=0", "distill.tis_cap=2")
    more += ("distill.sequence_mask_cap=3", "reward.kl_in_reward=0.01", "discriminator.pairing=sampled")
    more += ("self_teacher.kind=frozen", "self_teacher.views=[answer,feedback]", "self_teacher.max_hint_tokens=80")
    more += ("kd.kind=k1", "credit.magnitude=teacher", "credit.prune=overlap", "self_teacher.judge.model=m")
    more += ("distill.sft_coef=0.05", "teacher.selection=aligned", "credit.uncertainty=task")
    with TeacherServer(lambda request, number: completion("Look again.")) as server:
        more += (f"self_teacher.judge.endpoint={server.url}",)
        arguments = train_runs.mini_arguments(tmp_path / "runs", tmp_path / "made", *more)
        done = train_runs.run_train(arguments)
    assert done.returncode == 0, done.stderr
    run = train_runs.only_run(tmp_path / "runs")

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    # A run distills either advantages or distributions.
    logged = {key for line in lines("metrics.jsonl") for key in line}
    assert logged | {"kd/divergence"} == glossary_metrics() != logged
    evaluation = json.loads((run / "evaluation.json").read_text())
    numbers = {key for student in evaluation["students"].values() for key in student["all"]}
    numbers |= {key for floor in evaluation["floors"].values() for key in floor}
    assert numbers == keys_of(GLOSSARY, "Evaluation")
    assert set(json.loads((run / "teacher.json").read_text())["all"]) == keys_of(GLOSSARY, "The teacher pool")
    records = [entry for line in lines("rollouts.jsonl") for entry in (*line["teacher"], *line["rollouts"])]
    assert {key for record in records for key in record} - {"k", "text"} == keys_of(GLOSSARY, "Logged rollouts")


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["type"], citation["version"]) == ("software", __version__)
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2603.11423"}]


def test_pictures_match_their_generator(tmp_path: Path) -> None:
    made = tmp_path / "method.svg"
    subprocess.run([sys.executable, str(ROOT / "docs" / "method_svg.py"), str(made)], check=True)
    assert made.read_text() == (ROOT / "docs" / "method.svg").read_text(), "run python docs/method_svg.py"


def test_the_site_can_be_built(tmp_path: Path) -> None:
    """MkDocs checks links and anchors here; without MkDocs, `test_links_resolve` checks those that GitHub supports."""
    if not list(importlib.metadata.distributions(name="mkdocs-material")):
        pytest.skip("needs mkdocs-material (extra: docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "manual.html", "glossary.html", "CONTRIBUTING.html"):
        assert (tmp_path / page).is_file(), page
