"""Test dumps and replays as a user starts them: whole runs in their own processes, killed, resumed and divided."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_runs import command, environment, metrics, mini_arguments, only_run, run_train, start_train
from warm_process import Fork

from rmsd_fast.rollout.dump import dumped_steps, read_info, read_step

pytestmark = pytest.mark.timeout(900)

# With a zero head, the first gradient of the head's bias is a rounding error, which AdamW turns into a visible step.
SHORT = ("sft.steps=1", "sft.warmup_steps=0", "distill.steps=3", "distill.warmup_steps=0", "discriminator.head=random")
# The evaluations are not tested here.
SHORT += ("made.train_clips=12", "evaluate.max_questions=1")
# A replay does not have the metrics of this check.
SHORT += ("rollout.parity_every=0",)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def first(tmp_path_factory, made) -> tuple[Path, Path]:
    """Return a run of one process and its dump."""
    folder = tmp_path_factory.mktemp("first")
    done = run_train(mini_arguments(folder / "runs", made, *SHORT, f"rollout.dump={folder / 'dump'}"))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder / "runs"), folder / "dump"


def late_arguments(folder: Path, made: Path, run: Path, *overrides: str) -> list[str]:
    """Return the arguments of a run that begins with the stage-1 student of another run."""
    unused = ("sft.", "made.student", "stages=")
    kept = [argument for argument in mini_arguments(folder, made, *SHORT) if not argument.startswith(unused)]
    return [*kept, "stages=[warm_up,distill]", f"model.path={run / 'stage1'}", *overrides]


def replay_arguments(folder: Path, made: Path, first: tuple[Path, Path], *overrides: str) -> list[str]:
    run, dump = first
    unused = ("rollout.prompts_per_batch", "rollout.parity_every")
    kept = [argument for argument in late_arguments(folder, made, run) if not argument.startswith(unused)]
    return [*kept, "rollout.engine=replay", f"rollout.replay={dump}", *overrides]


def late_metrics(run: Path) -> list[dict]:
    return [line for line in metrics(run) if line["stage"] != "sft"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def start_and_wait(arguments: list[str], folder: Path, lines: int, *, processes: int = 1) -> subprocess.Popen | Fork:
    """Start a run, and wait until it has logged this number of steps."""
    if processes == 1:
        process = start_train(arguments)
    else:
        process = subprocess.Popen(
            command(arguments, processes=processes),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    for _ in range(6000):
        found = list(folder.glob("*/metrics.jsonl"))
        if found and len(found[0].read_bytes().splitlines()) >= lines:
            return process
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)
    raise AssertionError("the run wrote no metrics")


def test_a_killed_and_resumed_replay_equals_the_run_that_wrote_the_dump(first, made, tmp_path):
    run, dump = first
    before = {path.name: path.read_bytes() for path in dump.iterdir()}
    arguments = replay_arguments(tmp_path, made, first, "checkpoint.every_steps=1")
    process = start_and_wait(arguments, tmp_path, 2)
    process.kill()
    process.wait()
    again = only_run(tmp_path)
    assert not (again / "export").exists()
    done = run_train(["--resume", str(again)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rollout.replay: 4 steps of quickstart-" in done.stderr
    assert late_metrics(again) == late_metrics(run) and len(late_metrics(run)) == 4
    late = [line for line in (run / "rollouts.jsonl").read_text().splitlines() if '"sft"' not in line]
    assert (again / "rollouts.jsonl").read_text().splitlines() == late
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(run).items())
    assert {path.name: path.read_bytes() for path in dump.iterdir()} == before


def test_two_processes_replay_the_dump_of_one(first, made, tmp_path):
    run, _ = first
    done = run_train(replay_arguments(tmp_path, made, first), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(late_metrics(run), late_metrics(only_run(tmp_path)), strict=True):
        assert one.keys() == two.keys()
        # Fillers read tokens of another micro-batch.
        for key, value in ((key, value) for key, value in one.items() if key != "tokens_computed"):
            # The correlation is a ratio of small differences of scores, which amplifies rounding errors.
            close = 1e-4 if key == "discriminator/length_correlation" else 1e-5
            assert value == (pytest.approx(two[key], rel=close, abs=close) if isinstance(value, float) else two[key])


def test_a_killed_dump_is_continued_by_another_number_of_processes(first, made, tmp_path):
    """Both processes write. The resumed run writes no step twice, and rollouts are those of one process."""
    run, dump = first
    path, runs = tmp_path / "dump", tmp_path / "runs"
    arguments = late_arguments(runs, made, run, f"rollout.dump={path}", "checkpoint.every_steps=1")
    process = start_and_wait(arguments, runs, 2, processes=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The ranks end soon after their launcher.
    time.sleep(1)
    steps = dumped_steps(path)
    assert steps[:2] == [0, 1]
    done = run_train(["--resume", str(only_run(runs))])
    assert done.returncode == 0, done.stderr[-3000:]
    key = read_info(dump, "rollout.dump").key
    # The student of both runs is the same.
    assert read_info(path, "rollout.dump").key == key
    assert dumped_steps(path) == dumped_steps(dump) == [0, 1, 2, 3]
    assert not list(path.glob(".*.tmp"))
    for step in range(4):
        one, two = (read_step(folder, step, key) for folder in (dump, path))
        assert one.questions == two.questions
        for name, column in one.columns.items():
            assert torch.allclose(column, two.columns[name], atol=1e-5), name


def test_a_damaged_dump_is_refused_before_a_run_folder_is_created(first, made, tmp_path):
    run, dump = first
    other = Path(shutil.copytree(dump, tmp_path / "other"))
    (other / "step_000002.safetensors").write_bytes(b"damaged")
    done = run_train(replay_arguments(tmp_path / "runs", made, (run, other)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"rmsd_fast.train: {other / 'step_000002.safetensors'}: damaged" in done.stderr
    assert not (tmp_path / "runs").exists()
