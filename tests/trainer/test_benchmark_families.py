"""Test that V-STaR's own prompts are refused for students that write boxes in pixels."""

import json

import pytest
from material import WORLD

from rmsd_fast.config import SettingsError
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import prepare_material

RECORD = {
    "vid": "a",
    "domain": "x",
    "fps": 4.0,
    "frame_count": 16,
    "width": 64,
    "height": 64,
    "question": "What?",
    "answer": "a square",
    "temporal_question": "When?",
    "timestamps": [0.5, 2.5],
    "bboxes": [{"timestamp": 1, "xmin": 1, "ymin": 1, "xmax": 40, "ymax": 30}],
    "spatial_question": "Where?",
    "spatial_question_2": "Where?",
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("prompt", ["benchmark", "rmsd"])
def test_pixels_are_not_read_as_0_to_1000(tmp_path, family, prompt):
    build_tiny_student(tmp_path / "student", texts=["Where is the square?"], layers=2, family=family)
    (tmp_path / "V_STaR_test.json").write_text(json.dumps([RECORD]))
    overrides = [f"data.heldout={tmp_path / 'V_STaR_test.json'}", f"model.path={tmp_path / 'student'}"]
    overrides += ["data.max_bad_share=1", "evaluate.benchmark=vstar", f"evaluate.prompt={prompt}"]
    settings = load_settings("benchmarks", [*overrides, "model.dtype=float32"])
    if (family, prompt) == ("qwen2_5_vl", "benchmark"):
        with pytest.raises(SettingsError, match=r"evaluate.prompt: expected rmsd .* Qwen2.5-VL models write pixels"):
            prepare_material(settings, WORLD, training=False)
    else:
        assert len(prepare_material(settings, WORLD, training=False).heldout) == 5
