"""Test training on a backbone in nf4: its numbers are those of a model with the dequantized weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from material import tiny_material, tiny_settings
from safetensors.torch import load_file, save_file
from train_runs import metrics, mini_arguments, only_run, run_train

from rmsd_fast.config import ModelError, NotInstalled, SettingsError
from rmsd_fast.models.adapters import DISCRIMINATOR, POLICY, START, activate, adapted_layers
from rmsd_fast.models.export import export_student
from rmsd_fast.models.folders import model_digests
from rmsd_fast.models.quantize import full_weight, quantize, quantized_layers
from rmsd_fast.models.students import load_student
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.build import build_distillation, build_imitation, load

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")
LORA = ("model.adapter=lora", "model.lora_rank=4", "distill.train_vision=false", "sft.train_vision=false")
NF4 = (*LORA, "model.quantize=nf4")


def needs_library() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'rmsd-fast[quantize]')")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def material(folder):
    needs_library()
    return tiny_material(folder)


@pytest.fixture(scope="module")
def dequantized(folder, material, world):
    """Return folders, by dtype, of the student with the dequantized weights of its language model."""
    return {dtype: write_dequantized(folder, material, world, dtype) for dtype in ("float32", "bfloat16")}


def write_dequantized(folder, material, world, dtype):
    student = load(material.model_path, tiny_settings(folder, *SMALL, *NF4, f"model.dtype={dtype}"), world)
    weights = load_file(Path(material.model_path) / "model.safetensors")
    layers = quantized_layers(student.model)
    # Seven linear layers in each of the two decoder layers.
    assert len(layers) == 14 and all(path.startswith("model.language_model.layers.") for path in layers)
    for path, layer in layers.items():
        weight = full_weight(layer)
        assert weight.dtype == getattr(torch, dtype)
        error = (weight - weights[f"{path}.weight"]).norm() / weight.norm()
        assert 0.02 < error < 0.15
        weights[f"{path}.weight"] = weight.contiguous()
    target = shutil.copytree(material.model_path, folder / f"dequantized-{dtype}")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def randomize(model, name, seed=0):
    """Give an adapter weights that change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        weight = layer.lora_B[name].weight
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))


def prompts_of(state, material):
    return [state.builder.build(q) for q in material.train if state.targets[q.id].has_teacher][:4]


def frozen(state):
    """Return copies of the weights of the backbone, with the dtype in which they are stored."""
    return {n: p.detach().clone() for n, p in state.policy.module.named_parameters() if ".lora_" not in n}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["shared", "head", "separate"])
def test_two_steps_of_each_stage_equal_those_of_the_dequantized_model(
    folder, material, dequantized, world, mode, dtype
):
    """Losses, KL, rewards and scores agree, the adapters move alike, and the frozen weights stay as they are."""
    results = []
    overrides = (f"discriminator.mode={mode}", f"model.dtype={dtype}", "discriminator.head=random")
    for path, kind in ((material.model_path, "nf4"), (dequantized[dtype], "none")):
        settings = tiny_settings(folder, *SMALL, *LORA, *overrides, f"model.quantize={kind}")
        state = build_imitation(path, settings, world, material, stage="sft")
        numbers = [sft.step(state, prompts_of(state, material), n).metrics for n in range(2)]
        state.policy.close()
        state = build_distillation(path, settings, world, material)
        prompts = prompts_of(state, material)
        before = frozen(state)
        assert ({p.dtype for p in before.values()} == {getattr(torch, dtype), torch.uint8}) == (kind == "nf4")
        numbers += [distill.warm_up_step(state, prompts, n).metrics for n in range(2)]
        for n in range(2):
            state.policy.set_lr(1e-3)
            numbers.append(distill.step(state, prompts, n).metrics)
        after = frozen(state)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        if mode != "separate":
            assert state.discriminator.module.model is state.student.model
        moved = {
            f"{path}.{part}": getattr(layer, part)[POLICY].weight.detach().clone()
            for path, layer in adapted_layers(state.student.model).items()
            for part in ("lora_A", "lora_B")
        }
        results.append((numbers, moved))
        for engine in (state.policy, state.discriminator):
            engine.close()
    (numbers, moved), (expected, expected_moved) = results
    tolerance = {"rel": 1e-5, "abs": 1e-6} if dtype == "float32" else {"rel": 2e-2, "abs": 2e-2}
    assert expected[-1]["policy/kl"] > 0
    for line, other in zip(numbers, expected, strict=True):
        for name, value in other.items():
            if value is not None and not name.startswith(("seconds", "rate", "memory")):
                assert line[name] == pytest.approx(value, **tolerance), name
    for name, weight in expected_moved.items():
        assert torch.allclose(moved[name].float(), weight.float(), rtol=1e-3, atol=1e-3), name


def test_rollouts_do_not_change_the_weights_of_training(folder, material, world):
    """In eval mode, bitsandbytes packs the weights of some CPUs in place unless it is told not to."""
    state = build_distillation(
        material.model_path, tiny_settings(folder, *SMALL, *NF4, "discriminator.mode=shared"), world, material
    )
    layers = quantized_layers(state.student.model)
    before = {path: (layer.weight.data.clone(), full_weight(layer)) for path, layer in layers.items()}
    distill.roll_out(state, prompts_of(state, material), 0)
    for path, layer in layers.items():
        assert torch.equal(layer.weight.data, before[path][0]) and torch.equal(full_weight(layer), before[path][1])
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def in_4_bits(path, dtype):
    """Return a model that transformers itself quantizes, as the manual shows it."""
    from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        path, quantization_config=config, dtype=getattr(torch, dtype), device_map="cpu"
    )
    for layer in quantized_layers(model).values():
        # Otherwise some CPUs compute in bfloat16.
        layer.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exports_give_the_logits_of_the_quantized_model(folder, material, dequantized, world, tmp_path, dtype):
    """Merged weights, the adapter on the dequantized base, and the student of the next stage give the same logits.

    The next stage trains a second adapter on the same base, and its export holds both.
    """
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    ids = torch.arange(40).reshape(2, 20) + 100
    settings = tiny_settings(
        folder, *SMALL, *NF4, "discriminator.mode=shared", f"model.dtype={dtype}", "packing=padded"
    )
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}

    def logits_of(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits.float()

    state = build_imitation(material.model_path, settings, world, material, stage="sft")
    base = logits_of(state.student.model)
    randomize(state.student.model, POLICY)
    first = logits_of(state.student.model)
    assert not torch.allclose(base, first, rtol=1e-2, atol=1e-2)
    export_student(state.student, tmp_path / "stage1", stage="sft", adapter_base=material.model_path)
    state.policy.close()

    late = build_distillation(str(tmp_path / "stage1"), settings, world, material)
    student = late.student
    torch.testing.assert_close(logits_of(student.model), first, **close)
    randomize(student.model, POLICY, seed=1)
    randomize(student.model, DISCRIMINATOR, seed=2)
    late.policy.module.activate()
    second = logits_of(student.model)
    assert not torch.allclose(second, first, rtol=1e-2, atol=1e-2)
    # The reference, without both new adapters, is the stage-1 student.
    activate(late.reference._adapted, late.reference.adapter)
    torch.testing.assert_close(logits_of(student.model), first, **close)
    trainable = {n for n, p in late.policy.module.named_parameters() if p.requires_grad}
    assert not any(f".{START}." in name for name in trainable | set(late.policy.names))
    export_student(student, tmp_path / "export", stage="distill", adapter_base=str(tmp_path / "stage1"))

    for export, expected, rank in (("stage1", first, 4), ("export", second, 8)):
        config = json.loads((tmp_path / export / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == material.model_path
        # lora_alpha / r stays the scale of the recipe.
        assert config["r"] == rank and config["lora_alpha"] / config["r"] == 32 / 4
        merged = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / export, dtype=getattr(torch, dtype))
        plain = Qwen3VLForConditionalGeneration.from_pretrained(dequantized[dtype], dtype=getattr(torch, dtype))
        again = load(str(tmp_path / export), settings, world)
        assert quantized_layers(again.model).keys() == quantized_layers(student.model).keys()
        torch.testing.assert_close(logits_of(merged), expected, **close)
        torch.testing.assert_close(logits_of(again.model), expected, **close)
        torch.testing.assert_close(
            logits_of(PeftModel.from_pretrained(plain, tmp_path / export / "adapter")), expected, **close
        )
        alone = PeftModel.from_pretrained(in_4_bits(material.model_path, dtype), tmp_path / export / "adapter")
        torch.testing.assert_close(logits_of(alone), expected, **close)
        assert logits_of(load_student(tmp_path / export, dtype=dtype).model).equal(logits_of(merged))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


def run_arguments(folder, made, *overrides):
    late = ("discriminator.mode=shared", "discriminator.head=random", "checkpoint.every_steps=2")
    return mini_arguments(folder, made, *NF4, *late, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made):
    needs_library()
    folder = tmp_path_factory.mktemp("whole")
    done = run_train(run_arguments(folder, made))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder)


def test_a_run_resumes_exactly(whole, tmp_path):
    states = load_file(whole / "checkpoints" / "step_8" / "engines" / "policy" / "weights.safetensors")
    assert not [name for name in states if f".{START}." in name or states[name].dtype == torch.uint8]
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step_9")
    shutil.rmtree(run / "export")
    for name in ("predictions/stage2.jsonl", "evaluation.json"):
        (run / name).unlink()
    done = run_train(["--resume", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()
    assert metrics(run) == metrics(whole)
    # Stage 2 depends on the adapter of stage 1, so a resume compares it too.
    assert "adapter/adapter_model.safetensors" in model_digests(whole / "stage1")


@pytest.mark.slow
def test_two_processes_train_like_one(whole, made, tmp_path):
    done = run_train(run_arguments(tmp_path, made), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, expected in zip(metrics(only_run(tmp_path)), metrics(whole), strict=True):
        for name in ("loss", "discriminator/loss", "policy/loss", "policy/kl", "policy/grad_norm"):
            if expected.get(name) is not None:
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (name, expected["step"])


def test_damaged_exports_are_refused(folder, material, world, tmp_path):
    settings = tiny_settings(folder, *SMALL, *NF4)
    state = build_imitation(material.model_path, settings, world, material, stage="sft")
    export_student(state.student, tmp_path / "export", stage="sft", adapter_base=str(tmp_path / "gone"))
    state.policy.close()
    with pytest.raises(ModelError, match=r"expected the base model of its adapter, .*gone, .*model\.quantize=none"):
        load(str(tmp_path / "export"), settings, world)
    config = tmp_path / "export" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "gone"), material.model_path))
    with pytest.raises(SettingsError, match=r"model\.lora_targets: expected the layers with adapters of the student"):
        other = tiny_settings(folder, *SMALL, *NF4, "model.lora_targets=[q_proj]")
        build_imitation(str(tmp_path / "export"), other, world, material, stage="sft")
    # The base was trained further, or replaced.
    other_base = shutil.copytree(material.model_path, tmp_path / "base")
    base = load_file(other_base / "model.safetensors")
    save_file({k: v * 1.02 for k, v in base.items()}, other_base / "model.safetensors", metadata={"format": "pt"})
    good = config.read_text()
    config.write_text(good.replace(material.model_path, str(other_base)))
    with pytest.raises(
        ModelError, match=r"expected the base model .*/base with which its adapter was trained, got oth"
    ):
        load(str(tmp_path / "export"), settings, world)
    config.write_text(good)
    assert quantized_layers(load(str(tmp_path / "export"), settings, world).model)
    weights = load_file(tmp_path / "export" / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "export" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="expected an adapter of .*, got other layers or shapes"):
        load(str(tmp_path / "export"), settings, world)
    (tmp_path / "export" / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="expected an export with its adapter, got a damaged one"):
        load(str(tmp_path / "export"), settings, world)
    config.write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json: expected the base model of the adapter"):
        load(str(tmp_path / "export"), settings, world)
    # The merged weights remain an ordinary model.
    assert load(str(tmp_path / "export"), tiny_settings(folder, *SMALL), world).model.dtype == torch.float32


def test_bytes_per_weight():
    """Half a byte, 1 / 64 for the scales of the blocks, and 4 / (64 * 256) for the scales of these."""
    needs_library()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"language_model": torch.nn.ModuleDict({"q": torch.nn.Linear(512, 256)})})
            self.visual = torch.nn.Linear(64, 64)

    model = Model()
    exact = model.model["language_model"]["q"].weight.detach().clone()
    quantize(model, torch.device("cpu"))
    ((path, layer),) = quantized_layers(model).items()
    state = layer.weight.quant_state
    held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert path == "model.language_model.q" and held / exact.numel() == 0.5 + 1 / 64 + 4 / (64 * 256)
    # Largest gap between two of the 16 levels, 0.304 of a block's largest weight, halved; the scales are rounded too.
    blocks = exact.reshape(-1, 64)
    assert ((full_weight(layer) - exact).reshape(-1, 64).abs().amax(1) < 0.16 * blocks.abs().amax(1)).all()
    inputs = torch.randn(3, 512, requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, full_weight(layer).sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.quantize=nf4"], "model.quantize=nf4: expected model.adapter=lora"),
        ([*NF4, "runtime.zero_stage=3"], "runtime.zero_stage: expected at most 2 with model.quantize=nf4"),
        ([*LORA, "model.quantize=int3"], "model.quantize: expected one of none, nf4, got 'int3'"),
    ],
)
def test_settings_that_quantized_weights_cannot_have_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=re.escape(says)):
        load_settings("quickstart", overrides)


def test_a_missing_library_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    says = r"model\.quantize=nf4: expected the package bitsandbytes, got none .*pip install 'rmsd-fast\[quantize\]'"
    with pytest.raises(NotInstalled, match=says):
        load("no model", tiny_settings(tmp_path, *NF4), None)
