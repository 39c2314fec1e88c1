"""Test rollout servers with real vLLM on the CPU: equal to vLLM in the training process, and what ends a run.

These tests run with a Python that has vLLM and the trainer (`make test-vllm`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import tiny_material, tiny_settings
from rollout_servers import ServerProcess
from train_runs import environment, forget_steps, metrics, mini_arguments, only_run, run_train
from vllm_world import vllm_world

from rmsd_fast.models.adapters import POLICY, adapted_layers
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.server_client import server_status
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
OVERRIDES = ("rollout.n=3", "rollout.max_new_tokens=10", "data.max_prompt_tokens=500", "micro_tokens=600")
OVERRIDES += ("rollout.vllm_kv_cache_gib=0.1", "model.dtype=float32", "runtime.zero_stage=2", "rollout.parity_every=1")
LORA = ("model.adapter=lora", "model.lora_rank=4", "sft.train_vision=false", "distill.train_vision=false")
GREEDY = Sampling(n=1, temperature=0.0, max_new_tokens=10)
SAMPLING = Sampling(n=3, temperature=0.8, max_new_tokens=10, seed=3, step=4)
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def world():
    with vllm_world() as world:
        yield world


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm-server")
    return SimpleNamespace(folder=folder, inputs=tiny_material(folder))


def program(recipe_arguments):
    return [sys.executable, "-m", "rmsd_fast.serve_rollouts", "quickstart", *recipe_arguments]


@pytest.fixture(scope="module")
def served(material):
    arguments = [f"model.path={material.inputs.model_path}", *OVERRIDES]
    with ServerProcess(program(arguments), material.folder / "server.log") as found:
        yield found


def build(material, world, engine, *overrides):
    settings = tiny_settings(material.folder, *OVERRIDES, *engine, *overrides)
    state = build_distillation(material.inputs.model_path, settings, world, material.inputs)
    state.timer = PhaseTimer(torch.device("cpu"))
    return state


@contextmanager
def connected(material, world, served, *overrides):
    """Yield the state of a run, and end its connection."""
    state = build(material, world, ("rollout.engine=vllm_server", f"rollout.server_urls=[{served.url}]"), *overrides)
    try:
        yield state
    finally:
        state.rollouts.close()
        state.policy.close()


def prompts_of(state, material):
    return [state.builder.build(q) for q in material.inputs.train if state.targets[q.id].has_teacher][:4]


def trained_rollouts(state, material):
    """Run steps of stage 2 with a high learning rate. Return their metrics, and rollouts with the later weights."""
    for layer in adapted_layers(state.student.model).values():
        adapter = layer.lora_B[POLICY].weight.data
        adapter.normal_(0, 0.05, generator=torch.Generator().manual_seed(adapter.numel()))
    state.policy.set_lr(1e-2)
    prompts = prompts_of(state, material)
    lines = [distill.step(state, prompts, number).metrics for number in range(3)]
    state.policy.module.activate()
    state.rollouts.update(state.policy, 3)
    return lines, state.rollouts.generate(state.student.model, prompts, SAMPLING)


@pytest.mark.parametrize("overrides", [(), (*LORA, "discriminator.mode=shared")], ids=["full", "adapters"])
def test_a_server_equals_vllm_in_the_training_process(material, world, served, overrides):
    with connected(material, world, served, *overrides) as state:
        lines, groups = trained_rollouts(state, material)
    state = build(material, world, ("rollout.engine=vllm",), *overrides)
    expected_lines, expected_groups = trained_rollouts(state, material)
    state.policy.close()
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line["parity/largest_difference"] < 1e-5 and abs(line["policy/engine_kl"]) < 1e-5
        assert line["policy/logp"] == pytest.approx(expected["policy/logp"], abs=ROUNDING)
        assert line["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-2)
    assert lines[-1]["policy/kl"] > 1e-4
    for group, expected_group in zip(groups, expected_groups, strict=True):
        for rollout, expected in zip(group, expected_group, strict=True):
            assert torch.equal(rollout.token_ids, expected.token_ids) and rollout.text == expected.text
            assert torch.allclose(rollout.logp, expected.logp, atol=ROUNDING)
            assert rollout.banned_mass == pytest.approx(expected.banned_mass, abs=1e-5)


def test_greedy_rollouts_are_those_of_hf(material, world, served):
    with connected(material, world, served) as state:
        with torch.no_grad():
            for param in state.student.model.model.language_model.parameters():
                param.add_(0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material)
        groups = state.rollouts.generate(state.student.model, prompts, GREEDY)
        hf = HfRollout(state.builder, prompts_per_batch=8, device=torch.device("cpu"))
        for (rollout,), (expected,) in zip(groups, hf.generate(state.student.model, prompts, GREEDY), strict=True):
            assert torch.equal(rollout.token_ids, expected.token_ids)
            # At temperature 0, both report log-probs at temperature 1.
            assert torch.allclose(rollout.logp, expected.logp, atol=ROUNDING)


def begin_long_rollouts(state, prompts, url):
    """Return the future of rollouts that the server has begun to sample."""
    # A server has no token, and vLLM needs seconds for 200 tokens of 8 responses.
    long = replace(SAMPLING, n=8, max_new_tokens=200)
    drawn = ThreadPoolExecutor(1).submit(state.rollouts.generate, state.student.model, prompts, long)
    while not server_status(url, "")["in_progress"] and not drawn.done():
        time.sleep(0.01)
    return drawn


def test_a_server_goes_on_after_a_run_that_ended_in_the_middle_of_its_rollouts(material, world, served):
    with connected(material, world, served) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material)
        drawn = begin_long_rollouts(state, prompts, served.url)
        ((connection, response),) = state.rollouts.sampler._connections
        response.close()
        connection.close()
        with pytest.raises(
            RolloutError, match=f"rollout server {served.url}: expected the connection of the run to st"
        ):
            drawn.result(60)
    with connected(material, world, served) as again:
        with pytest.raises(RolloutError, match="it holds those of no complete update"):
            again.rollouts.generate(again.student.model, prompts[:1], SAMPLING)
        again.rollouts.update(again.policy, 0)
        assert len(again.rollouts.generate(again.student.model, prompts, SAMPLING)) == len(prompts)


def test_a_second_server_on_a_port_is_refused_before_it_loads_the_model(material, served):
    own = [f"model.path={material.inputs.model_path}", *OVERRIDES, "--port", str(served.port)]
    done = subprocess.run(program(own), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "expected an address to listen on" in done.stderr, done.stderr[-3000:]
    assert "starting vLLM with" in served.log() and "starting vLLM with" not in done.stdout + done.stderr


RUN = ("rollout.vllm_kv_cache_gib=0.1", "model.dtype=float32", "rollout.parity_every=1", "distill.lr=1e-2")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Serve the student of small runs, one run after another. SIGTERM ends a server."""
    folder = tmp_path_factory.mktemp("mini")
    arguments = mini_arguments(folder / "runs", folder / "made", *RUN)
    with ServerProcess(program(arguments[1:]), folder / "server.log") as found:
        yield SimpleNamespace(url=found.url, made=folder / "made")
        assert found.end(signal.SIGTERM) == 0
        assert "stopped by SIGTERM: the server has ended" in found.log() and "Traceback" not in found.log()


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ("runtime.zero_stage=1", "checkpoint.every_steps=2", "checkpoint.keep=9")),
        (2, ("runtime.zero_stage=3",)),
        (2, LORA),
    ],
    ids=["full", "two processes with ZeRO-3", "two processes with adapters"],
)
def test_runs(mini, tmp_path, processes, overrides):
    """Whole runs, and a resumed run with the server that has been running all along."""
    engine = ("rollout.engine=vllm_server", f"rollout.server_urls=[{mini.url}]")
    arguments = mini_arguments(tmp_path / "runs", mini.made, *RUN, *engine, *overrides)
    done = run_train(arguments, processes=processes, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path / "runs")
    before = metrics(run)
    steps = [line for line in before if line["stage"] == "distill"]
    assert len(steps) == 5 and steps[-1]["policy/kl"] > 1e-6
    assert all(line["parity/largest_difference"] < 1e-5 for line in steps)
    if processes > 1:
        return
    forget_steps(run, after=6)
    done = run_train(["--resume", str(run)], timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # Rounding depends on which requests are decoded together.
    for line, expected in zip(metrics(run), before, strict=True):
        numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_a_server_that_is_killed_ends_the_run(material, world, tmp_path):
    """A server that is killed while it samples, one that was started again, and a run with the new one."""
    arguments = program([f"model.path={material.inputs.model_path}", *OVERRIDES])
    with ServerProcess(arguments, tmp_path / "first.log") as first, ExitStack() as stack:
        longer = ("data.max_prompt_tokens=300", "rollout.max_new_tokens=200")
        state = stack.enter_context(connected(material, world, first, *longer))
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material)
        drawn = begin_long_rollouts(state, prompts, first.url)
        first.kill()
        with pytest.raises(RolloutError, match=f"rollout server {first.url}: expected an answer, got .*--resume"):
            drawn.result(60)
        with ServerProcess(arguments, tmp_path / "second.log", port=first.port) as second:
            with pytest.raises(
                RolloutError, match="got one that was started again and has lost the weights of the run"
            ):
                state.rollouts.update(state.policy, 1)
            with connected(material, world, second) as again:
                again.rollouts.update(again.policy, 0)
                assert len(again.rollouts.generate(again.student.model, prompts, SAMPLING)) == len(prompts)
