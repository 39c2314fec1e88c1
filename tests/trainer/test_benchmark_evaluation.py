"""Test that a student answers the questions of a benchmark with its prompt, and that a missing video is kept."""

from __future__ import annotations

import json

import pytest
from material import WORLD, tiny_material, tiny_settings

from rmsd_fast.data.media import MediaReader
from rmsd_fast.models.students import load_student
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_files import evaluation_of
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.material import prepare_material


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, tiny_material(folder)


@pytest.mark.parametrize("prompt", ["rmsd", "benchmark"])
def test_a_student_answers_vstar_and_a_missing_video_stays(made, tmp_path, prompt):
    folder, material = made
    clip = material.heldout[0].videos[0]
    boxes = [{"timestamp": t, "xmin": 1, "ymin": 1, "xmax": 40, "ymax": 30} for t in (1, 2)]
    record = {"vid": clip.rpartition("/")[2].removesuffix(".mp4"), "domain": "x", "fps": 4.0, "frame_count": 16}
    record |= {"width": 64, "height": 64, "question": "What?", "answer": "a square", "chain": "", "object": "square"}
    record |= {"temporal_question": "When?", "timestamps": [0.5, 2.5], "bboxes": boxes}
    record |= {"spatial_question": "Where?", "spatial_question_2": "Where?"}
    annotation = tmp_path / "V_STaR_test.json"
    annotation.write_text(json.dumps([record, record | {"vid": "missing"}]))
    overrides = [f"data.heldout={tmp_path}", f"data.media_root={clip.rpartition('/')[0]}", "data.max_bad_share=1"]
    overrides += ["evaluate.benchmark=vstar", f"evaluate.prompt={prompt}", "evaluate.parse=lenient"]
    settings = tiny_settings(folder, *overrides, "evaluate.max_new_tokens=4", "data.max_prompt_tokens=4096")
    read = prepare_material(settings, WORLD, training=False)
    questions = read.heldout
    assert set(read.fingerprints()) == {"heldout/V_STaR_test.json", "model"}
    assert len(questions) == 10
    student = load_student(material.model_path, dtype="float32")
    with MediaReader(settings.data, WORLD.device) as media:
        records = answer_questions(student, questions, settings, WORLD, media, name="tiny")
    assert [record["id"] for record in records] == [question.id for question in questions]
    assert all("error" not in record for record in records[:5])
    assert all("missing.mp4" in record["error"] and record["score"] == 0 for record in records[5:])
    result = evaluation_of({"model": records}, questions, settings)
    own = result["students"]["model"]["benchmark"]
    assert set(own) == {"strict", "lenient"}
    assert all({"accuracy", "chain1", "chain2", "mam", "mlgm"} <= set(numbers) for numbers in own.values())
    *_, lenient, paper = format_table(result).splitlines()
    assert lenient.startswith("model, vstar, lenient: mean 0.000, accuracy 0.000, mam 0.000, mlgm 0.000, score 0.000; ")
    assert "; chain1: tiou 0.000, viou 0.000, am 0.000, lgm 0.000; chain2: " in lenient
    assert paper.startswith("the paper (arXiv 2603.11423) on V-STaR")
