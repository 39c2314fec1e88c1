"""What the README says can be done."""

from __future__ import annotations

import re
import subprocess
import sys

from rmsd_fast.config import RECIPES


def test_the_example_of_the_losses_runs(repository):
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    checks = "\nassert hidden.grad is not None and head.grad is not None and student.grad is not None"
    subprocess.run([sys.executable, "-c", code + checks], check=True)


def test_the_integrations_it_names_exist(repository):
    (code,) = re.findall(r"```python no-run\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    names = set(re.findall(r"import (Fused\w+)|fused\.(\w+)\(", code))
    folder = repository / "rmsd_fast" / "integrations"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    assert len(names) == 5
    for name in (first or second for first, second in names):
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), name


def test_recipes_and_files_it_names_exist(repository):
    text = (repository / "README.md").read_text()
    assert "PLACEHOLDER" not in text
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (repository / path).exists(), path
    for recipe in RECIPES.glob("*.yaml"):
        assert f"`{recipe.stem}`" in text, recipe.stem
