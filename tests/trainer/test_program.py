"""Test the exit codes and messages of programs without a process group."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_process
from train_runs import environment

from rmsd_fast import program, train_run
from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.process import LenientStream
from rmsd_fast.program import run_program
from rmsd_fast.report import ReportError
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.stop_signal import Stopped


@pytest.fixture(autouse=True)
def group(monkeypatch):
    """Record whether the process group was left."""
    left = []
    monkeypatch.setattr(program, "start", lambda: World(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(program, "stop", lambda: left.append(True))
    return left


def end(error=None, *, trains=True, settings=None):
    def work(world, stop):
        assert world.size == 1
        if error is not None:
            raise error

    return run_program("rmsd_fast.x", settings or RunConfig(), work, trains=trains)


@pytest.mark.parametrize(
    ("error", "code", "leaves", "words"),
    [
        (None, 0, True, ""),
        (Stopped("step 3 is saved", together=True), 0, True, "stopped by SIGTERM: step 3 is saved"),
        (Stopped("nothing was written"), 0, True, "stopped by SIGTERM: nothing was written"),
        (SettingsError("x: expected 1"), 2, True, "rmsd_fast.x: x: expected 1"),
        (KeyboardInterrupt(), 130, True, "interrupted: nothing was written"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, True, "micro_tokens=16384 (tokens of one forward"),
    ],
)
def test_each_end_has_its_code_and_its_message(group, capsys, error, code, leaves, words):
    settings = RunConfig()
    settings.micro_tokens = 16384
    assert end(error, settings=settings) == code
    assert bool(group) == leaves
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "leaves"),
    [
        (None, 0, True),
        (Stopped("x", together=True), 0, True),
        (Stopped("x"), 143, False),
        (SettingsError("x"), 2, False),
        (OSError(errno.ENOSPC, "full", "a"), 2, False),
    ],
)
def test_a_possibly_single_process_does_not_wait_for_others(group, monkeypatch, error, code, leaves):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end(error) == code
    assert bool(group) == leaves


ENDS = """
import os
import signal
import sys
import time

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.program import run_program
from rmsd_fast.runtime.process_group import barrier, exit_process


def work(world, stop):
    kind = sys.argv[1]
    if kind == "all" or (kind != "sigterm" and world.rank == 1):
        raise SettingsError("a.b: expected 1" + kind.removeprefix("all"))
    if kind == "sigterm" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "bug":
        time.sleep(0.02)
        raise RuntimeError("shapes differ")
    if kind == "busy":
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
    try:
        with stop.deferred():
            barrier(world)
    finally:
        time.sleep(0.1)


if sys.argv[1] == "long":
    sys.argv[1] = "x" * 20_000 + chr(0xDC80)
exit_process(run_program("rmsd_fast.x", RunConfig(), work, trains=True))
"""


def ends(tmp_path, kind, *, torchrun=False):
    """Return what two processes print, without torchrun's own lines."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    if not torchrun:
        done = warm_process.run_program(str(script), [kind], environment(), processes=2, timeout_s=200)
        assert done.returncode == 1
        return [line for line in done.stderr.splitlines() if line]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*launcher, str(script), kind],
        env=environment() | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    # torchrun prints log lines and then the traceback with which it always ends.
    before = done.stderr.rsplit('Traceback (most recent call last):\n  File "<frozen runpy>"', 1)[0]
    lines = before.splitlines()
    return [line for line in lines if line and not re.match(r"[EWI]\d{4} |\*{9}|Setting OMP_NUM", line)]


@pytest.mark.parametrize("kind", ["all", "one", "busy"])
def test_several_processes_end_with_one_line(tmp_path, kind):
    """The fault may affect one process while the others wait for it or work."""
    told = "rmsd_fast.x: a.b: expected 1" + ("" if kind == "all" else kind)
    lines = ends(tmp_path, kind, torchrun=kind == "one")
    # For a process that waits for the end of a step, torchrun's SIGTERM adds this line.
    assert [line for line in lines if not line.startswith("SIGTERM: the run ends")] == [told]


def test_a_long_message_is_printed_once(tmp_path):
    lines = ends(tmp_path, "long")
    assert len([line for line in lines if line.startswith("rmsd_fast.x: a.b: expected 1xxx")]) == 1
    assert not any("Invalid string size" in line for line in lines)


def test_a_bug_on_another_process_shows_its_traceback(tmp_path):
    lines = ends(tmp_path, "bug")
    assert "rmsd_fast.x: a.b: expected 1bug" in lines
    assert any("RuntimeError: shapes differ" in line for line in lines)


def test_sigterm_to_one_process_ends_the_others(tmp_path):
    lines = ends(tmp_path, "sigterm")
    assert [line for line in lines if not line.startswith("SIGTERM: the run ends")] == [
        "stopped by SIGTERM: nothing was written"
    ]


def test_a_signal_during_shutdown_does_not_hide_the_message(capsys, monkeypatch):
    class Late:
        def __init__(self, world):
            pass

        def note(self, kind):
            os.kill(os.getpid(), signal.SIGTERM)

        def is_mine_to_tell(self, message):
            os.kill(os.getpid(), signal.SIGINT)
            return True

    monkeypatch.setattr(program, "Ends", Late)
    assert end(SettingsError("x: expected 1")) == 2
    assert capsys.readouterr().err == "rmsd_fast.x: x: expected 1\n"


def test_disk_errors_are_printed_as_one_line(capsys):
    assert end(OSError(errno.ENOSPC, "No space left on device", "a.tmp", None, "runs/x/a.json")) == 2
    told = capsys.readouterr().err
    assert told == "rmsd_fast.x: runs/x/a.json: No space left on device; free some space; nothing was written\n"


def test_lost_output_does_not_end_a_program(monkeypatch):
    class Lost(io.StringIO):
        encoding = "ascii"

        def write(self, text):
            raise OSError(errno.EIO, "the terminal is gone")

    monkeypatch.setattr(sys, "stdout", Lost())
    monkeypatch.setattr(sys, "stderr", None)

    def work(world, stop):
        print("ä")
        print("b", file=sys.stderr, flush=True)

    assert run_program("rmsd_fast.x", RunConfig(), work, trains=True) == 0
    assert sys.stderr is None


def unread(arguments: list[str], *, unbuffered: bool) -> tuple[int, str]:
    """Run Python with a pipe that nobody reads as its output. Return exit code and messages."""
    reading, writing = os.pipe()
    os.close(reading)
    variables = environment() | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    done = subprocess.run(
        [sys.executable, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, env=variables, timeout=120
    )
    os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["rmsd_fast.train", "--print-config"],
        ["rmsd_fast.collect", "questions.jsonl", "--out", "pool.jsonl", "--print-config"],
        ["rmsd_fast.lab", "smoke", "--out", "lab", "--dry-run"],
    ],
)
def test_output_that_nobody_reads_ends_a_program_quietly(arguments):
    assert unread(["-m", *arguments], unbuffered=True) == (128 + signal.SIGPIPE, "")


def test_buffered_output_that_nobody_reads():
    assert unread(["-m", "rmsd_fast.pool", "check", "--help"], unbuffered=False) == (0, "")
    assert unread(["-m", "rmsd_fast.train", "--print-config"], unbuffered=False) == (0, "")


def test_other_broken_pipes_are_errors():
    script = "from rmsd_fast.process import run_main\ndef main(): raise BrokenPipeError('a worker')\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "BrokenPipeError: a worker" in done.stderr


def test_an_interrupt_during_imports_is_one_line():
    main = "def main():\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
    script = f"import os, signal, sys\nfrom rmsd_fast.process import run_main\n{main}sys.exit(run_main(main))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_no_program_asks_for_settings():
    for name in ("train", "doctor", "evaluate", "collect", "lab", "report", "pool"):
        arguments = ["check"] if name == "pool" else ["--no-such-option"]
        done = warm_process.run_program(f"rmsd_fast.{name}", arguments, environment(), timeout_s=100)
        *_, last = done.stderr.splitlines()
        assert done.returncode == 2 and "error" in last and "section.field=value" not in last, last


def test_characters_that_a_terminal_cannot_show_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    LenientStream(stream).write("lücke\n")
    stream.flush()
    assert stream.buffer.getvalue() == b"l\\xfccke\n"


def test_vllms_cache_can_be_lowered(group, capsys):
    settings = RunConfig()
    for engine in ("hf", "vllm"):
        settings.rollout.engine = engine
        assert end(torch.OutOfMemoryError("full"), settings=settings) == 2
        assert ("rollout.vllm_kv_cache_gib=8 (vLLM's cache)" in capsys.readouterr().err) == (engine == "vllm")


@pytest.mark.parametrize(
    ("engine", "processes", "of_node", "parallel", "doubled"),
    [
        ("vllm", "8", "8", 1, True),
        ("vllm", "8", "4", 2, True),
        ("hf", "8", "8", 1, False),
        ("vllm", None, None, 1, False),
        ("vllm", "3", "3", 1, False),
        ("vllm", "6", "3", 1, False),
        ("vllm", "8", "4", 4, False),
    ],
)
def test_vllms_weights_can_be_split(capsys, monkeypatch, engine, processes, of_node, parallel, doubled):
    """Only if the processes, and those of each node, can form groups of twice the size."""
    settings = RunConfig()
    settings.rollout.engine, settings.rollout.tensor_parallel = engine, parallel
    for name, number in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", of_node)):
        if number is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, number)
    told = program._out_of_memory(settings, torch.OutOfMemoryError("full"), None, trains=True)
    assert told.count(f"vLLM's weights: rollout.tensor_parallel={parallel} -> {2 * parallel}\n") == doubled
    assert told.count("tensor_parallel") == doubled


@pytest.mark.parametrize("trains", [True, False])
def test_cuda_graphs_can_be_switched_off(group, capsys, trains):
    settings = RunConfig()
    for graphs in (True, False):
        settings.rollout.cuda_graphs = graphs
        assert end(torch.OutOfMemoryError("full"), settings=settings, trains=trains) == 2
        assert ("rollout.cuda_graphs=false, if it happened in rollouts or eval" in capsys.readouterr().err) == graphs


def test_an_evaluation_has_nothing_to_continue(capsys):
    assert end(KeyboardInterrupt(), trains=False) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert end(torch.OutOfMemoryError("full"), trains=False) == 2
    told = capsys.readouterr().err
    assert "evaluate.prompts_per_batch=" in told and "--resume" not in told
    assert f"  micro_tokens={RunConfig().micro_tokens} (tokens of one pass of the tower, the prefill and eval" in told


def test_program_errors_are_not_swallowed(group):
    with pytest.raises(ZeroDivisionError):
        end(ZeroDivisionError())
    assert not group


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ReportError("samples.jsonl:1: expected x"), "samples.jsonl:1: expected x"),
        (RuntimeError("a fault"), "RuntimeError: a fault"),
    ],
)
def test_a_report_that_cannot_be_written_does_not_fail_a_run(tmp_path, monkeypatch, capsys, error, words):
    def fail(_):
        raise error

    monkeypatch.setattr(train_run, "write_facts", lambda run, *, finished: None)
    monkeypatch.setattr(train_run, "write_report", fail)
    train_run.finish(SimpleNamespace(folder=tmp_path))
    told = capsys.readouterr().err
    assert f"report not written: {words}" in told and f"python -m rmsd_fast.report {tmp_path}" in told
