"""What the README says can be done."""

from __future__ import annotations

import re
import subprocess
import sys

from rmsd_fast.config import RECIPES
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.method.natural import REASONS


def _blocks(repository, kind: str) -> list[str]:
    text = (repository / "README.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def test_the_examples_run(repository):
    media, sharing, losses = _blocks(repository, "python")
    for code, names in ((media, ()), (sharing, ("q", "k", "v")), (losses, ("hidden", "head", "student"))):
        checks = "".join(f"\nassert {name}.grad is not None" for name in names)
        subprocess.run([sys.executable, "-c", code + checks], check=True)


def test_the_wiring_it_names_exists(repository):
    code = _blocks(repository, "python no-run")[0]
    (names,) = re.findall(r"from rmsd_fast.models.shared_prefix import (.*)", code)
    source = (repository / "rmsd_fast" / "models" / "shared_prefix.py").read_text()
    for name in names.split(", "):
        assert re.search(rf"^def {name}\b", source, flags=re.MULTILINE), name


def test_the_integrations_it_names_exist(repository):
    code = _blocks(repository, "python no-run")[1]
    names = set(re.findall(r"import (Fused\w+)|fused\.(\w+)\(", code))
    folder = repository / "rmsd_fast" / "integrations"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    assert len(names) == 5
    for name in (first or second for first, second in names):
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), name


def test_the_examples_of_the_manual_run(repository):
    for page in sorted((repository / "docs").glob("*.md")):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            subprocess.run([sys.executable, "-c", code], check=True)


def test_the_manual_shows_the_prompt_and_every_reason(repository):
    text = (repository / "docs" / "data.md").read_text()
    for last_line in ANSWER_FORMAT.values():
        assert f"`{last_line}`" in text
    for reason in REASONS:
        assert f"`{reason}`" in text, reason


def test_recipes_and_files_it_names_exist(repository):
    text = (repository / "README.md").read_text()
    assert "PLACEHOLDER" not in text
    for path in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (repository / path).exists(), path
    for recipe in RECIPES.glob("*.yaml"):
        assert f"`{recipe.stem}`" in text, recipe.stem
