"""Test a stage-2 step and a whole run with DeepSpeed on CUDA, each in its own process.

python tests/trainer/test_stages_cuda.py PACKING DTYPE      # metrics of the step as JSON, on CUDA if available
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import environment, metrics, mini_arguments, only_run, run_train

PREFIX, RESPONSE, N, K = 512, 24, 3, 2


def step_metrics(packing: str, dtype: str) -> dict[str, float]:
    """Take one step of policy and discriminator on given rollouts, so that sampling cannot differ."""
    from bench.step.models import SMALL, make_prompts, make_state, set_teacher, settings_of
    from bench.step.way import Given
    from rmsd_fast.runtime.process_group import start, stop
    from rmsd_fast.stages import distill

    world = start()
    settings = settings_of(SMALL, packing, PREFIX, RESPONSE, K, N, f"model.dtype={dtype}")
    state = make_state(SMALL, settings, world)
    prompts = make_prompts(state, PREFIX, 2)
    set_teacher(state, prompts, RESPONSE, K)
    state.rollouts = Given(state.builder, RESPONSE)
    found = distill.step(state, prompts, 0).metrics
    stop()
    return {**found, "on_cuda": float(world.device.type == "cuda")}


def in_a_process(packing: str, dtype: str, device: str) -> dict[str, float]:
    own = environment(device)
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "tests" / "helpers"), own.get("PYTHONPATH", "")]
    own["PYTHONPATH"] = ":".join(filter(None, paths))
    command = [sys.executable, __file__, packing, dtype]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("on_cuda") == (device == "cuda")
    return found


def close(found: dict[str, float], expected: dict[str, float], relative: float, absolute: float) -> None:
    assert found.keys() == expected.keys()
    # Padded rows compute more tokens.
    for name in expected.keys() - {"tokens_computed"}:
        if expected[name] is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(expected[name], rel=relative, abs=absolute), name
    assert expected["policy/grad_norm"] > 1e-3 and expected["discriminator/grad_norm"] > 1e-3


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> dict[str, float]:
    """Compute the result once, also for all processes of pytest-xdist together."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each process has a subfolder of the folder of the run.
        folder = folder.parent
    found = folder / "step-on-cpu.json"
    with (folder / "step-on-cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(in_a_process("shared", "float32", "cpu")))
    return json.loads(found.read_text())


def test_a_step_trains_policy_and_discriminator(on_cpu) -> None:
    close(in_a_process("padded", "float32", "cpu"), on_cpu, 2e-4, 2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_a_step_on_cuda_equals_the_cpu(on_cpu, packing) -> None:
    close(in_a_process(packing, "float32", "cuda"), on_cpu, 2e-3, 2e-4)


@pytest.mark.cuda
def test_a_bfloat16_step_on_cuda_is_close_to_float32(on_cpu) -> None:
    close(in_a_process("shared", "bfloat16", "cuda"), on_cpu, 8e-2, 2e-2)


@pytest.mark.cuda
def test_a_whole_run_on_cuda(tmp_path) -> None:
    """The run has both stages with the warm-up between them, the evaluation and the export."""
    made = tmp_path / "made"
    done = run_train(mini_arguments(tmp_path / "runs", made, "model.dtype=bfloat16"), device="cuda", timeout_s=140)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path / "runs")
    lines = metrics(run)
    assert [line["stage"] for line in lines] == [*["sft"] * 3, "warm_up", *["distill"] * 5]
    facts = json.loads((run / "run.json").read_text())
    assert "CPU" not in facts["hardware"] and facts["losses"] == "triton"
    assert (run / "export" / "model.safetensors").stat().st_size > 0


if __name__ == "__main__":
    print(json.dumps(step_metrics(*sys.argv[1:])))
