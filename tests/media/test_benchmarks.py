"""Test the readers of benchmarks on invented records of each layout, their errors, and the benchmarks' aggregates."""

from __future__ import annotations

import base64
import json
import logging
import math
import re
from pathlib import Path

import pytest

from rmsd_fast.config import BENCHMARKS, EvaluateConfig, NotInstalled, SettingsError
from rmsd_fast.data.benchmarks import aggregate, load_benchmark
from rmsd_fast.data.benchmarks.aggregates import ASKS, MLVU_DEV, VERSIONS
from rmsd_fast.data.benchmarks.load import _READERS
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.method.quality import quality_score

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
OPTIONS = ["A. Apples.", "B. Candles.", "C. Berries.", "D. All."]


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as pandas writes TSV: lists as Python writes them, missing values as empty cells."""
    lines = ["\t".join(rows[0])]
    for row in rows:
        cells = ["" if value is None else str(value) for value in row.values()]
        lines.append("\t".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    return path


def load(name: str, path: Path, **kwargs) -> list[Question]:
    return load_benchmark(name, path, check_count=False, **kwargs)


# --- VideoMME --------------------------------------------------------------------------------------------------------


def videomme_rows() -> list[dict]:
    base = {
        "domain": "Knowledge",
        "sub_category": "Geography",
        "url": "https://example.com",
        "task_type": "OCR Problems",
    }
    return [
        base
        | {
            "video_id": f"00{number}",
            "duration": duration,
            "videoID": f"clip{number}",
            "question_id": f"00{number}-1",
            "question": "Which decoration is most frequent?",
            "options": OPTIONS,
            "answer": letter,
        }
        for number, (duration, letter) in enumerate([("short", "C"), ("medium", "A"), ("long", "D")], start=1)
    ]


VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\nWhich decoration is most frequent?\n"
    "A. Apples.\nB. Candles.\nC. Berries.\nD. All.\n\n"
    "Answer with the option's letter from the given choices directly."
)


def test_videomme(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clip1.mp4").write_bytes(b"x")
    write_parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", videomme_rows())
    first, second, third = load("videomme", tmp_path)
    assert (first.id, first.task_type, first.answer, first.options) == ("001-1", "mcq", "C", tuple(OPTIONS))
    assert first.videos == (str(tmp_path / "data" / "clip1.mp4"),)
    # A missing video stays a question.
    assert second.videos == (str(tmp_path / "clip2.mp4"),) and third.answer == "D"
    assert first.prompt == VIDEOMME_PROMPT
    assert first.meta["benchmark"] == "videomme"
    assert first.meta["groups"] == {
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Geography",
        "task_type": "OCR Problems",
    }
    assert question_text(first) == (
        "Which decoration is most frequent?\nA. Apples.\nB. Candles.\nC. Berries.\nD. All.\n"
        "Reply as <think>reasoning</think><answer>option letter</answer>"
    )


def test_videomme_in_other_layouts(tmp_path):
    rows = videomme_rows()
    table = [
        {
            "index": number,
            "video": row["videoID"],
            "video_path": f"./video/{row['videoID']}.mp4",
            "duration": row["duration"],
            "domain": row["domain"],
            "candidates": row["options"],
            "sub_category": row["sub_category"],
            "task_type": row["task_type"],
            "subtitle_path": "./subtitle/x.srt",
            "question": row["question"],
            "answer": row["answer"],
        }
        for number, row in enumerate(rows)
    ]
    easy = [
        row
        | {"problem_id": number, "problem": row["question"], "data_type": "video", "problem_type": "multiple choice"}
        | {"original_question_type": "x", "solution": f"<answer>{row['answer']}</answer>"}
        | {"path": f"./videos/{row['videoID']}.mp4", "subtitle": ""}
        for number, row in enumerate(rows)
    ]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = load("videomme", write_json(tmp_path / "rows.json", rows))
    for path in (write_table(tmp_path / "Video-MME.tsv", table), write_json(tmp_path / "easy.json", easy), lines):
        questions = load("videomme", path)
        for question, same in zip(questions, expected, strict=True):
            assert (question.prompt, question.answer, question.meta) == (same.prompt, same.answer, same.meta)
    assert [q.id for q in load("videomme", tmp_path / "Video-MME.tsv")] == ["clip1#1", "clip2#1", "clip3#1"]


# --- The other benchmarks of videos -----------------------------------------------------------------------------------


def test_longvideobench(tmp_path):
    base = {"question": "What happens next?", "duration": 40.5, "duration_group": 60, "subtitle_path": "a.json"}
    base |= {
        "question_category": "E2O",
        "topic_category": "Travel",
        "video_id": "v",
        "starting_timestamp_for_subtitles": 0,
    }
    options = {"option0": "tea", "option1": "milk", "option2": "N/A", "option3": "N/A", "option4": "N/A"}
    rows = [base | options | {"id": f"v_{n}", "video_path": f"v{n}.mp4", "correct_choice": n % 2} for n in range(3)]
    write_json(tmp_path / "lvb_val.json", rows)
    # The folder also has questions without answers, which are not read.
    write_json(tmp_path / "lvb_test_wo_gt.json", [{"id": "t"}])
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v0.mp4").write_bytes(b"x")
    first, second, third = load("longvideobench", tmp_path)
    assert (first.id, first.options, first.answer) == ("v_0", ("tea", "milk"), "A")
    assert second.answer == "B" and third.answer == "A"
    assert first.videos == (str(tmp_path / "videos" / "v0.mp4"),)
    assert first.prompt == (
        "What happens next?\nA. tea\nB. milk\nAnswer with the option's letter from the given choices directly.\n"
    )
    assert first.meta["groups"] == {"duration_group": "60", "question_category": "E2O", "topic_category": "Travel"}
    table = [{**row, "index": n, "candidates": ["tea", "milk"]} for n, row in enumerate(rows)]
    table = [{key: value for key, value in row.items() if not key.startswith("option")} for row in table]
    again = load("longvideobench", write_table(tmp_path / "LongVideoBench.tsv", table), media_root=tmp_path)
    assert [(q.id, q.answer, q.prompt) for q in again] == [(q.id, q.answer, q.prompt) for q in (first, second, third)]


def test_longvideobench_options_end_with_the_first_missing_one(tmp_path):
    row = {"id": "a", "question": "What?", "video_path": "v.mp4", "correct_choice": 0}
    options = {"option0": "tea", "option1": "N/A", "option2": "milk"}
    with pytest.raises(DataError, match="field 'option2': expected no option after a missing one, got 'milk'"):
        load("longvideobench", write_json(tmp_path / "lvb_val.json", [row | options]))


def test_mlvu(tmp_path):
    asked = "What is unusual?\n(A) Fighting\n(B) Normal\n(C) Arson\n(D) Theft"
    rows = [
        {"video_name": "surveil_1.mp4", "question": asked, "answer": "C", "task_type": "anomaly_reco"},
        {"video_name": "surveil_1.mp4", "question": asked, "answer": "A", "task_type": "anomaly_reco"},
        {"video_name": "count_1.mp4", "question": asked, "answer": "D", "task_type": "count"},
    ]
    questions = load("mlvu", write_parquet(tmp_path / "test-00000.parquet", rows))
    assert [q.id for q in questions] == [
        "anomaly_reco/surveil_1.mp4#1",
        "anomaly_reco/surveil_1.mp4#2",
        "count/count_1.mp4#1",
    ]
    first = questions[0]
    assert (first.question, first.options) == ("What is unusual?", ("Fighting", "Normal", "Arson", "Theft"))
    assert first.answer == "C" and first.meta["groups"] == {"task": "anomaly_reco"}
    assert first.prompt == asked + "\nOnly give the best option.\nBest option: ("


def test_mlvu_of_its_authors(tmp_path):
    rows = [
        {"video": "a.mp4", "duration": 500, "question": "What?", "candidates": ["tea", "milk"], "answer": "milk"},
        {"video": "b.mp4", "duration": 500, "question": "What?", "candidates": ["tea", "tea"], "answer": "tea"},
    ]
    write_json(tmp_path / "json" / "1_plotQA.json", [row | {"question_type": "plotQA"} for row in rows])
    write_json(tmp_path / "json" / "4_count.json", rows[:1])
    # Open-ended tasks are not part of M-Avg.
    write_json(tmp_path / "json" / "8_sub_scene.json", [{"video": "c.mp4"}])
    (tmp_path / "video" / "4_count").mkdir(parents=True)
    (tmp_path / "video" / "4_count" / "a.mp4").write_bytes(b"x")
    questions = load("mlvu", tmp_path)
    assert [(q.meta["groups"]["task"], q.answer) for q in questions] == [
        ("plotQA", "B"),
        ("plotQA", "A"),
        ("count", "B"),
    ]
    assert questions[2].videos == (str(tmp_path / "video" / "4_count" / "a.mp4"),)
    assert questions[0].prompt == "What?\n(A) tea\n(B) milk\nOnly give the best option.\nBest option: ("


def test_videommmu(tmp_path):
    row = {"id": "dev_Art_Theory_3", "question": "Which?", "options": ["A. C", "B. D"], "answer": "B"}
    row |= {"question_type": "perception"}
    write_parquet(tmp_path / "Perception" / "test-0.parquet", [row])
    write_parquet(tmp_path / "Comprehension" / "test-0.parquet", [row | {"question_type": "multiple-choice"}])
    write_parquet(
        tmp_path / "Adaptation" / "test-0.parquet",
        [
            row
            | {"id": "test_Math_9", "question": "What is <image 1>?", "question_type": "multiple-choice"}
            | {"image": {"bytes": PNG, "path": "test_Math_9.png"}, "options": ["C", "D"]},
            row
            | {"id": "test_Math_10", "question": "How many?", "question_type": "open", "options": [], "answer": "12.5"}
            | {"image": None},
        ],
    )
    cache = tmp_path / "cache"
    questions = {q.id: q for q in load("videommmu", tmp_path, image_cache=cache)}
    assert set(questions) == {
        "perception/dev_Art_Theory_3",
        "comprehension/dev_Art_Theory_3",
        "adaptation/test_Math_9",
        "adaptation/test_Math_10",
    }
    seen = questions["perception/dev_Art_Theory_3"]
    # A letter is a letter, although option A has the text C.
    assert seen.answer == "B" and seen.meta["groups"] == {"track": "perception", "subject": "Art_Theory"}
    assert seen.prompt == "Which?\nA. C\nB. D\nPlease ignore the Quiz question in last frame of the video."
    shown = questions["adaptation/test_Math_9"]
    assert shown.prompt == (
        "You should watch and learn the video content. Then apply what you learned to answer the following "
        "multi-choice question. The image for this question is at the end of the video.\nWhat is <image 1>?\nA. C\nB. D"
    )
    assert Path(shown.images[0]).read_bytes() == PNG and Path(shown.images[0]).is_relative_to(cache)
    opened = questions["adaptation/test_Math_10"]
    assert (opened.task_type, opened.answer, opened.options, opened.images) == ("exact", "12.5", None, ())
    assert "the following open-ended question" in opened.prompt
    # The image is written once.
    written = Path(shown.images[0]).stat().st_mtime_ns
    load("videommmu", tmp_path, image_cache=cache)
    assert Path(shown.images[0]).stat().st_mtime_ns == written


def test_videommmu_in_other_layouts(tmp_path):
    table = [
        {"index": 0, "id": "dev_Art_1", "category": track, "question": "Which?", "options": '["tea", "milk"]'}
        | {"answer": "A", "question_type": "multiple-choice", "video": "videos/Art/dev_Art_1.mp4", "image": image}
        for track, image in (("Adaptation", "images/a.png"), ("Comprehension", None), ("Perception", None))
    ]
    questions = load("videommmu", write_table(tmp_path / "VideoMMMU.tsv", table))
    assert [q.meta["groups"]["track"] for q in questions] == ["adaptation", "comprehension", "perception"]
    assert questions[0].images == (str(tmp_path / "images" / "a.png"),) and questions[0].media[1][0] == "image"
    easy = {"problem_id": 1, "problem": "<image 1> Which?", "data_type": "video", "problem_type": "multiple choice"}
    easy |= {"options": ["A. tea", "B. milk"], "solution": "<answer>A</answer>", "path": "./dev_Art_1.mp4"}
    rows = [easy | {"image_path": "./images/a.png"}, easy | {"problem": "Which?"}]
    rows.append(
        easy
        | {"problem": "How much?", "problem_type": "numerical", "options": None, "solution": "<answer>3.5</answer>"}
    )
    first, second, third = load("videommmu", write_json(tmp_path / "videommmu_with_image.json", rows))
    assert first.id == "adaptation/dev_Art_1" and first.images == (str(tmp_path / "images" / "a.png"),)
    assert (second.id, second.meta["groups"]["track"], third.answer) == ("dev_Art_1#1", "unnamed", "3.5")


def test_worldsense(tmp_path):
    asked = {"question": "Who speaks?", "answer": "B", "candidates": ["A. He.", "B. She.", "C. Both."]}
    asked |= {"task_domain": "Recognition", "task_type": "Audio Recognition"}
    whole = {
        f"v{n}": {"duration": "1-2min", "domain": "Music", "sub_category": "Jazz", "audio_class": ["Speech", "Music"]}
        | {"video_caption": "A band.", "video_duration": "65s", "task0": asked}
        for n in range(2)
    }
    whole["v0"]["task1"] = asked | {"answer": "C"}
    first, second, third = load("worldsense", write_json(tmp_path / "worldsense_qa.json", whole))
    assert [q.id for q in (first, second, third)] == ["v0/task0", "v0/task1", "v1/task0"]
    assert (first.answer, second.answer) == ("B", "C") and first.videos == (str(tmp_path / "v0.mp4"),)
    assert first.meta["groups"] == {
        "task_domain": "Recognition",
        "task_type": "Audio Recognition",
        "domain": "Music",
        "sub_category": "Jazz",
        "duration": "1-2min",
        "audio_class": "Speech, Music",
    }
    assert first.prompt.startswith("Carefully watch this video and pay attention to every detail. Based on")
    assert "addresses the question.<video>\nThese are the frames of a video. Select" in first.prompt
    assert first.prompt.endswith("of the correct option.\nQuestion: Who speaks?\nA. He.\nB. She.\nC. Both.\nAnswer: ")
    rows = [
        asked | {"index": n, "video_path": f"./videos/v{n}.mp4", "duration": 65, "audio_class": "['Speech']"}
        for n in range(3)
    ]
    questions = load("worldsense", write_table(tmp_path / "WorldSense.tsv", rows))
    assert [q.id for q in questions] == ["0", "1", "2"] and questions[0].prompt == first.prompt
    assert questions[1].meta["groups"]["audio_class"] == "Speech"


# --- Mathematics ------------------------------------------------------------------------------------------------------


def test_mathvista(tmp_path):
    metadata = {
        "category": "math-targeted-vqa",
        "task": "geometry problem solving",
        "context": "table",
        "grade": "daily life",
    }
    metadata |= {"skills": ["arithmetic reasoning", "numeric commonsense"], "split": "testmini"}
    base = {
        "image": "images/1.jpg",
        "decoded_image": {"bytes": PNG, "path": "1.jpg"},
        "metadata": metadata,
        "unit": None,
    }
    rows = [
        base
        | {"pid": "1", "question": "Which?", "choices": ["3/11", "8/11"], "precision": None, "answer": "8/11"}
        | {"question_type": "multi_choice", "answer_type": "text", "query": "Hint: letter.\nQuestion: Which?"},
        base
        | {"pid": "2", "question": "How long?", "choices": None, "precision": 1.0, "answer": "1.2", "unit": "cm"}
        | {
            "question_type": "free_form",
            "answer_type": "float",
            "query": "Hint: float.\nQuestion: How long? (Unit: cm)",
        },
        base
        | {"pid": "3", "question": "When?", "choices": None, "precision": None, "answer": "[2007, 2008]"}
        | {"question_type": "free_form", "answer_type": "list", "query": "Hint: list.\nQuestion: When?"},
    ]
    path = write_parquet(tmp_path / "data" / "testmini-00000.parquet", rows)
    first, second, third = load("mathvista", tmp_path, image_cache=tmp_path / "cache")
    assert (first.task_type, first.options, first.answer) == ("mcq", ("3/11", "8/11"), "B")
    assert first.prompt == "Hint: letter.\nQuestion: Which?"
    assert first.meta["groups"] == {
        "question_type": "multi_choice",
        "answer_type": "text",
        "task": "geometry problem solving",
        "category": "math-targeted-vqa",
        "context": "table",
        "grade": "daily life",
        "skills": "arithmetic reasoning, numeric commonsense",
    }
    assert (second.task_type, second.answer, second.question) == ("exact", "1.2", "How long? (Unit: cm)")
    assert quality_score("<think></think><answer>1.24 cm</answer>", "exact", second.answer) == 1
    assert quality_score("<think></think><answer>1.26 cm</answer>", "exact", second.answer) == 0
    assert third.answer == "[2007, 2008]" and first.images == second.images
    # The authors' JSON has the records by id, and images as files.
    whole = {row["pid"]: {k: v for k, v in row.items() if k not in ("pid", "decoded_image")} for row in rows}
    again = load("mathvista", write_json(tmp_path / "testmini.json", whole))
    assert [(q.id, q.answer) for q in again] == [("1", "B"), ("2", "1.2"), ("3", "[2007, 2008]")]
    assert again[0].images == (str(tmp_path / "images" / "1.jpg"),)
    assert path.exists()


def test_mathverse(tmp_path):
    base = {"problem_index": "7", "image": {"bytes": PNG, "path": "i.png"}, "question_for_eval": "?", "query_cot": "?"}
    base |= {
        "metadata": {"split": "testmini", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": "Please answer.",
    }
    rows = [
        base
        | {"sample_index": "1", "problem_version": "Text Dominant", "question": "Find x.\nChoices:\nA:30\nB:60"}
        | {"answer": "B", "question_type": "multi-choice"},
        base
        | {
            "sample_index": "2",
            "problem_version": "Text Lite",
            "question": "Find x.",
            "answer": "x=5",
            "question_type": "free-form",
        },
        base
        | {
            "sample_index": "3",
            "problem_version": "Vision Only",
            "question": "",
            "answer": "A",
            "question_type": "multi-choice",
        },
    ]
    write_parquet(tmp_path / "testmini-00000.parquet", rows)
    first, second, third = load("mathverse", tmp_path, image_cache=tmp_path / "cache")
    assert (first.task_type, first.answer, first.options, first.prompt) == ("mcq", "B", None, "Please answer.")
    assert (second.task_type, second.answer) == ("exact", "x=5")
    assert third.question == "Answer the question that the image shows."
    # The versions of a problem are one cluster.
    assert [question.meta["cluster"] for question in (first, second, third)] == ["7"] * 3
    assert first.meta["groups"] == {
        "version": "Text Dominant",
        "question_type": "multi-choice",
        "subject": "Plane Geometry",
        "subfield": "Angle",
    }
    rows[0]["problem_version"] = "Text Only"
    with pytest.raises(DataError, match="expected one of Text Dominant, .* got 'Text Only'"):
        load("mathverse", write_json(tmp_path / "testmini.json", [{**rows[0], "image": "i.png"}]))


def test_images_in_base64(tmp_path):
    table = [
        {
            "index": 7,
            "image": base64.b64encode(PNG + b"\0" * 200).decode(),
            "question": "Q?",
            "answer": "4",
            "choices": None,
        }
        | {"question_type": "free_form", "answer_type": "integer", "task": "counting"}
    ]
    (question,) = load("mathvista", write_table(tmp_path / "MathVista_MINI.tsv", table), image_cache=tmp_path / "cache")
    assert Path(question.images[0]).suffix == ".png" and question.meta["groups"]["task"] == "counting"
    table[0]["image"] = base64.b64encode(b"not an image" * 30).decode()
    with pytest.raises(DataError, match="field 'image': expected a PNG, JPEG, GIF, BMP or WebP image"):
        load("mathvista", write_table(tmp_path / "MathVista_MINI.tsv", table), image_cache=tmp_path / "cache")


# --- V-STaR -----------------------------------------------------------------------------------------------------------


def vstar_record(**changes) -> dict:
    boxes = [
        {"timestamp": t, "frame_index": 25 * t, "xmin": 128, "ymin": 72, "xmax": 640, "ymax": 360} for t in (4, 5, 6)
    ]
    record = {"vid": "v1", "domain": "Sports", "fps": 25.0, "width": 1280, "height": 720, "frame_count": 751}
    record |= {"question": "What does he hold?", "chain": "<think>x<think>", "object": "cup", "answer": "A red cup"}
    record |= {"temporal_question": "When does he hold it?", "timestamps": [3.2, 6.9], "bboxes": boxes}
    record |= {"spatial_question": "Where is the cup?", "spatial_question_2": "Where is it?"}
    return record | changes


def test_vstar(tmp_path):
    records = [vstar_record(), vstar_record(question="What else?"), vstar_record(vid="v2", frame_count=6000)]
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "v1.mp4").write_bytes(b"x")
    questions = load("vstar", write_json(tmp_path / "V_STaR_test.json", records), media_root=tmp_path)
    assert len(questions) == 15
    by_id = {q.id: q for q in questions}
    assert [q.id for q in questions[:5]] == [f"v1#1/{ask}" for ask in ("what", "when1", "where1", "where2", "when2")]
    assert {"v1#2/what", "v2#1/when2"} <= set(by_id)
    assert all(q.videos == (str(tmp_path / "clips" / "v1.mp4"),) for q in questions[:10])
    assert [q.task_type for q in questions[:5]] == ["exact", "temporal", "boxes", "boxes", "temporal"]
    assert by_id["v1#1/when1"].answer == "3.2 to 6.9" and by_id["v1#1/when1"].duration == 30.04
    assert json.loads(by_id["v1#1/where1"].answer) == {str(t): [[100.0, 100.0, 500.0, 500.0]] for t in (4, 5, 6)}
    assert by_id["v1#1/what"].meta["groups"] == {"ask": "what", "duration": "short", "domain": "Sports"}
    assert by_id["v2#1/what"].meta["groups"]["duration"] == "long"
    corners = "[[128, 72, 640, 360], [128, 72, 640, 360], [128, 72, 640, 360]]"
    assert by_id["v1#1/what"].prompt == (
        "Answer the question about the video: What does he hold? \n (If the answer is a person, you don't need to "
        "identify the person.)"
    )
    assert by_id["v1#1/when1"].prompt == (
        "This video is 30.04 seconds long. Answer the question about the video: When does he hold it? \n Output the "
        "start and end moment timestamps."
    )
    assert by_id["v1#1/when2"].prompt == (
        "This video is 30.04 seconds long with a resolution of 1280x720 (width x height). Answer the question about "
        "the video: When does he hold it? \n There are 3 bounding boxes of the key object related to the question in "
        f"the video without knowing the time, which are:{corners}. Output the start and end moment timestamps."
    )
    where1, where2 = by_id["v1#1/where1"].prompt, by_id["v1#1/where2"].prompt
    assert where1.startswith("Please answer the question about the video: Where is the cup? with a series of bounding")
    assert "within the time range [4, 5, 6] provided" in where1 and '{"4": [x1, y1, x2, y2],...}' in where1
    assert "You only need to output 3 bbox(es)." in where2 and '"3":...} (if the frames at 0~3 second' in where2
    # A second is whole also if the annotation writes 4.0.
    floats = [box | {"timestamp": float(box["timestamp"])} for box in vstar_record()["bboxes"]]
    again = load("vstar", write_json(tmp_path / "floats.json", [vstar_record(bboxes=floats)]))
    assert again[2].answer == by_id["v1#1/where1"].answer
    # In this package's own prompt, boxes are from 0 to 1000.
    assert "[[100, 100, 500, 500], " in question_text(by_id["v1#1/when2"])
    assert question_text(by_id["v1#1/where1"]).endswith('{"second": [x1,y1,x2,y2], …}</answer>, from 0 to 1000')
    right = f"<think></think><answer>{by_id['v1#1/where1'].answer}</answer>"
    assert quality_score(right, "boxes", by_id["v1#1/where1"].answer) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"timestamps": [5, 3]}, r"field 'timestamps': expected \[start, end\] in seconds, got \[5, 3\]"),
        ({"bboxes": []}, "field 'bboxes': expected boxes with timestamp, xmax"),
        (
            {"bboxes": [{"timestamp": 1, "xmin": 0, "ymin": None, "xmax": 1, "ymax": 1}]},
            "field 'bboxes': expected boxes",
        ),
        (
            {"bboxes": [{"timestamp": None, "xmin": 0, "ymin": 0, "xmax": 1, "ymax": 1}]},
            "field 'bboxes': expected boxes with timestamp",
        ),
        ({"timestamps": [1, math.nan]}, "field 'timestamps': expected"),
        ({"fps": "fast"}, "field 'fps': expected a number of at least 0.001, got 'fast'"),
        ({"spatial_question_2": None}, "expected a field 'spatial_question_2', got the fields 'vid', 'domain'"),
    ],
)
def test_damaged_vstar_records(tmp_path, changes, says):
    with pytest.raises(DataError, match=says):
        load("vstar", write_json(tmp_path / "V_STaR_test.json", [vstar_record(**changes)]))


# --- Errors and warnings ----------------------------------------------------------------------------------------------


def test_every_benchmark_has_a_reader():
    assert tuple(_READERS) == BENCHMARKS
    assert EvaluateConfig().benchmark == "" and EvaluateConfig().prompt == "rmsd"


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(DataError, match="missing: cannot be read"):
        load("videomme", tmp_path / "missing")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"expected an annotation of the benchmark .* got a folder with clip.mp4; check"
    ):
        load("videomme", tmp_path)
    with pytest.raises(DataError, match="expected one of .json, .jsonl, .tsv, .csv, .parquet, got '.mp4'"):
        load("videomme", tmp_path / "clip.mp4")
    rows = write_json(tmp_path / "rows.json", videomme_rows())
    with pytest.raises(DataError, match="data.media_root: expected the folder of the media of videomme, got .*nowhere"):
        load("videomme", rows, media_root=tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="evaluate.benchmark: expected one of videomme, .* got 'videomee'"):
        load("videomee", rows)
    with pytest.raises(DataError, match="a file without rows"):
        load("videomme", write_json(tmp_path / "empty.json", []))


def test_the_annotation_of_another_benchmark_is_named(tmp_path):
    path = write_json(tmp_path / "rows.json", videomme_rows())
    with pytest.raises(DataError) as caught:
        load("vstar", path)
    assert "3 of 3 records cannot be used" in str(caught.value)
    assert "expected a field 'vid', got the fields 'domain'" in str(caught.value)
    assert "may belong to another benchmark, or be newer than this reader" in str(caught.value)


def test_faults_of_all_rows_are_reported_together(tmp_path):
    rows = videomme_rows()
    rows[0]["answer"] = "E"
    rows[1]["options"] = []
    rows[2]["videoID"] = "../../etc/passwd"
    with pytest.raises(DataError) as caught:
        load("videomme", write_json(tmp_path / "rows.json", rows))
    text = str(caught.value)
    assert "item 1: field 'answer': expected a letter among ABCD or an option, got 'E'" in text
    assert "item 2: field 'options': expected at least one option, got []" in text
    assert "item 3: field 'videoID': expected a path inside the media root" in text


def test_repeated_ids_are_named(tmp_path):
    rows = videomme_rows()
    rows[2]["question_id"] = rows[0]["question_id"]
    with pytest.raises(
        DataError, match="item 3: field 'id': expected an id that occurs once, got '001-1'; it was already"
    ):
        load("videomme", write_json(tmp_path / "rows.json", rows))


def test_two_files_of_the_same_name_are_named(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clip1.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match="expected one file of this name below data.media_root, got .*one/clip1.mp4"):
        load("videomme", write_json(tmp_path / "rows.json", videomme_rows()))


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def test_a_file_of_the_same_name_in_another_folder_is_not_used(tmp_path):
    touch(tmp_path / "images_version_1-4" / "image_1.png")
    row = ROWS["mathverse"] | {"image": "images_version_5/image_1.png"}
    (question,) = load("mathverse", write_json(tmp_path / "testmini.json", [row]))
    assert question.images == (str(tmp_path / "images_version_5" / "image_1.png"),)
    # The end of a folder's name is not the folder.
    touch(tmp_path / "x" / "other_images_version_5" / "image_1.png")
    assert load("mathverse", tmp_path / "testmini.json") == [question]
    touch(tmp_path / "x" / "images_version_5" / "image_1.png")
    (moved,) = load("mathverse", tmp_path / "testmini.json")
    assert moved.images == (str(tmp_path / "x" / "images_version_5" / "image_1.png"),)
    # The media root may be the folder itself.
    root = tmp_path / "x" / "images_version_5"
    (inside,) = load("mathverse", tmp_path / "testmini.json", media_root=root)
    assert inside.images == moved.images


def test_a_video_of_another_task_is_not_used(tmp_path):
    row = {"video": "7.mp4", "question": "What?", "candidates": ["tea", "milk"], "answer": "milk"}
    write_json(tmp_path / "json" / "1_plotQA.json", [row])
    touch(tmp_path / "video" / "2_needle" / "7.mp4")
    assert not Path(load("mlvu", tmp_path)[0].videos[0]).exists()
    touch(tmp_path / "deep" / "1_plotQA" / "7.mp4")
    assert load("mlvu", tmp_path)[0].videos == (str(tmp_path / "deep" / "1_plotQA" / "7.mp4"),)
    table = tmp_path / "MLVU_MCQ.tsv"
    for prefix, folder in (("./MLVU/video/1_plotQA", "1_plotQA"), ("./video/2_needle/", "2_needle")):
        (question,) = load("mlvu", write_table(table, [row | {"prefix": prefix, "task_type": "plotQA"}]))
        assert Path(question.videos[0]).parent.name == folder and Path(question.videos[0]).exists()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        (
            "mathvista",
            {"question_type": "multi choice"},
            "'question_type': expected one of 'multi_choice', .*multi cho",
        ),
        ("mathverse", {"question_type": "open"}, "field 'question_type': expected one of 'multi-choice'.* got 'open'"),
        ("videommmu", {"question_type": "essay"}, "field 'question_type': expected one of .*, got 'essay'; the annot"),
        ("mathvista", {"image": None}, "expected a field 'decoded_image' or 'image', got the fields"),
        ("mathvista", {"image": " "}, "field 'decoded_image': expected an image, got ' '"),
        ("mathverse", {"image": {"bytes": None, "path": None}}, "field 'image': expected an image, got"),
        ("mathverse", {"problem_index": None}, "expected a field 'problem_index'"),
        ("mathvista", {"choices": None}, "expected a field 'choices'"),
        ("videommmu", {"id": None}, "expected a field 'id' or 'path' or 'video'"),
        ("videommmu", {"question_type": "open", "answer": "[]"}, r"field 'answer': expected one answer, got '\[\]'"),
        ("videommmu", {"question_type": "open", "answer": ["2", "3"]}, "field 'answer': expected one answer"),
        (
            "mathvista",
            {"question_type": "free_form", "choices": None, "precision": 1.5},
            "field 'precision': expected a number of decimals, got 1.5",
        ),
        ("longvideobench", {"correct_choice": 1.7}, "field 'correct_choice': expected a whole number, got 1.7"),
        ("longvideobench", {"correct_choice": "0.5"}, "field 'correct_choice': expected a whole number, got '0.5'"),
        ("mlvu", {"question": "Which?", "candidates": "['one' 'two']"}, r"expected a list such as \['a', 'b'\], got"),
        ("mlvu", {"question": "Which?", "candidates": "['one'\n 'two', 'three']"}, "expected a list such as"),
    ],
)
def test_missing_and_ambiguous_fields_are_errors(tmp_path, name, changes, says):
    with pytest.raises(DataError, match=says):
        load(name, write_json(tmp_path / "rows.json", [ROWS[name] | changes]))


def test_answers_are_read_as_published(tmp_path):
    def only(name: str, **changes) -> Question:
        (question,) = load(name, write_json(tmp_path / "rows.json", [ROWS[name] | changes]))
        return question

    assert only("longvideobench", correct_choice="1.0").answer == "B"
    assert only("videommmu", question_type="open", answer="['2.5']").answer == "2.5"
    # The answer 1.2 with two decimals is 1.20, so 1.24 is wrong.
    free = {"question_type": "free_form", "choices": None, "answer": "1.2"}
    for precision, answer in ((None, "1.2"), (1.0, "1.2"), (2.0, "1.20"), ("2", "1.20")):
        assert only("mathvista", **free, precision=precision).answer == answer
    assert only("mathvista", **free | {"answer": "12"}, precision=1).answer == "12"
    # A list of numbers is one answer.
    assert only("videommmu", question_type="open", answer="[2, 3]").answer == "[2, 3]"
    assert only("mathvista", metadata={"skills": [1, "x"], "grade": 3}).meta["groups"]["skills"] == "1, x"
    labels = only("mlvu", question="Which?", candidates=["A.cat", "B.dog"], answer="dog")
    assert labels.prompt == "Which?\n(A) cat\n(B) dog\nOnly give the best option.\nBest option: ("
    assert labels.answer == "B"


def test_none_and_nan_are_texts_of_options(tmp_path):
    row = {"id": "a", "question": "What?", "video_path": "v.mp4", "correct_choice": 2, "topic_category": "nan"}
    row |= {"option0": "one", "option1": "nan", "option2": "None", "option3": None}
    (question,) = load("longvideobench", write_table(tmp_path / "LongVideoBench.tsv", [row]))
    assert question.options == ("one", "nan", "None") and question.answer == "C"
    assert "topic_category" not in question.meta["groups"]


def test_newer_annotations_and_other_counts_are_warned_of(tmp_path, caplog):
    rows = [row | {"reasoning_type": "new"} for row in videomme_rows()]
    path = write_json(tmp_path / "rows.json", rows)
    with caplog.at_level(logging.WARNING, logger="rmsd_fast"):
        load_benchmark("videomme", path)
    text = caplog.text
    assert "does not know the fields 'reasoning_type'; the annotation may be newer" in text
    assert "videomme has 2,700 questions, got 3; scores are not comparable with published ones" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rmsd_fast"):
        load("videomme", write_json(tmp_path / "rows.json", videomme_rows()), most=3)
    assert not caplog.text
    with caplog.at_level(logging.WARNING, logger="rmsd_fast"):
        load("videomme", tmp_path / "rows.json", most=2)
    assert "evaluate.max_questions=2: only the first of 3 questions of videomme are answered" in caplog.text


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"question": ')
    with pytest.raises(DataError, match="a.json: expected JSON, got text that cannot be parsed"):
        load("videomme", tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"question": "x"}\n[1]\n')
    with pytest.raises(DataError, match=re.escape("a.jsonl:2: expected a JSON object, got list")):
        load("videomme", tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text("question\tanswer\nWhat?\n")
    with pytest.raises(DataError, match="a.tsv: row 1: expected 2 cells as in the header, got another number"):
        load("videomme", tmp_path / "a.tsv")
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match="a.parquet: expected parquet, got a file that cannot be read"):
        load("videomme", tmp_path / "a.parquet")


ASKED = {"question": "Which?", "answer": "B", "candidates": ["A. x", "B. y"]}
ROWS = {
    "videomme": videomme_rows()[0],
    "worldsense": ASKED | {"video": "a", "video_path": "a.mp4", "task_type": "x", "audio_class": ["x"]},
    "longvideobench": {
        "id": "a",
        "question": "Which?",
        "video_path": "v.mp4",
        "correct_choice": 1,
        "duration_group": 60,
    }
    | {"option0": "x", "option1": "y"},
    "mlvu": {"video_name": "a.mp4", "question": "Which?\n(A) x\n(B) y", "answer": "B", "task_type": "count"},
    "videommmu": {
        "id": "dev_Art_1",
        "question": "Which?",
        "options": ["x", "y"],
        "answer": "B",
        "category": "Perception",
    },
    "mathvista": {
        "pid": "1",
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": "y",
        "question_type": "multi_choice",
    }
    | {"answer_type": "text", "query": "Which?", "image": "i.png", "metadata": {"task": "x", "skills": ["a"]}},
    "mathverse": {
        "sample_index": "1",
        "problem_index": 3,
        "problem_version": "Text Lite",
        "question": "x?",
        "answer": "B",
        "image": "i.png",
    }
    | {"question_type": "multi-choice", "query_wo": "P", "metadata": {"subject": "x"}},
    "vstar": vstar_record(),
}
ODD = (
    None,
    3,
    -1.5,
    math.nan,
    10**400,
    "",
    "x" * 5000,
    "\ud800",
    "a\0b",
    "[1,",
    "../../x",
    [],
    [None],
    [[1]],
    {},
    {"a": 1},
    True,
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_damaged_fields_never_raise_other_errors(tmp_path, name):
    whole = load(name, write_json(tmp_path / "rows.json", [ROWS[name]]))
    assert all(question.answer for question in whole)
    for field in ROWS[name]:
        for value in ODD:
            path = write_json(tmp_path / "rows.json", [ROWS[name] | {field: value}])
            try:
                questions = load(name, path, image_cache=tmp_path / "cache")
            except DataError as error:
                assert "rows.json: item 1" in str(error)
            else:
                # A damaged value is read as text or left out; the task, the media and the rest stay.
                assert [(q.task_type, len(q.media)) for q in questions] == [(q.task_type, len(q.media)) for q in whole]
                assert all(q.id and q.question.strip() and q.prompt.strip() for q in questions)
                for question in questions:
                    right = f"<think></think><answer>{question.answer}</answer>"
                    score = quality_score(right, question.task_type, question.answer, options=question.options)
                    assert score == 1 or field == "answer"


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(NotInstalled, match=r"expected the package pyarrow .* pip install 'rmsd-fast\[benchmarks\]'"):
        load("videomme", tmp_path / "a.parquet")


# --- Aggregates -------------------------------------------------------------------------------------------------------


def rows_of(group: str, scores: dict[str, list[float]]) -> list[tuple[dict[str, str], float]]:
    return [({group: value}, score) for value, listed in scores.items() for score in listed]


def test_plain_means():
    for name in ("videomme", "worldsense", "longvideobench", "mathvista"):
        assert aggregate(name, rows_of("duration", {"short": [1, 0, 1], "long": [0]})) == {"mean": 0.5, "score": 0.5}


def test_mlvu_is_the_mean_over_tasks():
    scores = {"plotQA": [1, 1, 1, 0], "needle": [0, 1], "ego": [0], "count": [1], "order": [0], "topic_reasoning": [1]}
    scores["anomaly_reco"] = [0, 0]
    result = aggregate("mlvu", rows_of("task", scores))
    assert result["mean"] == 6 / 12 and result["score"] == pytest.approx((0.75 + 0.5 + 0 + 1 + 0 + 1 + 0) / 7)
    assert result["tasks"]["plotQA"] == 0.75 and list(result["tasks"]) == list(MLVU_DEV)
    # The test has two more tasks, and another spelling of one.
    scores |= {"needleQA": scores.pop("needle"), "sportsQA": [1], "tutorialQA": [1]}
    assert aggregate("mlvu", rows_of("task", scores))["score"] == pytest.approx(5.25 / 9)


@pytest.mark.parametrize("name", ["mlvu", "videommmu", "mathverse", "vstar"])
def test_a_part_of_a_benchmark_has_no_score(name):
    group, names = {
        "mlvu": ("task", MLVU_DEV),
        "videommmu": ("track", ("perception", "comprehension", "adaptation")),
        "mathverse": ("version", VERSIONS),
        "vstar": ("ask", ASKS),
    }[name]
    rows = rows_of(group, {value: [0.5] for value in names})
    assert aggregate(name, rows)["score"] > 0
    # A task without questions, a question without a task, and an unknown task.
    for partial in (rows[1:], [*rows, ({}, 1.0)], [*rows, ({group: "other"}, 1.0)]):
        result = aggregate(name, partial)
        assert "score" not in result and result["mean"] == pytest.approx(sum(s for _, s in partial) / len(partial))
    assert aggregate(name, [({"x": "y"}, 0.5)]) == {"mean": 0.5}


def test_videommmu_and_mathverse_are_means_over_all_parts():
    tracks = {"perception": [1, 1], "comprehension": [1, 0], "adaptation": [0]}
    result = aggregate("videommmu", rows_of("track", tracks))
    assert result["score"] == 0.5 and result["tracks"] == {"perception": 1, "comprehension": 0.5, "adaptation": 0}
    assert "score" not in aggregate("videommmu", rows_of("track", {"adaptation": [1], "unnamed": [0]}))
    versions = {
        "Text Dominant": [1],
        "Text Lite": [1, 0],
        "Vision Intensive": [0],
        "Vision Dominant": [1],
        "Vision Only": [0],
    }
    assert aggregate("mathverse", rows_of("version", versions))["score"] == pytest.approx(2.5 / 5)


def test_vstar_chains():
    scores = {"what": [1, 0], "when1": [0.5, 0.3], "where1": [0.2, 0.4], "where2": [0.1, 0.1], "when2": [0.4, 0.2]}
    result = aggregate("vstar", rows_of("ask", scores))
    # Accuracy 0.5; chain 1: tIoU 0.4, vIoU 0.3; chain 2: tIoU 0.3, vIoU 0.1.
    assert result["accuracy"] == 0.5
    assert result["chain1"]["tiou"] == 0.4 and result["chain1"]["viou"] == pytest.approx(0.3)
    assert result["chain2"]["tiou"] == pytest.approx(0.3) and result["chain2"]["viou"] == 0.1
    am = [(0.5 + 0.4 + 0.3) / 3, (0.5 + 0.3 + 0.1) / 3]
    lgm = [-math.log(0.5 * 0.6 * 0.7) / 3, -math.log(0.5 * 0.7 * 0.9) / 3]
    assert [result["chain1"]["am"], result["chain2"]["am"]] == pytest.approx(am)
    assert [result["chain1"]["lgm"], result["chain2"]["lgm"]] == pytest.approx(lgm)
    assert result["mam"] == pytest.approx(sum(am) / 2) and result["score"] == result["mlgm"] == pytest.approx(
        sum(lgm) / 2
    )
    # Perfect answers have a finite LGM.
    assert math.isfinite(aggregate("vstar", rows_of("ask", {ask: [1.0] for ask in scores}))["score"])
    assert set(aggregate("vstar", rows_of("ask", {"when1": [0.5]}))) == {"mean", "chain1"}


def test_aggregates_refuse_unknown_names_and_empty_rows():
    with pytest.raises(SettingsError, match="got 'mmbench'"):
        aggregate("mmbench", rows_of("task", {"a": [1]}))
    with pytest.raises(ValueError, match="at least one question"):
        aggregate("mlvu", [])


def test_tasks_of_benchmarks_have_prompts():
    for task in ALL_TASKS:
        assert "<answer>" in question_text(Question("a", "?", task))
