"""Test the readers of benchmarks on invented records of each layout."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import pytest
from benchmark_records import (
    OPTIONS,
    PNG,
    ROWS,
    load,
    touch,
    videomme_rows,
    vstar_record,
    write_json,
    write_parquet,
    write_table,
)

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.question_text import question_text
from rmsd_fast.method.quality import quality_score
from rmsd_fast.stages.answer_records import asked_hash, clusters_of

# --- VideoMME --------------------------------------------------------------------------------------------------------


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


def test_questions_without_their_videos(tmp_path):
    """Of a question, its image stays. Questions about one video are still one cluster."""
    touch(tmp_path / "i.png", tmp_path / "a.mp4")
    rows = [ROWS["videommmu"] | {"category": "Adaptation", "image": "i.png"}]
    rows.append(ROWS["videommmu"] | {"id": "dev_Art_2", "category": "Comprehension"})
    file = write_json(tmp_path / "videommmu.json", rows)
    shown, blind = (load("videommmu", file, videos=videos) for videos in (True, False))
    assert [(len(q.videos), len(q.images)) for q in shown] == [(1, 1), (1, 0)]
    assert [(len(q.videos), len(q.images)) for q in blind] == [(0, 1), (0, 0)]
    assert [q.prompt for q in blind] == ["Which?\nA. x\nB. y"] * 2
    assert list(map(asked_hash, blind)) == list(map(asked_hash, shown))
    assert [q.meta["cluster"] for q in blind] == [q.videos[0] for q in shown]
    assert question_text(blind[1]).startswith("Which?")
    asked = [ROWS["worldsense"] | {"question": text} for text in ("Which?", "Where?")]
    questions = load("worldsense", write_json(tmp_path / "worldsense.json", asked), videos=False)
    assert all("<video>" not in q.prompt and "These are the frames" in q.prompt for q in questions)
    assert len(set(clusters_of(questions).values())) == 1


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


def test_worldsense(tmp_path, caplog):
    asked = {"question": "Who speaks?", "answer": "B", "candidates": ["A. He.", "B. She.", "C. Both."]}
    asked |= {"task_domain": "Recognition", "task_type": "Audio Recognition"}
    whole = {
        f"v{n}": {"duration": "1-2min", "domain": "Music", "sub_category": "Jazz", "audio_class": ["Speech", "Music"]}
        | {"video_id": f"v{n}", "video_caption": "A band.", "video_duration": "65s", "task0": asked}
        for n in range(2)
    }
    whole["v0"]["task1"] = asked | {"answer": "C"}
    first, second, third = load("worldsense", write_json(tmp_path / "worldsense_qa.json", whole))
    assert [q.id for q in (first, second, third)] == ["v0/task0", "v0/task1", "v1/task0"]
    assert (first.answer, second.answer) == ("B", "C") and first.videos == (str(tmp_path / "v0.mp4"),)
    assert "does not know the fields" not in caplog.text
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
    # It has no prompts, which are then built as the authors build them.
    whole = {pid: {name: value for name, value in row.items() if name != "query"} for pid, row in whole.items()}
    built = load("mathvista", write_json(tmp_path / "testmini.json", whole))
    assert [question.prompt.split("\n", 1)[1] for question in built] == [
        "Question: Which?\nChoices:\n(A) 3/11\n(B) 8/11",
        "Question: How long? (Unit: cm)",
        "Question: When?",
    ]
    assert "provide the correct option letter, e.g., A, B, C, D, at the end.\n" in built[0].prompt
    assert "number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at" in built[1].prompt
    assert "a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, " in built[2].prompt
    whole["2"]["precision"] = 3
    with pytest.raises(DataError, match="'precision': expected a field 'query', or 1 or 2 decimals, got 3"):
        load("mathvista", write_json(tmp_path / "testmini.json", whole))
    whole["2"]["answer_type"] = "complex"
    with pytest.raises(DataError, match="'answer_type': expected .* 'integer', 'float', 'list', got 'complex'"):
        load("mathvista", write_json(tmp_path / "testmini.json", whole))


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
    # A few answers are the text of an option, whose letter counts, or two letters.
    odd = [
        {"sample_index": "4", "question": "Is it?\nChoice:\nA. False\nB. True", "answer": "True"},
        {"sample_index": "5", "question": "", "question_for_eval": "Find it.\nChoices:\nA:09\nB:18", "answer": "09"},
        {"sample_index": "6", "question": "Choose 2.\nChoices:\nA:x\nB:y\nC:x", "answer": "A\nC"},
        {"sample_index": "7", "question": "", "answer": "False", "problem_version": "Vision Only"},
    ]
    odd = [rows[0] | {"image": "i.png"} | row for row in odd]
    questions = load("mathverse", write_json(tmp_path / "testmini.json", odd))
    assert [(question.task_type, question.answer) for question in questions] == [
        ("mcq", "B"),
        ("mcq", "A"),
        ("exact", "A and C"),
        ("exact", "False"),
    ]
    assert quality_score("<think></think><answer>A and C</answer>", "exact", questions[2].answer) == 1
    for damaged in (odd[0] | {"answer": "Perhaps"}, odd[3] | {"answer": "J"}):
        with pytest.raises(DataError, match="field 'answer': expected a letter from A to H, or an option .* got"):
            load("mathverse", write_json(tmp_path / "testmini.json", [damaged]))
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
