"""Test the doctor: healthy and faulty recipes, faults planted in the rollout engine, and several processes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import tiny_settings
from train_runs import MINI, environment
from warm_process import run_program

from rmsd_fast.config import SettingsError
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages.checkup import examine
from rmsd_fast.stages.findings import Finding

CHECKS = ["packages", "device", "plan", "memory", "disk", "decoder", "prompts", "imitation", "noise", "log-probs"]
CHECKS += ["media", "stage 2", "evaluation", "new weights", "whole run"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture
def world():
    yield start()
    stop()


def run_doctor(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    return run_program("rmsd_fast.doctor", [*arguments], environment(), processes=processes, timeout_s=400)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_healthy_recipe(made: Path, tmp_path: Path, processes: int) -> None:
    arguments = [
        "quickstart",
        *MINI,
        "runtime.check_memory=true",
        f"output={tmp_path / 'runs'}",
        f"made.folder={made}",
        "--questions=2",
    ]
    done = run_doctor(*arguments, *(["--json"] if processes == 1 else []), processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert not (tmp_path / "runs").exists()
    if processes == 2:
        assert [line.split("  ")[0] for line in done.stdout.splitlines() if line[:1].strip()][:-1] == CHECKS
        assert done.stdout.splitlines()[-1].startswith("healthy")
        return
    result = json.loads(done.stdout)
    assert result["healthy"]
    findings = {finding["name"]: finding for finding in result["findings"]}
    assert list(findings) == CHECKS
    assert {finding["status"] for finding in findings.values()} == {"ok"}
    assert findings["log-probs"]["numbers"]["mean"] < 1e-5
    assert findings["new weights"]["numbers"]["mean"] < 1e-5
    assert findings["decoder"]["numbers"]["ffmpeg"] >= 4
    assert findings["media"]["numbers"]["trainer_change"] > 1e-4
    parts = [findings[name]["numbers"]["hours"] for name in ("imitation", "stage 2", "evaluation")]
    assert all(part > 0 for part in parts)
    assert findings["whole run"]["numbers"]["hours"] == pytest.approx(sum(parts))


def test_missing_inputs_are_a_fault(tmp_path: Path) -> None:
    done = run_doctor("quickstart", "made.enabled=false", f"output={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "MISSING: data.train" in done.stdout
    assert done.stdout.splitlines()[-1] == "not healthy: plan"


def test_different_log_probs_are_a_fault_that_does_not_end_the_examination(made: Path, world) -> None:
    found = findings_of(made, world, "rollout.parity_bound=1e-12", "rollout.parity_every=1")
    assert found["log-probs"].status == "fault" and "expected at most 1e-12" in found["log-probs"].text
    assert list(found)[-1] == "whole run"


def test_a_disk_that_cannot_be_written(made: Path, world) -> None:
    found = findings_of(made, world, "output=/proc/runs")
    assert found["disk"].status == "fault" and "/proc cannot be written" in found["disk"].text


def test_more_unusable_questions_than_a_run_accepts(made: Path, world) -> None:
    """A limit between the lengths of two prompts makes some of them unusable."""
    settings = tiny_settings(made, "stages=[distill]", "rollout.n=2", "distill.batch_size=2")
    found: list[Finding] = []
    settings.data.max_bad_share = 0.0
    examine(settings, world, 6, found.append)
    longest = next(f for f in found if f.name == "prompts").numbers["longest_tokens"]
    settings.data.max_prompt_tokens = longest - 1
    found.clear()
    examine(settings, world, 6, found.append)
    prompts = next(f for f in found if f.name == "prompts")
    assert prompts.status == "fault" and "data.max_bad_share=0" in prompts.text


def test_wrong_settings_and_arguments() -> None:
    done = run_doctor("quickstart", "rollout.n=0")
    assert done.returncode == 2 and "rollout.n" in done.stderr
    done = run_doctor("quickstart", "--questions=0")
    assert done.returncode == 2 and "--questions" in done.stderr


def findings_of(made: Path, world, *overrides: str) -> dict[str, Finding]:
    found: list[Finding] = []
    settings = tiny_settings(made, "stages=[distill]", "rollout.n=2", "distill.batch_size=2", *overrides)
    examine(settings, world, 2, found.append)
    return {finding.name: finding for finding in found}


@pytest.mark.parametrize("overrides", [(), ("model.adapter=lora", "distill.train_vision=false")], ids=["full", "lora"])
def test_an_engine_with_old_weights(made: Path, world, monkeypatch, overrides) -> None:
    """The log-probs agree at first and after the steps at a learning rate of 0, and not after the change."""
    generate, first = HfRollout.generate, {}

    def with_first_weights(self, model, *arguments, **keywords):
        weights = list(model.parameters())
        now = [weight.detach().clone() for weight in weights]
        old = first.setdefault("weights", now)
        with torch.no_grad():
            torch._foreach_copy_(weights, old)
            rollouts = generate(self, model, *arguments, **keywords)
            torch._foreach_copy_(weights, now)
        return rollouts

    monkeypatch.setattr(HfRollout, "generate", with_first_weights)
    found = findings_of(made, world, *overrides)
    assert [found[name].status for name in ("log-probs", "media", "new weights")] == ["ok", "ok", "fault"]
    assert "other weights" in found["new weights"].text
    assert found["new weights"].numbers["change"] > 3e-3


def test_an_update_that_changes_nothing_decides_nothing(made: Path, world, monkeypatch) -> None:
    monkeypatch.setattr("rmsd_fast.stages.rollout_checks.UPDATE_LRS", (0.0, 0.0))
    found = findings_of(made, world)
    assert found["new weights"].status == "warning" and "not decided" in found["new weights"].text


def test_a_plan_that_does_not_fit_ends_the_examination(made: Path, world, monkeypatch) -> None:
    def too_large(*arguments, **keywords):
        raise SettingsError("memory: expected at most 1.0 GiB per process, got a plan of 2.0 GiB")

    monkeypatch.setattr("rmsd_fast.stages.checkup.check_memory", too_large)
    found = findings_of(made, world)
    assert found["memory"].status == "fault" and "got a plan of 2.0 GiB" in found["memory"].text
    assert list(found)[-1] == "the rest"


def test_an_engine_that_does_not_see_the_media(made: Path, world, monkeypatch) -> None:
    """An engine may serve the features that it has cached for a prompt of the same text."""
    generate, cached = HfRollout.generate, {}

    def from_cache(self, model, prompts, sampling, **keywords):
        kept = [cached.setdefault(prompt.question.id, prompt) for prompt in prompts]
        return generate(self, model, kept, sampling, **{**keywords, "features": None})

    monkeypatch.setattr(HfRollout, "generate", from_cache)
    found = findings_of(made, world)
    assert (found["log-probs"].status, found["media"].status) == ("ok", "fault")
    assert "the engine does not see the media" in found["media"].text


def test_a_trainer_that_does_not_see_the_media(made: Path, world, monkeypatch) -> None:
    from rmsd_fast.stages import state as stage_state

    encode = stage_state.encode_media

    def gray(model, prompts, **keywords):
        media = [
            tuple(replace(f, pixels=torch.full_like(f.pixels, 128), key="") for f in prompt.media) for prompt in prompts
        ]
        return encode(model, [replace(p, media=m) for p, m in zip(prompts, media, strict=True)], **keywords)

    monkeypatch.setattr(stage_state, "encode_media", gray)
    found = findings_of(made, world)
    assert found["media"].status == "fault"
    assert "the trainer does not see them" in found["media"].text


def test_questions_that_cannot_be_read(made: Path, world) -> None:
    found = findings_of(made, world, "data.max_prompt_tokens=20")
    assert found["prompts"].status == "fault"
    assert "stage 2" not in found
