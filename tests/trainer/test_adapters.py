"""Test training with LoRA adapters: the numbers of policy, reference and discriminator on one shared backbone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from material import tiny_material, tiny_settings
from safetensors.torch import load_file
from train_runs import forget_steps, metrics, mini_arguments, only_run, run_train

from rmsd_fast.config import SettingsError
from rmsd_fast.models.adapters import DISCRIMINATOR, POLICY, adapted_layers, merged_weights
from rmsd_fast.models.discriminator_folder import load_discriminator
from rmsd_fast.models.export import export_student
from rmsd_fast.models.students import load_student
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, policy_pass
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.passes import passes

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")
LORA = ("model.adapter=lora", "model.lora_rank=4", "distill.train_vision=false", "sft.train_vision=false")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


def randomize(model, name, seed=0):
    """Give an adapter weights that change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        weight = layer.lora_B[name].weight
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))


def state_of(folder, material, world, *overrides):
    state = build_distillation(material.model_path, tiny_settings(folder, *SMALL, *LORA, *overrides), world, material)
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].has_teacher][:4]
    return state, prompts


def gradients_of_a_step(state, prompts, monkeypatch):
    """Return metrics and the gradients that the optimizers of a step would apply, by parameter name."""
    from deepspeed.utils import safe_get_full_grad

    seen: dict[str, torch.Tensor] = {}

    def keep(engines):
        for engine in engines:
            for name, param in engine.module.named_parameters():
                if name in engine.names:
                    seen[f"{type(engine.module).__name__}.{name}"] = safe_get_full_grad(param).clone()
            engine.discard()
        return [0.0] * len(engines), True

    monkeypatch.setattr(distill, "apply_or_discard", keep)
    result = distill.step(state, prompts, 0)
    return result.metrics, seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backbone_gives_the_numbers_of_separate_models(folder, material, world, monkeypatch, checkpointing):
    """Losses and gradients of all adapters do not depend on whether the discriminator shares the policy's backbone."""
    results = []
    for mode in ("separate", "shared"):
        overrides = (f"discriminator.mode={mode}", f"model.gradient_checkpointing={checkpointing}".lower())
        state, prompts = state_of(folder, material, world, *overrides, "discriminator.head=random")
        randomize(state.student.model, POLICY)
        randomize(state.discriminator.module.model, DISCRIMINATOR, seed=1)
        assert (state.discriminator.module.model is state.student.model) == (mode == "shared")
        results.append(gradients_of_a_step(state, prompts, monkeypatch))
    (metrics, gradients), (shared_metrics, shared_gradients) = results
    machine = ("seconds", "rate", "memory")
    for name, value in metrics.items():
        if not name.startswith(machine) and value is not None:
            assert shared_metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert metrics["policy/kl"] > 0
    assert gradients.keys() == shared_gradients.keys()
    assert any(name.startswith("Policy.") for name in gradients)
    assert any(name.endswith("value_weight") for name in gradients)
    for name, gradient in gradients.items():
        assert ("lora_" in name) or name.startswith("Discriminator.value_"), name
        assert torch.allclose(shared_gradients[name], gradient, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    ("mode", "packing", "checkpointing", "zero_stage"),
    [
        ("shared", "shared", "true", 2),
        ("shared", "shared", "false", 1),
        ("shared", "padded", "true", 1),
        ("shared", "padded", "false", 2),
        ("separate", "shared", "true", 0),
        ("separate", "padded", "false", 0),
    ],
)
def test_adapters_give_the_numbers_of_merged_models(
    folder, material, world, monkeypatch, mode, packing, checkpointing, zero_stage
):
    """Separate models with merged weights have the same rollouts, scores and losses, and the gradient of their weights
    gives those of the adapters by the chain rule: W + s B A has dB = s dW A' and dA = s B' dW."""
    common = (f"packing={packing}", f"model.gradient_checkpointing={checkpointing}", "discriminator.head=random")
    overrides = (*common, f"discriminator.mode={mode}", f"runtime.zero_stage={zero_stage}")
    state, prompts = state_of(folder, material, world, *overrides)
    models = {POLICY: state.student.model, DISCRIMINATOR: state.discriminator.module.model}
    for seed, (name, model) in enumerate(models.items()):
        randomize(model, name, seed)
    plain_settings = tiny_settings(folder, *SMALL, *common, "distill.train_vision=false", "runtime.zero_stage=0")
    plain = build_distillation(material.model_path, plain_settings, world, material)
    for name, model in ((POLICY, plain.student.model), (DISCRIMINATOR, plain.discriminator.module.model)):
        merged = merged_weights(models[name], name)
        for path, weight in model.state_dict().items():
            weight.copy_(merged[path])
    metrics, gradients = gradients_of_a_step(state, prompts, monkeypatch)
    expected, dense = gradients_of_a_step(plain, prompts, monkeypatch)
    assert metrics["policy/kl"] > 0 and metrics["tokens"] == expected["tokens"]
    for name, value in expected.items():
        if value is not None and not name.startswith(
            ("seconds", "rate", "memory", "policy/grad", "discriminator/grad")
        ):
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    compared = 0
    for name, module in ((POLICY, "Policy"), (DISCRIMINATOR, "Discriminator")):
        for path, layer in adapted_layers(models[name]).items():
            a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            whole = dense[f"{module}.model.{path}.weight"]
            for part, value in (("lora_A", scale * b.T @ whole), ("lora_B", scale * whole @ a.T)):
                got = gradients[f"{module}.model.{path}.{part}.{name}.weight"]
                # Merging rounds the weights to float32, which changes gradients by up to 8e-6 of the largest.
                assert (got - value).abs().max() < 2e-5 * value.abs().max(), (path, part)
                compared += 1
    assert compared == 2 * 2 * 7 * state.student.model.config.text_config.num_hidden_layers


def test_the_reference_is_the_backbone_without_adapters(folder, material, world):
    """It scores rollouts exactly as the stage-1 student does, whatever the adapters have learned."""
    state, prompts = state_of(folder, material, world, "discriminator.mode=shared")
    plain = build_distillation(material.model_path, tiny_settings(folder, *SMALL), world, material)
    rollouts, features = distill.roll_out(state, prompts, 0)
    groups = [
        distill.make_group(prompt, drawn, state.targets[prompt.question.id], state.settings, step=0)
        for prompt, drawn in zip(prompts, rollouts, strict=True)
    ]
    expected = [read.ref_logp for read in policy_pass.reference_pass(plain, groups, features)]
    for name in (POLICY, DISCRIMINATOR):
        randomize(state.student.model, name)
    for passed, reference in zip(policy_pass.reference_pass(state, groups, features), expected, strict=True):
        assert torch.equal(passed.ref_logp, reference)
    # The policy differs from it, and generation uses the policy.
    changed, _ = distill.roll_out(state, prompts, 0)
    assert [r.text for drawn in changed for r in drawn] != [r.text for drawn in rollouts for r in drawn]


def test_merged_weights_and_adapter_alone_give_the_same_logits(folder, material, world, tmp_path):
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    state, _ = state_of(folder, material, world, "discriminator.mode=shared")
    student = state.student
    for seed, name in enumerate((POLICY, DISCRIMINATOR)):
        randomize(student.model, name, seed)
    export_student(student, tmp_path / "export", stage="distill", adapter_base=material.model_path)
    ids = torch.arange(40).reshape(2, 20) + 100
    merged = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "export", dtype="float32")
    base = Qwen3VLForConditionalGeneration.from_pretrained(material.model_path, dtype="float32")
    with torch.no_grad():
        before = base(input_ids=ids).logits
        alone = PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")(input_ids=ids).logits
        together = merged(input_ids=ids).logits
        expected = load_student(tmp_path / "export", dtype="float32").model(input_ids=ids).logits
    config = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == material.model_path
    assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5) and torch.equal(expected, together)
    assert not torch.allclose(before, together, rtol=1e-2, atol=1e-2)
    # lora_alpha / lora_rank = 32 / 4.
    path, layer = next(iter(adapted_layers(student.model).items()))
    product = 8 * layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight
    weight = load_file(tmp_path / "export" / "model.safetensors")[f"{path}.weight"]
    assert torch.allclose(weight, layer.get_base_layer().weight + product, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_head_alone_is_trained_on_the_frozen_student(folder, material, world, monkeypatch, checkpointing):
    overrides = ("discriminator.mode=head", f"model.gradient_checkpointing={checkpointing}".lower())
    state, prompts = state_of(folder, material, world, *overrides)
    assert state.discriminator.module.model is state.student.model
    randomize(state.student.model, POLICY)
    _, gradients = gradients_of_a_step(state, prompts, monkeypatch)
    assert {name for name in gradients if name.startswith("Disc")} == {
        "Discriminator.value_weight",
        "Discriminator.value_bias",
    }
    # All scores are equal at first, so the bias has no gradient yet.
    assert bool(gradients["Discriminator.value_weight"].any())
    assert any(bool(gradient.any()) for name, gradient in gradients.items() if name.startswith("Policy"))
    # Without adapters, the head uses the frozen reference, whose hidden states are those of the backbone.
    settings = tiny_settings(folder, *SMALL, *overrides)
    plain = build_distillation(material.model_path, settings, world, material)
    assert plain.discriminator.module.model is plain.reference.model
    scores = []
    for other in (state, plain):
        other.discriminator.module.value_weight.data.fill_(0.1)
        rows = next(iter(passes(other, prompts, [[torch.arange(5) + 100]] * len(prompts), None)))
        scores.append(other.discriminator(rows.prompts, rows.rows, rows.features).detach())
    assert torch.allclose(*scores, rtol=1e-6, atol=1e-7) and float(scores[0].std()) > 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


def run_arguments(folder, made, *overrides):
    late = ("discriminator.mode=shared", "discriminator.head=random", "checkpoint.every_steps=2")
    return mini_arguments(folder, made, *LORA, *late, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("whole")
    done = run_train(run_arguments(folder, made))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder)


def test_a_run_with_adapters_saves_only_their_states_and_resumes_exactly(whole, tmp_path):
    checkpoint = whole / "checkpoints" / "step_8"
    buffers = {name for name, _ in load_student(whole / "export", dtype="float32").model.named_buffers()}
    student = load_file(whole / "export" / "model.safetensors")
    total = sum(tensor.numel() for tensor in student.values())
    for name in ("policy", "discriminator"):
        trained = json.loads((checkpoint / "engines" / name / "engine.json").read_text())["trainable"]
        assert all(".lora_" in weight or weight.startswith("value_") for weight in trained)
        states = load_file(checkpoint / "engines" / name / "rank_00000.safetensors")
        assert sum(tensor.numel() for tensor in states.values()) < total
        saved = load_file(checkpoint / "engines" / name / "weights.safetensors")
        assert set(trained) <= saved.keys()
        assert {weight.removeprefix("model.") for weight in saved.keys() - set(trained)} <= buffers
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    forget_steps(run, after=8)
    done = run_train(["--resume", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    again = load_file(run / "export" / "model.safetensors")
    stage1 = load_file(run / "stage1" / "model.safetensors")
    assert all(torch.equal(again[name], student[name]) for name in student)
    assert again.keys() == stage1.keys() and any(not torch.equal(again[name], stage1[name]) for name in again)
    assert metrics(run) == metrics(whole)


def test_two_processes_train_shared_adapters_like_one(whole, made, tmp_path):
    done = run_train(run_arguments(tmp_path, made), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    compare_metrics(only_run(tmp_path), whole)


def test_two_processes_continue_adapters_of_one(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    forget_steps(run, after=6)
    done = run_train(["--resume", str(run)], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    compare_metrics(run, whole)


@pytest.mark.parametrize("kl", ["k3", "full"])
def test_zero_3_splits_backbone_and_adapters_and_gives_the_same_numbers(folder, material, world, kl):
    """The reference is computed in the policy's engine, also with the exact KL, which reads the reference's head."""
    results = []
    for zero_stage in (2, 3):
        overrides = ("discriminator.head=random", f"distill.kl={kl}", "distill.kl_coef=0.1")
        state, prompts = state_of(folder, material, world, *overrides, f"runtime.zero_stage={zero_stage}")
        for engine in (state.policy, state.discriminator):
            engine.set_lr(1e-2)
        results.append([distill.step(state, prompts, number).metrics for number in range(3)])
    assert results[0][2]["policy/kl"] > 1e-4
    for step, expected in zip(results[1], results[0], strict=True):
        for name, value in expected.items():
            if value is not None:
                # The metrics near 0 are differences of numbers near 1.
                assert step[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


def test_two_processes_split_a_backbone_with_adapters_and_resume_exactly(made, tmp_path):
    separate = (*LORA, "discriminator.head=random", "checkpoint.every_steps=2")
    arguments = {name: mini_arguments(tmp_path / name, made, *separate, "distill.steps=3") for name in ("one", "two")}
    for name, processes in (("one", 1), ("two", 2)):
        more = ["runtime.zero_stage=3"] if name == "two" else []
        done = run_train([*arguments[name], *more], processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    compare_metrics(two, one)
    exports = [load_file(run / "export" / "model.safetensors") for run in (one, two)]
    assert all(torch.allclose(exports[1][name], exports[0][name], atol=1e-5) for name in exports[0])
    run = Path(shutil.copytree(two, tmp_path / "again"))
    forget_steps(run, after=6)
    done = run_train(["--resume", str(run)], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    again = load_file(run / "export" / "model.safetensors")
    assert all(torch.equal(again[name], exports[1][name]) for name in again)
    assert metrics(run) == metrics(two)


def compare_metrics(run, whole):
    for line, expected in zip(metrics(run), metrics(whole), strict=True):
        for name in ("loss", "discriminator/loss", "policy/loss", "policy/kl", "policy/grad_norm"):
            if expected.get(name) is not None:
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (name, expected["step"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["discriminator.mode=shared"], "discriminator.mode=shared: expected model.adapter=lora"),
        (["model.lora_rank=8"], "model.lora_rank has no effect: model.adapter=none"),
        (["model.adapter=lora", "model.lora_rank=0"], "model.lora_rank: expected at least 1"),
        (["model.adapter=lora"], "sft.train_vision: expected false with model.adapter=lora"),
        ([*LORA, "distill.train_vision=true"], "distill.train_vision: expected false"),
        ([*LORA, "model.lora_targets=[lm_head]"], "model.lora_targets: expected layers of the language model's body"),
        ([*LORA, "model.lora_targets=[]"], "model.lora_targets: expected one or more layers"),
        (
            [*LORA, "runtime.zero_stage=3", "discriminator.mode=shared"],
            "runtime.zero_stage: expected at most 2 with discriminator.mode=shared, since ZeRO-3 cannot split",
        ),
        (
            [*LORA, "runtime.zero_stage=3", "discriminator.mode=head"],
            "runtime.zero_stage: expected at most 2 with discriminator.mode=head",
        ),
        (["discriminator.mode=head", "runtime.zero_stage=3"], "runtime.zero_stage: expected 0, 1 or 2 with discrim"),
        (
            [*LORA, "stages=[sft,control]", "distill.train_vision=true"],
            "distill.train_vision: expected false with model.adapter=lora",
        ),
        (
            [*LORA, "discriminator.mode=shared", "runtime.zero_stage=0"],
            "runtime.zero_stage: expected 1 or 2 with discriminator.mode=shared",
        ),
    ],
)
def test_settings_that_adapters_cannot_have_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=re.escape(says)):
        load_settings("quickstart", overrides)


def test_settings_that_adapters_can_have_are_accepted():
    without = ["model.adapter=none", "stages=[sft]"]
    assert load_settings("rmsd_qwen3vl_4b_lora", without).discriminator.mode == "shared"
    load_settings("quickstart", ["discriminator.mode=head", "runtime.zero_stage=3", "distill.kl_coef=0"])


def test_an_unknown_target_is_refused(folder, material, world):
    with pytest.raises(SettingsError, match=r"model\.lora_targets: .*'up_proj'.* got 'w1'; leave it out"):
        state_of(folder, material, world, "model.lora_targets=[q_proj,w1]")


def test_a_finished_run_writes_its_discriminator_afterwards(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    done = run_train(["--resume", str(run), "--allow-changes", "discriminator.export=true"])
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(run / "checkpoints" / "step_9" / "engines" / "discriminator" / "weights.safetensors")
    discriminator, _ = load_discriminator(run / "discriminator", dtype="float32")
    assert torch.equal(discriminator.value_weight, saved["value_weight"]) and discriminator.value_weight.any()
    assert metrics(run) == metrics(whole) and not (whole / "discriminator").exists()
