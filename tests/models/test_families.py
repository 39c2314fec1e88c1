"""Test which families are students, that others are refused by name, and that each family has a module of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rmsd_fast.config import ModelConfig, ModelError, VideoConfig
from rmsd_fast.data.packing import make_rows
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.cost import balance_weights
from rmsd_fast.models.families import FAMILIES, REFUSED, family_of
from rmsd_fast.models.folders import open_folder
from rmsd_fast.models.shared_prefix import FAMILIES as SHARED
from rmsd_fast.models.students import encode_in_pass, encode_media, forward_hidden, freeze, load_student
from rmsd_fast.stages.memory import count_parameters

ROOT = Path(__file__).resolve().parents[2] / "rmsd_fast"
# Sizes of Qwen/Qwen2.5-VL-7B-Instruct, written as in its config.json.
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3},
}


def test_families_are_known_by_their_model_type() -> None:
    assert list(FAMILIES) == ["qwen3_vl", "qwen2_5_vl"]
    for name, family in FAMILIES.items():
        assert family.model_type == family.config_class.model_type == name
        assert family_of(family.config_class()) is family_of({"model_type": name}) is family
        # Rollouts and evaluations share prompts with every packing.
        assert name in SHARED


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_vl_moe", r" \(the loss that balances its experts is a mean over all tokens of a forward pass"),
        ("qwen2_vl", r" \(it was not tested"),
        ("internvl", ""),
        ("llava_onevision", ""),
        ("smolvlm", ""),
        (None, ""),
    ],
)
def test_other_families_are_refused_by_name(tmp_path: Path, name: str | None, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    message = rf"{re.escape(str(tmp_path))}: expected a model of family qwen3_vl or qwen2_5_vl, got {name!r}{reason}"
    with pytest.raises(ModelError, match=message) as caught:
        open_folder(tmp_path)
    assert "Qwen/Qwen3-VL-4B-Instruct" in str(caught.value) and "Qwen/Qwen2.5-VL-7B-Instruct" in str(caught.value)
    assert bool(reason) == (name in REFUSED)


def test_parameters_and_flops_of_qwen2_5_vl_7b() -> None:
    """The published size is 8.29 billion parameters, of which the vision tower has 0.68."""
    size = count_parameters(QWEN2_5_VL_7B, ModelConfig(adapter="lora", lora_rank=16))
    assert size.total == 8_292_166_656 and size.vision == 676_550_144
    # An adapter has a row and a column per rank: q and o have 3584 of each, k and v 3584 and 512, and the MLP three
    # times 3584 and 18944.
    assert size.adapter == 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    config = Qwen2_5_VLConfig(**{name: value for name, value in QWEN2_5_VL_7B.items() if name != "model_type"})
    # q and o have 3584 x 3584 weights, k and v 3584 x 512, the MLP three times 3584 x 18944; 28 heads of 128.
    weights = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert balance_weights(config) == (2 * 28 * weights, 4 * 28 * 28 * 128)


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    build_tiny_student(tmp_path / "student", texts=["a"], layers=2, family="qwen2_5_vl")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "student")
    size = count_parameters(json.loads((tmp_path / "student" / "config.json").read_text()), ModelConfig())
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.vision == sum(p.numel() for p in model.model.visual.parameters())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_pass_without_media_runs_the_tower_without_effect(tmp_path: Path, name: str) -> None:
    """All trained weights get a gradient, as on the other processes, and the hidden states do not change."""
    build_tiny_student(tmp_path / "student", texts=["a"], layers=2, family=name)
    student = load_student(tmp_path / "student", dtype="float32")
    freeze(student.model, train_vision=True)
    builder = PromptBuilder(student, VideoConfig())
    prompt = builder.build(Question(id="q", question="What is it?", task_type="open"))
    rows = make_rows("padded", [prompt], [[builder.encode_response("a")]], pad_id=student.pad_id)
    plain, features = encode_media(student.model, [prompt]), encode_in_pass(student.model, [prompt])
    assert plain.unused is None and float(features.unused.detach()) == 0.0 and features.pooled == []
    with torch.no_grad():
        expected = forward_hidden(student.model, rows, plain)
    hidden = forward_hidden(student.model, rows, features)
    assert torch.equal(hidden, expected)
    hidden.sum().backward()
    gradients = {path: p.grad for path, p in student.model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(not gradient.any() for path, gradient in gradients.items() if ".visual." in path)
    assert any(gradient.any() for gradient in gradients.values())
    # Without the blank image, a process would have no gradients of the tower.
    student.model.zero_grad(set_to_none=True)
    forward_hidden(student.model, rows, plain).sum().backward()
    assert all(p.grad is None for path, p in student.model.named_parameters() if ".visual." in path)


# Other places that name families: students made for tests, and their setting; the two rules of preprocessing, which
# decoder processes read without transformers; and the packed op, which supports more families than the trainer.
NAMED = {
    "config/inputs.py",
    "made/student.py",
    "data/preprocess.py",
    "models/shared_prefix.py",
    "models/vision_attention.py",
}


def test_nothing_else_knows_a_family() -> None:
    pattern = re.compile(r"""["']qwen[23]\w*_vl|\w*Qwen[23]\w*VL""")
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
        if lines and not name.startswith("models/families/") and name not in NAMED:
            found[name] = lines
    assert found == {}
    assert {path.stem for path in (ROOT / "models" / "families").glob("*.py")} == {"__init__", "family", *FAMILIES}
