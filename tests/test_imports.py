"""Test that imports run in one direction, light entry points stay light, and `kernels/` stays a plain source root."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"deepspeed", "transformers", "trl", "verl", "vllm"}
PROGRAMS = {"train", "collect", "evaluate", "report", "doctor", "pool", "lab", "serve"}

# A part may import parts of a lower level. `rmsd_fast` itself (the package file) has level 0.
LEVELS = {
    "rmsd_kernels": 0,
    "bootstrap": 0,
    "losses": 1,
    "config": 1,
    "environment": 0,
    "command_line": 1,
    "files": 1,
    "process": 1,
    "setting_rules": 1,
    "settings": 1,
    "method": 1,
    "data": 2,
    "teacher": 2,
    "models": 2,
    "rollout": 2,
    "made": 2,
    "runtime": 2,
    "integrations": 2,
    "program": 2,
    "stages": 3,
    **dict.fromkeys(PROGRAMS, 4),
}
# Within a level, only these imports are allowed; each line is (importer, imported). The chains have no cycles. A run
# ends with an evaluation and a report, so `train` calls the functions of those two programs.
SAME_LEVEL = {
    ("command_line", "config"),  # command_line reads the names of settings.
    ("process", "files"),
    ("files", "config"),  # files raises this kind of error.
    ("settings", "files"),
    ("settings", "config"),  # settings fills the dataclasses.
    ("settings", "setting_rules"),
    ("setting_rules", "config"),
    ("config", "method"),  # config has the task types among its choices,
    ("setting_rules", "method"),  # and so have its rules.
    ("train", "evaluate"),
    ("train", "report"),
    ("evaluate", "collect"),  # the client, which asks the judge
    ("train", "collect"),  # the same client
    ("report", "collect"),  # prices, which are settings of a collection
    ("lab", "report"),  # colors and ticks of its chart
    ("program", "runtime"),
    ("runtime", "data"),  # copies to a device
    ("teacher", "data"),
    ("models", "data"),
    ("rollout", "data"),
    ("rollout", "models"),
    ("rollout", "runtime"),  # An error of one process ends all.
    ("made", "data"),
    ("made", "teacher"),
    ("made", "models"),
}


def source_files() -> list[Path]:
    return sorted([*(ROOT / "rmsd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    """Return the dotted name of a source file; `kernels/` is a source root and is not part of it."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import in the source, including functions and `if TYPE_CHECKING`.

    `from a import b` gives `a.b`, so that a submodule imported by name is seen; relative imports are resolved.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.args[0] if node.args else None, ast.Constant):
            name = ast.unparse(node.func)
            if name in ("importlib.import_module", "import_module", "__import__"):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def part_of(name: str) -> str | None:
    """Return our part that contains a dotted name, or None for foreign names and for `rmsd_fast` itself."""
    pieces = name.split(".")
    if pieces[0] == "rmsd_kernels":
        return "rmsd_kernels"
    if pieces[0] == "rmsd_fast" and len(pieces) > 1 and not pieces[1].startswith("__"):
        # A program may be split into several files that belong to it, such as `report_svg.py` and `report.py`.
        program = pieces[1].split("_")[0]
        return program if program in PROGRAMS else pieces[1]
    return None


def fault(module: str, imported: str) -> str:
    """Return why `module` may not import `imported`, or "" if it may."""
    importer, target = part_of(module), part_of(imported)
    top = imported.split(".")[0]
    if importer == "method" and target != "method" and top != "torch" and top not in sys.stdlib_module_names:
        return "method/ imports torch and the standard library only"
    if top in ("bench", "tests"):
        return "nothing imports bench or tests"
    if importer == "rmsd_kernels" and top == "rmsd_fast":
        return "rmsd_kernels never imports rmsd_fast"
    if target is None or importer == target:
        return ""
    if target == "integrations":
        return "integrations are for callers with a trainer of their own; nothing here imports them"
    if target not in LEVELS:
        return f"{target!r} is not a part of rmsd_fast that this test knows"
    if importer is None:
        return "the package file imports nothing of ours"
    if LEVELS[target] < LEVELS[importer] or (importer, target) in SAME_LEVEL:
        return ""
    return f"{importer} (level {LEVELS[importer]}) may not import {target} (level {LEVELS[target]})"


def test_imports_run_one_way() -> None:
    faults = []
    for path in source_files():
        module = module_name(path)
        for line, imported in imports_of(path.read_text(), module, path.name == "__init__.py"):
            if reason := fault(module, imported):
                faults.append(f"{path.relative_to(ROOT)}:{line}: imports {imported}: {reason}")
    assert not faults, "\n".join(faults)


def test_every_source_file_belongs_to_a_known_part() -> None:
    parts = {part_of(module_name(path)) for path in source_files()} - {None}
    assert parts <= set(LEVELS), f"give these a level in this test: {sorted(parts - set(LEVELS))}"
    assert parts >= {"rmsd_kernels", "losses", "config", "method", "data", "teacher", "models", "rollout", "stages"}
    assert "integrations" in parts


def test_modules_outside_the_programs_import_at_most_one_heavy_library() -> None:
    for path in source_files():
        module = module_name(path)
        names = imports_of(path.read_text(), module, path.name == "__init__.py")
        heavy = {name.split(".")[0] for _, name in names} & HEAVY
        assert len(heavy) <= 1 or part_of(module) in PROGRAMS, f"{path.relative_to(ROOT)}: {sorted(heavy)}"


def test_no_import_cycles_between_modules() -> None:
    """Only module-level imports count, because these cause import errors in Python."""
    modules = {module_name(path): path for path in source_files()}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        top_level = ast.Module(
            body=[node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[]
        )
        names = {name for _, name in imports_of(ast.unparse(top_level), module, path.name == "__init__.py")}
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        edges[module] = {name for name in found if name in modules and name != module}

    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("rmsd_fast.method.quality", "def f():\n    import numpy\n", "method/ imports torch"),
        ("rmsd_fast.method.quality", "from ..config import Config", "method/ imports torch"),
        ("rmsd_fast.method.quality", "from .answers import parse_answer", ""),
        ("rmsd_fast.method.quality", "from rmsd_fast import losses", "method/ imports torch"),
        ("rmsd_kernels.native", "import rmsd_fast.losses", "never imports rmsd_fast"),
        ("rmsd_fast.losses", "from rmsd_kernels import reference", ""),
        ("rmsd_fast.data.records", "from rmsd_fast.teacher.pool import load_pool", "data (level 2) may not import"),
        ("rmsd_fast.teacher.pool", "from rmsd_fast.data.records import Question", ""),
        ("rmsd_fast.runtime.metrics", "from rmsd_fast.models import students", "runtime (level 2) may not import"),
        ("rmsd_fast.rollout.hf", "import importlib\nimportlib.import_module('rmsd_fast.stages.sft')", "rollout"),
        ("rmsd_fast.stages.sft", "from rmsd_fast import train", "stages (level 3) may not import"),
        ("rmsd_fast.train", "from rmsd_fast.stages import sft", ""),
        ("rmsd_fast.train", "from rmsd_fast import evaluate", ""),
        ("rmsd_fast.evaluate", "from rmsd_fast import train", "evaluate (level 4) may not import"),
        ("rmsd_fast.train", "from rmsd_fast import __version__", ""),
        ("rmsd_fast.stages.sft", "from rmsd_fast.integrations import hf", "nothing here imports them"),
        ("rmsd_fast.integrations.trl", "from rmsd_fast.integrations.head import Head", ""),
        ("rmsd_fast.integrations.trl", "import trl", ""),
        ("rmsd_fast.integrations.hf", "from rmsd_fast.models import students", "integrations (level 2) may not import"),
        ("rmsd_fast.report_svg", "from rmsd_fast.report_style import COLOURS", ""),
        ("rmsd_fast.stages.sft", "from rmsd_fast.report_svg import curve", "stages (level 3) may not import report"),
        ("rmsd_fast.train", "from tests.conftest import REPOSITORY", "nothing imports bench or tests"),
    ],
)
def test_fault_detects_forbidden_imports(module: str, source: str, reason: str) -> None:
    reasons = [fault(module, name) for _, name in imports_of(source, module, False)]
    found = "; ".join(filter(None, reasons))
    assert reason in found if reason else not found


@pytest.mark.parametrize(
    "statement",
    ["import rmsd_fast", "from rmsd_fast import losses", "from rmsd_fast.losses import *", "import rmsd_kernels"],
)
def test_light_entry_points_load_nothing_heavy(statement: str) -> None:
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert "rmsd_fast" in loaded or "rmsd_kernels" in loaded
    assert not loaded & HEAVY
    if statement == "import rmsd_fast":
        assert "torch" not in loaded


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    """transformers imports an unrelated package named `kernels`, and must not find our folder instead."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "rmsd_kernels" / "__init__.py").is_file()


def test_both_packages_come_from_one_tree() -> None:
    for name in ("rmsd_fast", "rmsd_kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
