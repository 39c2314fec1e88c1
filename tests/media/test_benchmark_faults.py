"""Test what the readers of benchmarks refuse and warn of, and which files they find."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
from benchmark_records import (
    ROWS,
    load,
    touch,
    videomme_rows,
    write_json,
    write_table,
)

from rmsd_fast.config import BENCHMARKS, EvaluateConfig, NotInstalled, SettingsError
from rmsd_fast.data.benchmarks import load_benchmark
from rmsd_fast.data.benchmarks.load import _READERS
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question
from rmsd_fast.method.quality import quality_score


def test_every_benchmark_has_a_reader():
    assert tuple(_READERS) == BENCHMARKS
    assert EvaluateConfig().benchmark == "" and EvaluateConfig().prompt == "rmsd"


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(DataError, match="missing: no such file or folder; get the annotation as docs/"):
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
    # The folder of the media is that of the annotation, which is therefore named first.
    with pytest.raises(DataError, match="^benchmarks/videomme: no such file or folder; get the annotation as docs/"):
        load("videomme", "benchmarks/videomme")
    with pytest.raises(DataError, match="a file without rows"):
        load("videomme", write_json(tmp_path / "empty.json", []))


def test_several_annotations_of_a_folder(tmp_path, caplog):
    for name in ("videomme.json", "videomme_part.json"):
        write_json(tmp_path / name, videomme_rows())
    with pytest.raises(DataError) as caught:
        load("videomme", tmp_path)
    assert "expected one annotation (**/videomme*.json*), got videomme.json, videomme_part.json;" in str(caught.value)
    # A download may have the same annotation in two formats: the first one is read, and both are named.
    (tmp_path / "videomme_part.json").unlink()
    write_table(tmp_path / "Video-MME.tsv", videomme_rows())
    with caplog.at_level(logging.WARNING, logger="rmsd_fast"):
        load_benchmark("videomme", tmp_path)
    assert "the annotation is read from Video-MME.tsv, and not from videomme.json; to read another" in caplog.text
    assert f"{tmp_path / 'Video-MME.tsv'}: videomme has 2,700 questions, got 3" in caplog.text


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
                    assert score == 1


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(NotInstalled, match=r"expected the package pyarrow .* pip install 'rmsd-fast\[benchmarks\]'"):
        load("videomme", tmp_path / "a.parquet")
