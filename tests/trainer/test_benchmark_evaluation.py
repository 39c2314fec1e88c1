"""Test that a student answers the questions of a benchmark with its prompt, and that a missing video is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from benchmark_records import ROWS, write_json
from material import WORLD, tiny_material, tiny_settings
from PIL import Image

from rmsd_fast.data.media import MediaReader
from rmsd_fast.models.students import load_student
from rmsd_fast.stages.answer_records import answer_record
from rmsd_fast.stages.answer_store import AnswerStore, OtherAnswers
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_files import evaluation_of
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.protocol import evaluation_identity


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, tiny_material(folder)


def vstar_settings(folder, tmp_path, clip, *overrides, root=None):
    """Write an annotation with a clip and with another one, `missing.mp4`, and return settings of its evaluation."""
    boxes = [{"timestamp": t, "xmin": 1, "ymin": 1, "xmax": 40, "ymax": 30} for t in (1, 2)]
    record = {"vid": clip.stem, "domain": "x", "fps": 4.0, "frame_count": 16}
    record |= {"width": 64, "height": 64, "question": "What?", "answer": "a square", "chain": "", "object": "square"}
    record |= {"temporal_question": "When?", "timestamps": [0.5, 2.5], "bboxes": boxes}
    record |= {"spatial_question": "Where?", "spatial_question_2": "Where?"}
    annotation = tmp_path / "V_STaR_test.json"
    annotation.write_text(json.dumps([record, record | {"vid": "missing"}]))
    shared = [f"data.heldout={tmp_path}", f"data.media_root={root or clip.parent}", "data.max_bad_share=1"]
    shared += ["evaluate.benchmark=vstar", "evaluate.parse=lenient", "evaluate.max_new_tokens=4"]
    return tiny_settings(folder, *shared, "data.max_prompt_tokens=4096", *overrides)


@pytest.mark.parametrize("prompt", ["rmsd", "benchmark"])
def test_a_student_answers_vstar_and_a_missing_video_stays(made, tmp_path, prompt):
    folder, material = made
    settings = vstar_settings(folder, tmp_path, Path(material.heldout[0].videos[0]), f"evaluate.prompt={prompt}")
    read = prepare_material(settings, WORLD, training=False)
    questions = read.heldout
    assert set(read.fingerprints()) == {"heldout/V_STaR_test.json", "model"}
    assert [q.meta["groups"]["ask"] for q in questions] == ["what", "when1", "where1", "where2", "when2"] * 2
    student = load_student(material.model_path, dtype="float32")
    with MediaReader(settings.data, WORLD.device) as media:
        records = answer_questions(student, questions, settings, WORLD, media, name="tiny")
    assert [record["id"] for record in records] == [question.id for question in questions]
    assert all("error" not in record for record in records[:5])
    assert all("missing.mp4" in record["error"] and record["score"] == 0 for record in records[5:])
    # A student that has learned nothing scores 0. These answers have scores of 1, 1, 0.5, 0 and 1: the box of one of
    # two seconds is right, and the second box is elsewhere.
    box = [15.625, 15.625, 625, 468.75]
    answers = ["a square", "0.5 to 2.5", json.dumps({"1": box}), '{"1": [700, 700, 900, 900]}', "0.5 to 2.5"]
    texts = answers if prompt == "benchmark" else [f"<think>x</think><answer>{text}</answer>" for text in answers]
    for index, text in enumerate(texts):
        records[index] = answer_record(questions[index], records[index]["cluster"], text, settings)
    assert [record["lenient"] for record in records[:5]] == pytest.approx([1, 1, 0.5, 0, 1])
    result = evaluation_of({"model": records}, questions, settings)
    own = result["students"]["model"]["benchmark"]
    # The questions about the missing video halve all means. LGM of chain 1: (2 ln 2 + ln 4/3) / 3 = 0.557992.
    numbers = own["lenient"]
    assert numbers["chain1"] == pytest.approx({"tiou": 0.5, "viou": 0.25, "am": 1.25 / 3, "lgm": 0.557992}, abs=1e-6)
    assert numbers["chain2"] == pytest.approx({"tiou": 0.5, "viou": 0.0, "am": 1 / 3, "lgm": 0.462098}, abs=1e-6)
    assert numbers["score"] == numbers["mlgm"] == pytest.approx(0.510045, abs=1e-6)
    # Only answers in the format of training count strictly.
    assert own["strict"]["score"] == (numbers["score"] if prompt == "rmsd" else 0.0)
    *_, lenient, paper = format_table(result).splitlines()
    assert lenient == (
        "model, vstar (rule-based: what, and the means that contain it; 100.0% of 1 answer decided by rules), lenient, "
        "in percent: mean 35.0, "
        "accuracy 50.0, mam 37.5, mlgm 51.0, score 51.0; chain1: tiou 50.0, viou 25.0, am 41.7, lgm 55.8; "
        "chain2: tiou 50.0, viou 0.0, am 33.3, lgm 46.2"
    )
    assert paper == "no comparison with the paper: 10 of 10,470 questions"


def test_a_continued_evaluation_asks_again_after_a_missing_video_was_added(made, tmp_path):
    folder, material = made
    clip, other, *_ = (Path(path) for path in dict.fromkeys(q.videos[0] for q in material.heldout))
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(clip, videos)
    settings = vstar_settings(folder, tmp_path, clip, "evaluate.prompts_per_batch=5", root=videos)
    student, path = load_student(material.model_path, dtype="float32"), tmp_path / "x.predictions.jsonl"
    questions = prepare_material(settings, WORLD, training=False).heldout

    def answers(store=None):
        with MediaReader(settings.data, WORLD.device) as media:
            return answer_questions(student, questions, settings, WORLD, media, name="tiny", store=store)

    identity = evaluation_identity(settings, questions, {"path": "m"})
    with AnswerStore(path, identity, WORLD) as store:
        first = answers(store)
    assert [record.get("reason") for record in first] == [None] * 5 + ["missing_media"] * 5
    shutil.copy(other, videos / "missing.mp4")
    with AnswerStore(path, identity, WORLD) as store:
        assert list(store.done) == [question.id for question in questions[:5]]
        second = answers(store)
    assert second == answers() and second[:5] == first[:5]
    assert all("error" not in record and record["response"] for record in second[5:])
    # Now all are answered. Other batches could round differently, so they do not continue.
    with AnswerStore(path, identity, WORLD) as store:
        assert len(store.done) == 10
    smaller = vstar_settings(folder, tmp_path, clip, "evaluate.prompts_per_batch=4", root=videos)
    with pytest.raises(OtherAnswers, match=r"got other ones \(prompts_per_batch: 5, not 4\)"):
        AnswerStore(path, evaluation_identity(smaller, questions, {"path": "m"}), WORLD)


def test_questions_are_answered_without_their_videos(made, tmp_path):
    """One question has only its image left, the other one only its text. The videos need not exist."""
    folder, material = made
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "i.png")
    rows = [ROWS["videommmu"] | {"id": f"dev_Art_{i}", "category": "Adaptation"} for i in range(2)]
    rows[0]["image"] = "i.png"
    shared = [f"data.heldout={write_json(tmp_path / 'videommmu.json', rows)}", "evaluate.benchmark=videommmu"]
    shared += ["evaluate.without_video=true", "evaluate.prompt=benchmark", "evaluate.max_new_tokens=4"]
    settings = tiny_settings(folder, *shared, "evaluate.rollouts=0")
    questions = prepare_material(settings, WORLD, training=False).heldout
    student = load_student(material.model_path, dtype="float32")
    with MediaReader(settings.data, WORLD.device) as media:
        records = answer_questions(student, questions, settings, WORLD, media, name="tiny")
    assert [record["id"] for record in records] == [f"adaptation/dev_Art_{i}" for i in range(2)]
    assert all("error" not in record and record["response"] for record in records)
    assert len({record["cluster"] for record in records}) == 2
    result = evaluation_of({"model": records}, questions, settings)
    assert result["protocol"]["evaluate"]["without_video"] is True
    table = format_table(result)
    assert "WITHOUT VIDEO: the questions were asked without their videos" in table and "the paper" not in table
