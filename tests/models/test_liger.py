"""Test when the student uses Liger's kernels, that every layer uses them, and that results do not change.

The results come from Triton's interpreter in a separate process, because the kernels need CUDA otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from media_files import noise_frames

from rmsd_fast import train
from rmsd_fast.config import NotInstalled, SettingsError
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.liger import _with_rotation, apply_liger, describe_liger, use_liger
from rmsd_fast.models.students import load_student
from rmsd_fast.settings import load_settings, save_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]
LAYERS = 2
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel (extra: test)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_student(tmp_path_factory.mktemp("liger"), "qwen3_vl")


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"qwen3_vl": folder, "qwen2_5_vl": _write_student(tmp_path_factory.mktemp("liger"), "qwen2_5_vl")}


def _write_student(folder: Path, family: str) -> Path:
    build_tiny_student(folder / "student", texts=TEXTS, layers=LAYERS, family=family)
    from PIL import Image

    Image.fromarray(noise_frames(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(folder / "a.png")
    return folder


def test_choice_by_device_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not use_liger("auto", CPU) and not use_liger("off", CPU) and not use_liger("off", CUDA)
    with pytest.raises(SettingsError, match="model.liger=on: its kernels need a CUDA device, and this run is on cpu"):
        use_liger("on", CPU)
    assert describe_liger("auto", CPU) == "off (its kernels need a CUDA device, and this run is on cpu)"
    assert describe_liger("off", CUDA) == "off (model.liger=off)"

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else find(name))
    assert use_liger("auto", CUDA) and use_liger("on", CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    assert not use_liger("auto", CUDA)
    assert describe_liger("auto", CUDA).startswith("off (liger-kernel is not installed")
    with pytest.raises(SettingsError, match="not installed .*; set model.liger=auto or model.liger=off"):
        use_liger("on", CUDA)


@needs_liger
def test_log_names_the_kernels() -> None:
    assert describe_liger("on", CUDA).startswith("rms_norm, rope, swiglu (liger-kernel 0.")


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_setting_survives_yaml(written: str, read: str, tmp_path: Path) -> None:
    """YAML reads an unquoted on or off as a boolean."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: quickstart\nmodel:\n  liger: {written}\n")
    assert load_settings(str(recipe)).model.liger == read
    settings = load_settings("quickstart", [f"model.liger={written}"])
    assert settings.model.liger == read
    save_settings(settings, tmp_path / "saved.yaml")
    assert load_settings(str(tmp_path / "saved.yaml")).model.liger == read


def test_other_values_are_refused() -> None:
    with pytest.raises(SettingsError, match="model.liger: expected one of auto, on, off, got 'yess'"):
        load_settings("quickstart", ["model.liger=yess"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the setting is not an error")
def test_a_run_that_cannot_use_liger_ends_before_training(tmp_path: Path, capsys) -> None:
    assert (
        train.main(["quickstart", "model.liger=on", f"output={tmp_path / 'runs'}", f"made.folder={tmp_path / 'm'}"])
        == 2
    )
    assert "model.liger=on: its kernels need a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_liger
def test_every_layer_is_replaced_and_nothing_else(folder: Path) -> None:
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    from transformers.models.qwen3_vl import modeling_qwen3_vl as family

    names = dict(vars(family))
    plain = load_student(folder / "student", dtype="float32").model
    model = load_student(folder / "student", dtype="float32").model
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert apply_liger(model) == {"rms_norm": 4 * LAYERS + 1, "rope": LAYERS + 1, "swiglu": LAYERS}
    text = model.model.language_model
    assert (
        type(text.norm) is LigerRMSNorm
        and text.norm.variance_epsilon == plain.model.language_model.norm.variance_epsilon
    )
    for layer in text.layers:
        assert type(layer.mlp) is LigerSwiGLUMLP
        norms = (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm)
        assert all(type(norm) is LigerRMSNorm for norm in norms)
    # The parameters and their names are unchanged, and none is left on the meta device.
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert model.state_dict().keys() == plain.state_dict().keys()
    # Neither transformers' module nor another model has changed.
    assert dict(vars(family)) == names
    assert not any(isinstance(layer, LigerRMSNorm | LigerSwiGLUMLP) for layer in plain.modules())
    assert "forward" not in vars(plain.model.language_model.layers[0].self_attn)


@needs_liger
def test_every_layer_of_qwen2_5_vl_is_replaced(folders: dict[str, Path]) -> None:
    """Its vision tower of two blocks has five RMSNorms, and MLPs that keep transformers' SwiGLU, which has biases."""
    from liger_kernel.transformers import LigerSwiGLUMLP
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as family

    plain = load_student(folders["qwen2_5_vl"] / "student", dtype="float32").model
    model = load_student(folders["qwen2_5_vl"] / "student", dtype="float32").model
    assert apply_liger(model) == {"rms_norm": 2 * LAYERS + 1 + 5, "rope": LAYERS + 2, "swiglu": LAYERS}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(type(layer.mlp) is LigerSwiGLUMLP for layer in model.model.language_model.layers)
    assert all(type(block.mlp) is family.Qwen2_5_VLMLP for block in model.model.visual.blocks)
    assert not any(isinstance(layer, LigerSwiGLUMLP) for layer in plain.modules())


@needs_liger
def test_a_layer_left_out_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as family

    model = load_student(folder / "student", dtype="float32").model
    mlp = model.model.language_model.layers[1].mlp
    mlp.__class__ = type("OtherMLP", (family.Qwen3VLTextMLP,), {})
    with pytest.raises(RuntimeError, match="'swiglu': 2} layers, got .*'swiglu': 1}"):
        apply_liger(model)

    model = load_student(folder / "student", dtype="float32").model
    monkeypatch.setattr(family.Qwen3VLTextAttention, "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(RuntimeError, match="Qwen3VLTextAttention.forward does not call apply_rotary_pos_emb"):
        apply_liger(model)


def test_the_replaced_forward_keeps_its_keyword_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as family

    def forward(self, hidden, *, scale=2):
        return apply_rotary_pos_emb(hidden) * scale  # noqa: F821

    monkeypatch.setattr(family.Qwen3VLTextAttention, "forward", forward)
    assert _with_rotation(family.Qwen3VLTextAttention, "apply_rotary_pos_emb", lambda hidden: hidden)(None, 3) == 6


def test_missing_liger_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(NotInstalled, match="pip install 'liger-kernel>=0.8.5' or set model.liger=off"):
        load_student(folder / "student", dtype="float32", liger=True)


@pytest.mark.slow
@needs_liger
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_logits_and_gradients_equal_those_of_the_plain_student(folders: dict[str, Path], family: str) -> None:
    """Sums in another order differ by 1e-5 of the spread of the logits, and gradients by 1e-4."""
    pytest.importorskip("triton", reason="needs triton (extra: test)")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "liger_interpreted.py"), str(folders[family])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] > 20 and result["same_parameters"], result
    assert result["logits"] <= 1e-5 * max(result["spread"], 1.0), result
    assert result["gradients"] <= 1e-4, result
    # RMSNorm and SwiGLU have forward and backward kernels, and RoPE has one kernel for both.
    ran = " ".join(result["kernels"])
    for name in ("rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward", "rope"):
        assert name in ran, ran
