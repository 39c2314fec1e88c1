"""Test the helper that runs programs in forks."""

from __future__ import annotations

import subprocess

import pytest
import warm_process
from processes import wait_until_gone
from train_runs import environment
from warm_process import run_program, start_programs


def run(*arguments: str, module: str = "rmsd_fast.train", timeout_s: float = 200, **options):
    return run_program(module, [*arguments], environment(), timeout_s=timeout_s, **options)


def test_programs_end_as_with_an_interpreter_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text("import os, sys\nprint(__name__, sys.argv[1:], os.getcwd())\nsys.exit(3)\n")
    done = run("a", "b c", module="here")
    assert (done.returncode, done.stdout, done.stderr) == (3, f"__main__ ['a', 'b c'] {tmp_path}\n", "")
    done = run("sft.stepz=3")
    assert done.returncode == 2 and "did you mean sft.steps?" in done.stderr and not done.stdout


def test_a_program_that_does_not_end_is_killed():
    run("--print-config")
    with pytest.raises(subprocess.TimeoutExpired):
        run("0", module="http.server", timeout_s=0.5)
    assert run("--print-config").returncode == 0


def test_a_group_ends_with_its_first_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('rank 1 of ' + os.environ['WORLD_SIZE'])\n"
    )
    (tmp_path / "ranks.py").write_text(code + "time.sleep(100)\n")
    done = run(module="ranks", processes=2)
    assert done.returncode == 1 and done.stderr == "rank 1 of 2\n"


def test_one_process_has_the_imports_until_the_environment_changes(monkeypatch):
    run("--print-config")
    first = warm_process._server
    run("--print-config")
    assert warm_process._server is first
    (running,) = start_programs("http.server", ["0"], environment(), [{}])
    monkeypatch.setenv("RMSD_TEST_ONLY", "1")
    with pytest.raises(RuntimeError, match="expected the programs .* to have ended, got .*http.server"):
        run("--print-config")
    wait_until_gone(running.pid)
    run("--print-config")
    assert warm_process._server is not first and first._process.poll() is not None
