"""Test training on a backbone in nf4: its numbers are those of a model with the dequantized weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from material import tiny_material, tiny_settings
from safetensors.torch import load_file, save_file
from train_runs import metrics, mini_arguments, only_run, run_train

from rmsd_fast.config import ModelError, NotInstalled, SettingsError
from rmsd_fast.files import file_digest
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models import adapters, folders
from rmsd_fast.models.adapters import DISCRIMINATOR, POLICY, START, activate, adapted_layers
from rmsd_fast.models.export import export_student
from rmsd_fast.models.folders import model_digests
from rmsd_fast.models.quantize import full_weight, quantize, quantized_layers
from rmsd_fast.models.students import load_student
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.build import build_distillation, build_imitation, load
from rmsd_fast.stages.material import prepare_material

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
def materials(folder, material):
    """Return the material with a student of each family."""
    texts = [json.loads(line)["text"] for line in Path(material.files["pool"]).read_text().splitlines()]
    other = folder / "qwen2_5_vl"
    build_tiny_student(other, texts=texts, layers=2, family="qwen2_5_vl")
    return {"qwen3_vl": material, "qwen2_5_vl": replace(material, model_path=str(other))}


@pytest.fixture(scope="module")
def dequantized(folder, materials, world):
    """Return a function to the folder of a student with the dequantized weights of its language model."""

    @cache
    def write(family, dtype):
        return write_dequantized(folder, materials[family], world, dtype)

    return write


def in_file(name):
    """Return the name in the files of Qwen2.5-VL of a weight of the language model."""
    return name.replace("model.language_model.", "model.")


def write_dequantized(folder, material, world, dtype):
    student = load(material.model_path, tiny_settings(folder, *SMALL, *NF4, f"model.dtype={dtype}"), world)
    weights = load_file(Path(material.model_path) / "model.safetensors")
    layers = quantized_layers(student.model)
    # Seven linear layers in each of the two decoder layers.
    assert len(layers) == 14 and all(path.startswith("model.language_model.layers.") for path in layers)
    for path, layer in layers.items():
        weight = full_weight(layer)
        assert weight.dtype == getattr(torch, dtype)
        name = next(name for name in (f"{path}.weight", in_file(f"{path}.weight")) if name in weights)
        error = (weight - weights[name]).norm() / weight.norm()
        assert 0.02 < error < 0.15
        weights[name] = weight.contiguous()
    target = shutil.copytree(material.model_path, folder / f"{student.family.config_class.model_type}-{dtype}")
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
    for path, kind in ((material.model_path, "nf4"), (dequantized("qwen3_vl", dtype), "none")):
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
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        path, quantization_config=config, dtype=getattr(torch, dtype), device_map="cpu"
    )
    for layer in quantized_layers(model).values():
        # Otherwise some CPUs compute in bfloat16.
        layer.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exports_give_the_logits_of_the_quantized_model(folder, materials, dequantized, world, tmp_path, dtype, family):
    """Merged weights, the adapter on the dequantized base, and the student of the next stage give the same logits.

    The next stage trains a second adapter on the same base, and its export holds both.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    material = materials[family]
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
    activate(adapted_layers(student.model).values(), None)
    torch.testing.assert_close(logits_of(student.model), first, **close)
    trainable = {n for n, p in late.policy.module.named_parameters() if p.requires_grad}
    assert not any(f".{START}." in name for name in trainable | set(late.policy.names))
    export_student(student, tmp_path / "export", stage="distill", adapter_base=str(tmp_path / "stage1"))

    for export, expected, rank in (("stage1", first, 4), ("export", second, 8)):
        config = json.loads((tmp_path / export / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == material.model_path
        # lora_alpha / r stays the scale of the recipe.
        assert config["r"] == rank and config["lora_alpha"] / config["r"] == 32 / 4
        torch_dtype = getattr(torch, dtype)
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / export, dtype=torch_dtype)
        plain = AutoModelForImageTextToText.from_pretrained(dequantized(family, dtype), dtype=torch_dtype)
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
def whole_of(tmp_path_factory, materials, made):
    """Return a function to the folder of a finished run with a student of a family."""

    @cache
    def train(family):
        folder = tmp_path_factory.mktemp(family)
        arguments = run_arguments(folder, made)
        if family != "qwen3_vl":
            arguments = [a for a in arguments if not a.startswith("made.student_")]
            arguments.append(f"model.path={materials[family].model_path}")
        done = run_train(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return only_run(folder)

    return train


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_run_resumes_exactly(whole_of, tmp_path, family):
    whole = whole_of(family)
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
    # The export names the files of the base with which the run started.
    fingerprints = json.loads((whole / "fingerprints.json").read_text())
    for export in ("stage1", "export", "checkpoints/step_8/export"):
        quantization = json.loads((whole / export / "adapter" / "quantization.json").read_text())
        assert quantization == {"quantize": "nf4", "dtype": "float32", "files": fingerprints["files"]["model"]}
    # Stage 2 depends on the adapter of stage 1, so a resume compares it too.
    assert "adapter/adapter_model.safetensors" in model_digests(whole / "stage1")


@pytest.mark.slow
def test_two_processes_train_like_one(whole_of, made, tmp_path):
    done = run_train(run_arguments(tmp_path, made), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, expected in zip(metrics(only_run(tmp_path)), metrics(whole_of("qwen3_vl")), strict=True):
        for name in ("loss", "discriminator/loss", "policy/loss", "policy/kl", "policy/grad_norm"):
            if expected.get(name) is not None:
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (name, expected["step"])


@pytest.fixture
def exported(folder, material, world, tmp_path):
    """Return the settings and the export of a quantized run, and a copy of the base that it was trained on."""
    base, export = tmp_path / "base", tmp_path / "export"
    shutil.copytree(material.model_path, base)
    settings = tiny_settings(folder, *SMALL, *NF4, "model.dtype=float32")
    state = build_imitation(str(base), settings, world, material, stage="sft")
    export_student(state.student, export, stage="sft")
    state.policy.close()
    return settings, export, base


def test_damaged_exports_are_refused(folder, material, world, exported):
    settings, export, base = exported
    config = export / "adapter" / "adapter_config.json"
    quantization = export / "adapter" / "quantization.json"
    assert quantized_layers(load(str(export), settings, world).model)
    good = config.read_text()
    config.write_text(good.replace(str(base), "/gone"))
    with pytest.raises(ModelError, match=r"expected the base model /gone .*, got: .*'/gone'.*model\.quantize=none"):
        load(str(export), settings, world)
    config.write_text(good)
    says = r"model\.lora_targets: expected \['down_proj', .*'v_proj'\], .*, got \['q_proj'\]; set model\.lora_targets="
    with pytest.raises(SettingsError, match=says + r"\[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj\]"):
        other = tiny_settings(folder, *SMALL, *NF4, "model.dtype=float32", "model.lora_targets=[q_proj]")
        build_imitation(str(export), other, world, material, stage="sft")
    weights = load_file(export / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), export / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="expected an adapter of .*, got other layers or shapes"):
        load(str(export), settings, world)
    (export / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="expected an export with its adapter, got a damaged one"):
        load(str(export), settings, world)
    for path in (config, quantization):
        for content in ("{", "{}", "[]"):
            path.write_text(content)
            with pytest.raises(ModelError, match=rf"{path.name}: expected the base model of the adapter"):
                load(str(export), settings, world)
    # The merged weights remain an ordinary model.
    plain = tiny_settings(folder, *SMALL, "model.dtype=float32")
    assert load(str(export), plain, world).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("factor", "where"),
    [
        (1.005, ""),
        (3, "model.visual."),
        (3, "model.language_model.layers.1.mlp."),
        (1 + 2**-20, "model.language_model.layers.0.self_attn.q_proj."),
    ],
)
def test_any_change_of_the_base_is_refused(world, exported, factor, where):
    settings, export, base = exported
    weights = load_file(base / "model.safetensors")
    assert any(name.startswith(where) for name in weights)
    changed = {name: weight * factor if name.startswith(where) else weight for name, weight in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    says = (
        rf"expected the base model {base} with which .*, got a changed file {base}/model\.safetensors; restore the base"
    )
    with pytest.raises(ModelError, match=says):
        load(str(export), settings, world)


def test_other_files_and_another_dtype_of_the_base_are_refused(folder, world, exported):
    settings, export, base = exported
    with pytest.raises(
        SettingsError, match=r"model\.dtype: expected float32, .*, got bfloat16; set model\.dtype=float32"
    ):
        load(str(export), tiny_settings(folder, *SMALL, *NF4, "model.dtype=bfloat16"), world)
    (base / "added_tokens.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"got a new file {base}/added_tokens\.json"):
        load(str(export), settings, world)
    (base / "added_tokens.json").unlink()
    assert quantized_layers(load(str(export), settings, world).model)
    (base / "chat_template.jinja").rename(base / "template")
    with pytest.raises(ModelError, match=rf"got no file {base}/chat_template\.jinja"):
        load(str(export), settings, world)


def test_students_and_bases_are_found_by_their_hub_names(world, material, exported, monkeypatch):
    """An export under a Hub name is not quantized again, and neither is its base replaced."""
    settings, export, base = exported
    cached = {"someone/student": export, "someone/base": base}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(cached[name]))
    config = export / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "someone/base"))
    student = load("someone/student", settings, world)
    assert quantized_layers(student.model)
    assert {START} == {name for layer in adapted_layers(student.model).values() for name in layer.lora_A}
    # The next export has the same base.
    state = build_imitation("someone/student", settings, world, material, stage="sft")
    export_student(state.student, export.parent / "next", stage="distill", adapter_base="someone/student")
    state.policy.close()
    again = export.parent / "next" / "adapter"
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    assert (again / "quantization.json").read_bytes() == (export / "adapter" / "quantization.json").read_bytes()


def test_the_base_is_hashed_once_in_a_run(world, material, exported, monkeypatch):
    """A base has gigabytes, and a run loads its students and writes checkpoints many times."""
    settings, export, base = exported
    other = shutil.copytree(base, base.parent / "other")
    config = export / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(other)))
    hashed = []
    monkeypatch.setattr(folders, "file_digest", lambda path: hashed.append(path) or file_digest(path))
    for _ in range(2):
        state = build_imitation(str(export), settings, world, material, stage="sft")
        for number in range(2):
            export_student(state.student, export.parent / f"checkpoint-{number}", stage="sft")
        state.policy.close()
    assert sorted(hashed) == sorted(
        path for path in other.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")
    )


@pytest.mark.parametrize("targets", ["", "model.lora_targets=[q_proj]"])
def test_weights_are_dequantized_once_for_an_export(folder, world, material, monkeypatch, targets):
    settings = tiny_settings(folder, *SMALL, *NF4, *filter(None, [targets]))
    state = build_imitation(material.model_path, settings, world, material, stage="sft")
    calls = []
    monkeypatch.setattr(adapters, "full_weight", lambda layer: calls.append(layer) or full_weight(layer))
    weights = adapters.merged_weights(state.student.model, POLICY)
    state.policy.close()
    # Seven linear layers in each of the two decoder layers.
    assert len(set(calls)) == len(calls) == 14
    assert all(
        f"{path.removesuffix('.base_layer')}.weight" in weights for path in quantized_layers(state.student.model)
    )


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


@pytest.mark.parametrize(
    ("package", "overrides", "says"),
    [
        ("bitsandbytes", NF4, r"model\.quantize=nf4: expected the package bitsandbytes"),
        ("bitsandbytes", ["runtime.optimizer=adamw_8bit"], r"runtime\.optimizer=adamw_8bit: expected the package bits"),
        ("peft", LORA, r"model\.adapter=lora: expected the package peft"),
    ],
)
def test_missing_libraries_are_named_before_a_run_folder_exists(tmp_path, monkeypatch, package, overrides, says):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    settings = tiny_settings(tmp_path / "made", *overrides)
    with pytest.raises(NotInstalled, match=says):
        prepare_material(settings, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    assert not (tmp_path / "made").exists()
