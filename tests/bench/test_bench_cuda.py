"""Test the command that measures everything on a CUDA machine: its time, processes, messages, and a rehearsal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_records import step_record
from processes import wait_until_gone

REPOSITORY = Path(__file__).resolve().parents[2]


def run_of(folder: Path, **environment: str):
    from bench.cuda.sections import Run

    own = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return Run(folder / "results.jsonl", folder / "output.log", True, own)


def section(code: str, name: str = "one", *, seconds: float = 10, least_s: float = 0.1, required: bool = False):
    from bench.cuda.sections import Section

    return Section(name, "a test", seconds, least_s, lambda run: [sys.executable, "-c", code], required)


def test_time_is_divided_and_the_required_section_keeps_its_minimum():
    from bench.cuda.sections import ends_of

    first, needed, last = (
        section("", "a", seconds=50),
        section("", "b", seconds=25, least_s=20, required=True),
        section(""),
    )
    sections = [first, needed, last]
    assert ends_of(sections, 0, 85) == [50, 75, 85]
    # The first section may take 5 of 25 seconds, though its share is 14.7.
    assert ends_of(sections, 0, 25) == [5, 25, 25]
    # If the time is too short even for the required section, it gets all of the time.
    assert ends_of(sections, 100, 110) == [100, 110, 110]


def test_the_sections_take_eight_minutes():
    from bench.cuda.__main__ import arguments
    from bench.cuda.sections import SECTIONS

    assert sum(section.seconds for section in SECTIONS) == 480 and arguments([]).minutes == 8


def test_tests_are_ordered_by_importance():
    from bench.cuda.sections import FIRST_TESTS, KERNEL_TESTS, test_files

    kernels, others = ([path.stem.removeprefix("test_") for path in test_files(own)] for own in (True, False))
    assert tuple(kernels) == KERNEL_TESTS and tuple(others[: len(FIRST_TESTS)]) == FIRST_TESTS
    assert len({*kernels, *others}) == len(kernels) + len(others) and "rollout" in others


def test_sections_are_ordered_by_importance():
    from bench.cuda.sections import SECTIONS

    names = [section.name for section in SECTIONS]
    assert names == ["machine", "correctness", "heads", "prefix", "step", "media", "rollout", "stages", "optimizer"]
    assert [section.name for section in SECTIONS if section.required] == ["machine", "step"]


def test_settings_for_other_programs_are_not_passed_on(monkeypatch):
    from bench.cuda.__main__ import NOT_PASSED_ON, environment_of

    for name in NOT_PASSED_ON:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RMSD_BENCH_COMMIT", "abc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = environment_of("cuda")
    assert not set(found) & set(NOT_PASSED_ON)
    assert (found["RMSD_BENCH_COMMIT"], found["CUDA_VISIBLE_DEVICES"]) == ("abc", "3")
    assert (found["NCCL_SOCKET_IFNAME"], found["NCCL_IB_DISABLE"], found["NCCL_NVLS_ENABLE"]) == ("lo", "1", "0")
    found = environment_of("cpu")
    assert (found["DS_ACCELERATOR"], found["CUDA_VISIBLE_DEVICES"]) == ("cpu", "") and "RANK" not in found


def test_a_section_that_works_and_a_section_that_dies(tmp_path, capfdbinary):
    from bench.cuda.sections import FAILED, PASSED, run_section

    deadline = time.time() + 60
    fine = run_section(section("print('hello')"), run_of(tmp_path), deadline, deadline)
    died = run_section(section("import os; os.abort()"), run_of(tmp_path), deadline, deadline)
    wrong = run_section(section("raise SystemExit(3)"), run_of(tmp_path), deadline, deadline)
    assert (fine.outcome, died.outcome, wrong.outcome) == (PASSED, FAILED, FAILED)
    assert died.reason.startswith("signal SIGABRT") and wrong.reason.startswith("exit code 3")
    assert b"hello" in (tmp_path / "output.log").read_bytes() and b"hello" in capfdbinary.readouterr().out


def test_a_section_that_hangs_is_stopped_with_its_children(tmp_path):
    from bench.cuda import sections as cuda_sections

    child = tmp_path / "child"
    hang = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(child)!r}, "w").write(str(started.pid))
print("before", flush=True)
time.sleep(100)
"""
    began = time.time()
    found = cuda_sections.run_section(section(hang), run_of(tmp_path), began + 30, began + 3)
    assert found.outcome == cuda_sections.STOPPED and time.time() - began < 20
    assert b"before" in (tmp_path / "output.log").read_bytes()
    wait_until_gone(int(child.read_text()))


def test_children_get_a_grace_period_if_the_parent_ends_at_once(tmp_path):
    from bench.cuda.sections import child, end

    slow = f"""
import signal, time
def late(*_):
    time.sleep(0.7)
    open({str(tmp_path / "written")!r}, "w")
    raise SystemExit
signal.signal(signal.SIGTERM, late)
print(flush=True)
time.sleep(100)
"""
    first = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {slow!r}]); time.sleep(100)"
    began = time.time()
    with child([sys.executable, "-c", first], dict(os.environ)) as process:
        process.stdout.readline()
        end(process, patience_s=20)
        assert (tmp_path / "written").exists() and time.time() - began < 15


class Gone:
    """A terminal that was closed."""

    def write(self, _):
        raise BrokenPipeError

    flush = None


@pytest.mark.parametrize("stdout", [SimpleNamespace(buffer=Gone()), None])
def test_a_section_continues_if_the_terminal_is_closed(tmp_path, monkeypatch, stdout):
    from bench.cuda.sections import PASSED, run_section

    monkeypatch.setattr(sys, "stdout", stdout)
    deadline = time.time() + 20
    # The output is larger than a pipe buffer.
    found = run_section(section("for i in range(20000): print('a line', i)"), run_of(tmp_path), deadline, deadline)
    assert found.outcome == PASSED and (tmp_path / "output.log").read_bytes().endswith(b"a line 19999\n")


def test_the_terminal_shows_everything_if_the_log_cannot_be_written(capfdbinary):
    from bench.cuda.sections import _copy, terminal

    _copy([b"one\n", b"two\n"], Gone(), terminal())
    assert capfdbinary.readouterr().out == b"one\ntwo\n"


def test_output_of_file_preparation_goes_to_the_log(tmp_path):
    from bench.cuda.sections import Section, beside, wait_for

    made = Section("made", "", 1, 0, lambda run: [], ahead=lambda run: [sys.executable, "-c", "print('made'); 1 / 0"])
    with beside(made, run_of(tmp_path)) as process:
        wait_for(process, time.time() + 20)
    text = (tmp_path / "output.log").read_text()
    assert "made" in text and "ZeroDivisionError" in text


@pytest.fixture
def handlers():
    """Restore the signal handlers of this process after the test."""
    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in own.items():
        signal.signal(number, handler)


def outcomes_of(run, sections: list, began: float, deadline: float) -> dict[str, tuple[str, str]]:
    """Return the outcome and reason of each section of run_sections by name."""
    from bench.cuda.__main__ import run_sections

    run_sections(run, sections, began, deadline)
    lines = [line for line in lines_of(run.records.parent) if line["bench"] == "section"]
    return {line["section"]: (line["outcome"], line["reason"]) for line in lines}


def test_startup_time_does_not_count_towards_the_first_section(tmp_path, handlers):
    from bench.cuda.sections import PASSED

    sections = [section("", "first", seconds=10), section("", "second", seconds=90)]
    now = time.time()
    found = outcomes_of(run_of(tmp_path), sections, now - 60, now + 40)
    assert found == {"first": (PASSED, ""), "second": (PASSED, "")}


def test_an_interruption_keeps_the_results_of_its_section(tmp_path, handlers):
    from bench.cuda.sections import INTERRUPTED, LEFT_OUT, STOPPED

    line = json.dumps({"test": "a", "outcome": "failed", "seconds": 1.0, "reason": "why"})
    hang = f"import os, time; open(os.environ['RMSD_BENCH_LOG'], 'w').write({line!r}); time.sleep(100)"

    def interrupt() -> None:
        log = tmp_path / ".hangs.tests"
        while not log.exists() or not log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    now = time.time()
    found = outcomes_of(run_of(tmp_path), [section(hang, "hangs"), section("", "after")], now, now + 60)
    assert found == {"hangs": (STOPPED, INTERRUPTED), "after": (LEFT_OUT, INTERRUPTED)} and time.time() - now < 20
    hangs, _, end = lines_of(tmp_path)
    assert [test["test"] for test in hangs["tests"]] == ["a"] and INTERRUPTED in end["faults"]
    assert not list(tmp_path.glob(".*.tests"))


def test_a_section_without_time_is_skipped(tmp_path):
    from bench.cuda.sections import LEFT_OUT, run_section

    found = run_section(section("", least_s=20), run_of(tmp_path), time.time() + 5, time.time() + 60)
    assert found.outcome == LEFT_OUT and found.reason.startswith("no time left: ")


TESTS = """
import os, time
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="for a reason")
def test_skipped(): pass

@pytest.fixture
def broken(): raise ValueError("no fixture")

def test_broken(broken): pass

def test_slow(): time.sleep(float(os.environ["SLOW_S"]))

def test_late(): pass
"""


def logged(folder: Path, until_s: float, slow_s: float) -> dict[str, tuple[str, str]]:
    """Return the outcome and reason of each of TESTS, run with bench.cuda.section_log."""
    from bench.cuda.sections import Section, run_section

    path = folder / "test_made.py"
    path.write_text(TESTS)
    # -c is needed because this project's settings would collect the file from the repository.
    options = [
        "-p",
        "bench.cuda.section_log",
        "-p",
        "no:cacheprovider",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
    ]
    made = Section("made", "", 1, 0, lambda run: [sys.executable, "-m", "pytest", *options, str(path)])
    until = time.time() + until_s
    result = run_section(made, run_of(folder, SLOW_S=str(slow_s)), until, time.time() + 60)
    assert (result.outcome, not list(folder.glob(".*.tests"))) == ("FAILED", True)
    return {test["test"].rpartition("::")[2]: (test["outcome"], test["reason"]) for test in result.tests}


def test_each_test_of_a_section_is_logged_and_none_starts_too_late(tmp_path):
    found = logged(tmp_path, 60, 0)
    assert found["test_right"] == ("passed", "") and found["test_skipped"] == ("skipped", "for a reason")
    assert found["test_wrong"][0] == "failed" and "one is not two" in found["test_wrong"][1]
    assert found["test_broken"] == ("failed", "ValueError: no fixture")
    assert found["test_late"] == ("passed", "")
    late = logged(tmp_path, 6, 8)
    assert late["test_slow"] == ("passed", "") and late["test_late"] == ("skipped", "no time left")


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "bench.cuda", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        **options,
    )


def test_error_without_a_device_says_how_to_rehearse(tmp_path):
    done = command("--output", str(tmp_path / "results"))
    assert done.returncode == 2 and "python -m bench.cuda --device cpu" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes: expected a number above 0"),
        (["--minutes", "1"], "--minutes: these sections need at least 1.1"),
        (["--only", "stepp"], "invalid choice: 'stepp'"),
        (["--wheels", "/nowhere", "--device", "cpu"], "/nowhere"),
        (["--output", str(REPOSITORY)], "expected an empty or new folder"),
    ],
)
def test_wrong_arguments(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2 and said in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = command("--device", "cpu", "--only", "machine", "--output", str(tmp_path / "file" / "results"))
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_a_relative_output_starts_at_the_current_folder(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    arguments = ["--device", "cpu", "--only", "machine", "--output", "here"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.cuda", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    lines = lines_of(tmp_path / "here")
    assert [line["bench"] for line in lines] == ["run", "machine", "section", "end"]
    assert done.returncode == 1 and "whole steps were not measured" in done.stdout
    summary = (tmp_path / "here" / "summary.md").read_text()
    assert summary.startswith("# Rehearsal") and lines[0]["started"] in summary


@pytest.mark.slow
def test_an_interrupted_run_prints_a_summary(tmp_path):
    folder = tmp_path / "results"
    arguments = ["--device", "cpu", "--output", str(folder), "--only", "machine", "correctness", "heads"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.cuda", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("=== correctness:"):
            break
    # The process of the section runs and is loading torch.
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "FAILED: interrupted" in rest
    summary = (folder / "summary.md").read_text()
    assert "| machine | passed |" in summary and "| correctness | stopped |" in summary
    assert "| heads | left out | 0 |  | interrupted |" in summary


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal(tmp_path):
    """All sections run at toy sizes, and sections that need a device are skipped with a reason."""
    from bench.cuda.sections import SECTIONS

    folder = tmp_path / "results"
    done = command("--device", "cpu", "--output", str(folder), "--minutes", "8")
    lines = lines_of(folder)
    outcomes = {line["section"]: line["outcome"] for line in lines if line["bench"] == "section"}
    assert list(outcomes) == [section.name for section in SECTIONS]
    assert outcomes.pop("correctness") == outcomes.pop("stages") == "left out"
    # The record is written again with the optimizer, which was measured after the steps.
    apart = [line for line in lines if line["bench"] == "step" and "apart" in line["case"]]
    assert "not measured" in apart[0]["optimizer"]["how"] and apart[-1]["optimizer"]["scaled"]
    assert set(outcomes.values()) == {"passed"}, outcomes
    assert done.returncode == 0, done.stdout[-3000:]
    measured = [line for line in lines if "variants" in line]
    assert all(line["quick"] and line["device"] == "cpu" for line in measured)
    summary = (folder / "summary.md").read_text()
    for line in measured:
        assert f"## {line['bench']} " in summary
    assert "promised" not in summary
    # The summary on the terminal has no tables of all cases, because each table was printed when it was measured.
    ending = done.stdout.partition("## Sections")[2]
    assert "## step " in ending and "## discriminator " not in ending


def missing(folder: Path, *records: dict, toy: bool = False) -> bool:
    from bench.core.records import append_line
    from bench.cuda.__main__ import missing_steps

    run = run_of(folder)
    run.records.unlink(missing_ok=True)
    for record in ({"bench": "run"}, *records):
        append_line(record, run.records)
    return bool(missing_steps(SimpleNamespace(records=run.records, toy=toy)))


def test_whole_steps_are_missing_unless_shared_steps_were_measured(tmp_path):
    fine = step_record("one", k4=1.0)
    assert missing(tmp_path) and not missing(tmp_path, fine)
    assert not missing(tmp_path, step_record("one", k4_again=1.0))
    assert missing(tmp_path, step_record("one", k1=1.0, padded=2.0))
    copies = step_record("one")
    copies["variants"]["copies K=4 N=8"] = fine["variants"]["shared K=4 N=8"]
    assert missing(tmp_path, copies)
    # Steps of a rehearsal count only in a rehearsal.
    assert missing(tmp_path, fine | {"quick": True}) and not missing(tmp_path, fine | {"quick": True}, toy=True)


def test_a_line_truncated_by_a_kill_does_not_affect_others(tmp_path):
    from bench.core.records import append_line, load, load_run, read_lines, save
    from bench.core.report import summary
    from bench.cuda.__main__ import missing_steps
    from bench.cuda.sections import Run

    path = tmp_path / "results.jsonl"
    assert read_lines(path) == []
    facts = {"cpu": "one", "threads": 2, "torch": "2", "commit": "a" * 40, "device": "cpu"}
    record = {"bench": "x", "case": "a", "variants": {}, "quick": True} | facts
    append_line(record, path)
    with path.open("a") as out:
        out.write('{"bench": "x", "ca')
    append_line(record | {"case": "b"}, path)
    append_line(
        {"bench": "section", "section": "s", "outcome": "passed", "seconds": 1, "reason": "", "tests": []}, path
    )
    assert len(path.read_text().splitlines()) == 4 and [line["bench"] for line in read_lines(path)] == [
        "x",
        "x",
        "section",
    ]
    with path.open("a") as out:
        out.write('{"bench": "step", "vari')
    assert [line["case"] for line in load_run(path)] == ["a", "b"]
    assert missing_steps(Run(path, path, True, {})) and "| s | passed |" in summary(path, tables=False)
    for bench, subject in (("media", "media"), ("discriminator", "heads")):
        file = tmp_path / "folder" / f"{bench}.jsonl"
        kind = {"quick": False, "bench": bench, "name" if bench == "media" else "case": "a"}
        own = {name: value for name, value in record.items() if name != "case"} | kind
        save(own, file.parent)
        with file.open("a") as out:
            out.write("{")
        save(own, file.parent)
        assert len(read_lines(file)) == 2 and len(file.read_text().splitlines()) == 3
        assert len(load(file.parent, subject)) == 1


def test_a_ceiling_is_the_median_of_the_last_half(monkeypatch):
    import torch

    from bench.core import launches

    counts = []

    def timed(run, device, calls):
        counts.append(calls)
        return [0.01] * (calls - calls // 2) + [0.02] * (calls // 2)

    monkeypatch.setattr(launches, "_timed", timed)
    assert launches.call_seconds(None, torch.device("cuda"), 1.0) == 0.02
    launches.call_seconds(None, torch.device("cpu"), 0.0)
    # A second has 100 calls of 10 ms each; without a stated time, few calls are counted.
    assert counts == [3, 3, 100, 3, 3, launches.LEAST_CALLS]
