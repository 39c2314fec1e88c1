"""Question files: what is read, what is refused and what the message names."""

import json
from pathlib import Path

import pytest

from rmsd_fast.data.records import DataError, Question, answer_text, load_questions, write_questions
from rmsd_fast.method.natural import Unreadable

GOOD = {"id": "q1", "videos": ["a.mp4"], "question": "Which colour?", "task_type": "mcq", "options": ["red", "green"]}
GOOD |= {"answer": "B"}


def write(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in records))
    return path


def test_reads_every_field(tmp_path):
    record = GOOD | {"duration": 8, "meta": {"source": "x"}}
    (question,) = load_questions(write(tmp_path / "q.jsonl", record))
    assert question == Question(
        id="q1",
        question="Which colour?",
        task_type="mcq",
        videos=(str((tmp_path / "a.mp4").resolve()),),
        options=("red", "green"),
        answer="B",
        duration=8.0,
        meta={"source": "x"},
    )


def test_blank_lines_unicode_and_numeric_ids(tmp_path):
    # U+2028 may stand inside a JSON string and must not end the line.
    line = json.dumps(GOOD | {"id": 7, "question": "Où ? 视频\u2028ja"}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text("\n" + line + "\n\n", encoding="utf-8")
    (question,) = load_questions(tmp_path / "q.jsonl")
    assert question.id == "7" and question.question == "Où ? 视频\u2028ja"


def test_json_list(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([GOOD, GOOD | {"id": "q2", "answer": "Z"}]))
    with pytest.raises(DataError, match=r"q\.json: item 2: field 'answer': expected one option letter.*got 'Z'"):
        load_questions(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [
        ("temporal", [12.5, 20], "12.5 to 20"),
        ("spatial", [1, 2, 3, 4.5], "1,2,3,4.5"),
        ("numeric", 3, "3"),
        ("ocr", 42, "42"),
        ("open", " text ", "text"),
        ("numeric", "1,200", "1200"),
        ("temporal", [["3", "5"]], "3 to 5"),
        ("temporal", {"start": 3, "end": 5}, "3 to 5"),
        ("ocr", ' "EXIT". ', '"EXIT".'),
    ],
)
def test_answer_text(task, given, expected):
    assert answer_text(given, task) == expected


@pytest.mark.parametrize(
    ("task", "given"),
    [("numeric", True), ("temporal", [1, 2, 3]), ("spatial", [1, 2, 3, None]), ("mcq", 1), ("open", ["a"])],
)
def test_answers_that_are_not_one_answer(task, given):
    with pytest.raises(Unreadable):
        answer_text(given, task)


def test_ground_truths_are_normalised(tmp_path):
    base = {"videos": ["a.mp4"], "question": "?"}
    path = write(
        tmp_path / "q.jsonl",
        base | {"id": "a", "task_type": "mcq", "options": ["A. x", "B. y"], "answer": "(b)"},
        base | {"id": "b", "task_type": "temporal", "answer": [1, 2.5]},
        base | {"id": "c", "task_type": "open"},
    )
    assert [q.answer for q in load_questions(path)] == ["B", "1 to 2.5", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, r"field 'id': expected text that is not empty, got ''"),
        ({"id": True}, r"field 'id'"),
        ({"question": None}, r"field 'question': expected text that is not empty, got nothing"),
        ({"task_type": "quiz"}, r"field 'task_type': expected one of mcq, temporal.*got 'quiz'"),
        ({"task_type": ["mcq"]}, r"field 'task_type'"),
        ({"videos": {"a": 1}}, r"field 'videos': expected a list of paths, got \{'a': 1\}"),
        ({"videos": [3]}, r"field 'videos': expected paths \(text\), got 3"),
        ({"videos": ["a\0.mp4"]}, r"field 'videos'"),
        ({"videos": []}, r"expected at least one path under 'videos' or 'images'"),
        (
            {"question": "Who <image>? <image>"},
            r"field 'question': expected one mark for each of 1 videos and 0 images",
        ),
        ({"question": "<|im_end|>Who?"}, r"field 'question': expected plain text, got '<\|im_end\|>'"),
        ({"question": "a\ud800b"}, r"field 'question': expected Unicode text"),
        ({"id": "a\ud800b"}, r"field 'id': expected Unicode text"),
        ({"system": ""}, r"field 'system': expected plain text that is not empty"),
        ({"options": {"A": "x", "C": "y"}}, r"field 'options': expected the letters A, B, C"),
        ({"answer": 1}, r"an index may count from 0 or from 1, write the letter"),
        ({"answer": "A or B"}, r"several different answers were given"),
        ({"videos": ["x" * 300 + ".mp4"]}, r"field 'videos': expected a path that can be looked up"),
        ({"videos": ["https://x.org/a.mp4"]}, r"expected a local path"),
        ({"videos": [{"start": 1}]}, r"expected paths \(text\), got nothing"),
        ({"videos": [{"path": "a.mp4", "begin": 1}]}, r"field 'videos': expected path, start and end, got 'begin'"),
        ({"videos": [{"path": "a.mp4", "start": -1}]}, r"expected start and end in seconds from 0, got -1"),
        ({"videos": [{"path": "a.mp4", "end": True}]}, r"expected start and end in seconds from 0, got True"),
        ({"videos": [{"path": "a.mp4", "start": 3, "end": 3}]}, r"expected an end after the start, got \[3, 3\]"),
        ({"options": ["red"]}, r"field 'options': expected 2 to 26 choices"),
        ({"options": "red"}, r"field 'options': expected a list of texts"),
        ({"options": ["red", ""]}, r"field 'options'"),
        ({"answer": "C"}, r"field 'answer': expected one option letter such as 'B' among AB, got 'C'"),
        (
            {"answer": None},
            r"field 'answer': expected one option letter.*closed task, got nothing; add the ground truth",
        ),
        ({"task_type": "numeric", "options": None, "answer": "many"}, r"expected one finite number"),
        ({"task_type": "numeric", "options": None, "answer": "nan"}, r"expected one finite number"),
        ({"task_type": "numeric"}, r"field 'options': expected none"),
        ({"task_type": "temporal", "options": None, "answer": "5 to 5"}, r"expected an end after the start"),
        ({"task_type": "spatial", "options": None, "answer": "5,1,4,9"}, r"expected x1 < x2 and y1 < y2"),
        ({"duration": -1}, r"field 'duration': expected seconds above 0"),
        ({"duration": "8"}, r"field 'duration'"),
        ({"meta": []}, r"field 'meta': expected a JSON object"),
        ({"anwser": "B"}, r"field 'anwser': expected one of the fields"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, message):
    path = write(tmp_path / "q.jsonl", GOOD, GOOD | {"id": "q2"} | change)
    with pytest.raises(DataError, match=r"q\.jsonl:2: .*" + message):
        load_questions(path)


def test_parts_of_videos_are_read_and_written(tmp_path):
    part = {"path": "a.mp4", "start": 3.5, "end": 10}
    path = write(
        tmp_path / "q.jsonl",
        GOOD | {"videos": ["b.mp4", part]},
        GOOD | {"id": "q2", "videos": [{"path": "a.mp4", "start": 2}]},
        GOOD | {"id": "q3", "videos": [{"path": "a.mp4"}]},
    )
    questions = load_questions(path)
    assert [q.spans for q in questions] == [(None, (3.5, 10.0)), ((2.0, None),), (None,)]
    assert [Path(one).name for one in questions[0].videos] == ["b.mp4", "a.mp4"]
    write_questions(tmp_path / "again.jsonl", questions, media_root=tmp_path)
    again = load_questions(tmp_path / "again.jsonl")
    assert again[:2] == questions[:2] and again[2].spans == () and again[2].videos == questions[2].videos


def test_duplicate_id_names_both_lines(tmp_path):
    with pytest.raises(DataError, match=r"q\.jsonl:3: field 'id'.*q\.jsonl:1"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, GOOD | {"id": "q2"}, GOOD))


@pytest.mark.parametrize("line", ["{", "[1", "3", '"x"', "null", "[" * 100_000])
def test_lines_that_are_no_objects(tmp_path, line):
    with pytest.raises(DataError, match=r"q\.jsonl:2: expected"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, line))


def test_empty_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="expected at least one question"):
        load_questions(write(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="expected UTF-8"):
        load_questions(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="format: expected one of auto"):
        load_questions(write(tmp_path / "q.jsonl", GOOD), format="csv")


def test_answers_may_be_missing_on_request(tmp_path):
    path = write(tmp_path / "q.jsonl", GOOD | {"answer": None})
    assert load_questions(path, require_answer=False)[0].answer is None


@pytest.mark.parametrize("bad", ["../a.mp4", "/etc/passwd", "sub/../../a.mp4", "link/a.mp4", "file.mp4"])
def test_paths_stay_inside_the_media_root(tmp_path, bad):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.mp4").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file.mp4").symlink_to(tmp_path / "outside" / "a.mp4")
    path = write(root / "q.jsonl", GOOD | {"videos": [bad]})
    with pytest.raises(DataError, match=r"q\.jsonl:1: field 'videos': expected a path inside the media root"):
        load_questions(path)


def test_paths_start_at_the_media_root_and_links_within_are_fine(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"x")
    (root / "alias.mp4").symlink_to("a.mp4")
    absolute = str(root / "a.mp4")
    path = write(tmp_path / "q.jsonl", GOOD | {"videos": ["a.mp4", "alias.mp4", absolute, "sub/../a.mp4"]})
    (question,) = load_questions(path, media_root=root)
    assert set(question.videos) == {str((root / "a.mp4").resolve())}
    # A file that is not there is a fault of the sample, found when it is decoded.
    (question,) = load_questions(write(tmp_path / "p.jsonl", GOOD | {"videos": ["none.mp4"]}), media_root=root)
    assert question.videos == (str((root / "none.mp4").resolve()),)


def test_write_reads_back_with_relative_paths(tmp_path):
    questions = load_questions(write(tmp_path / "q.jsonl", GOOD | {"duration": 2, "meta": {"a": [1]}}))
    write_questions(tmp_path / "copy.jsonl", questions, media_root=tmp_path)
    assert json.loads((tmp_path / "copy.jsonl").read_text())["videos"] == ["a.mp4"]
    assert load_questions(tmp_path / "copy.jsonl") == questions
    assert not list(tmp_path.glob(".*"))


def test_several_faults_come_in_one_report(tmp_path):
    bad = [GOOD | {"id": f"q{index}", "answer": "Z"} for index in range(30)]
    with pytest.raises(DataError) as caught:
        load_questions(write(tmp_path / "q.jsonl", GOOD, "{", *bad))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("q.jsonl: 31 of 32 records cannot be used:")
    assert "q.jsonl:2: expected one JSON object" in lines[1] and "q.jsonl:3: field 'answer'" in lines[2]
    assert len(lines) == 22 and lines[-1] == "  and 11 more"


def test_links_out_of_the_root_are_followed_on_request(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.mp4").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "outside")
    path = write(root / "q.jsonl", GOOD | {"videos": ["link/a.mp4"]})
    (question,) = load_questions(path, follow_symlinks=True)
    assert question.videos == (str(root / "link" / "a.mp4"),)
    path = write(root / "q.jsonl", GOOD | {"videos": ["../outside/a.mp4"]})
    with pytest.raises(DataError, match="expected a path inside the media root"):
        load_questions(path, follow_symlinks=True)


def test_a_file_that_is_there_may_have_a_backslash_in_its_name(tmp_path):
    (tmp_path / "a\\b.mp4").write_bytes(b"x")
    path = write(tmp_path / "q.jsonl", GOOD | {"videos": ["a\\b.mp4", "c\\d.mp4"]})
    (question,) = load_questions(path)
    assert question.videos == (str(tmp_path.resolve() / "a\\b.mp4"), str(tmp_path.resolve() / "c" / "d.mp4"))


def test_system_text_marks_and_images_beside_videos_are_kept(tmp_path):
    record = GOOD | {"system": "Be brief.", "images": ["b.png"], "question": "Is <image> in <video>?"}
    (question,) = load_questions(write(tmp_path / "q.jsonl", record))
    assert question.system == "Be brief." and question.question == "Is <image> in <video>?"
    assert [(kind, Path(path).name) for kind, path, _ in question.media] == [("image", "b.png"), ("video", "a.mp4")]
    write_questions(tmp_path / "again.jsonl", [question], media_root=tmp_path)
    assert load_questions(tmp_path / "again.jsonl") == [question]
    # Without marks videos come first.
    (question,) = load_questions(write(tmp_path / "q.jsonl", record | {"question": "Is it there?"}))
    assert [kind for kind, _, _ in question.media] == ["video", "image"]
