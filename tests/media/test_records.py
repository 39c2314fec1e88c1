"""Test which question files are read, which are refused, and what the messages say."""

import json
from pathlib import Path

import pytest

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question, load_questions, write_questions

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
    # U+2028 may occur inside a JSON string and must not end the line.
    line = json.dumps(GOOD | {"id": 7, "question": "Où ? 视频\u2028ja"}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text("\n" + line + "\n\n", encoding="utf-8")
    (question,) = load_questions(tmp_path / "q.jsonl")
    assert question.id == "7" and question.question == "Où ? 视频\u2028ja"


def test_json_list(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([GOOD, GOOD | {"id": "q2", "answer": "Z"}]))
    with pytest.raises(DataError, match=r"q\.json: item 2: field 'answer': expected one option letter.*got 'Z'"):
        load_questions(tmp_path / "q.json")


def test_ground_truths_are_normalized(tmp_path):
    base = {"videos": ["a.mp4"], "question": "?"}
    path = write(
        tmp_path / "q.jsonl",
        base | {"id": "a", "task_type": "mcq", "options": ["A. x", "B. y"], "answer": "(b)"},
        base | {"id": "b", "task_type": "temporal", "answer": [1, 2.5]},
        base | {"id": "c", "task_type": "open"},
    )
    assert [q.answer for q in load_questions(path)] == ["B", "1 to 2.5", None]


def test_a_list_in_an_object_on_one_line_or_several(tmp_path):
    records = [GOOD, GOOD | {"id": "q2"}]
    for indent in (None, 2):
        (tmp_path / "q.json").write_text(json.dumps({"data": records, "next": None}, indent=indent))
        assert [question.id for question in load_questions(tmp_path / "q.json")] == ["q1", "q2"]
        # A single record is not a list of records, even if its values are lists.
        (tmp_path / "q.json").write_text(json.dumps(GOOD, indent=indent))
        assert [question.id for question in load_questions(tmp_path / "q.json")] == ["q1"]
    (tmp_path / "q.json").write_text(json.dumps({"train": records, "test": records}))
    with pytest.raises(
        DataError, match=r"an object that holds only one list, got one object with the keys 'train', 'test'"
    ):
        load_questions(tmp_path / "q.json")
    # Values next to the list might apply to every record.
    for beside in ({"system": "s", "media_root": "/x"}, {"version": 1}, {"license": []}):
        (tmp_path / "q.json").write_text(json.dumps(beside | {"data": records}))
        keys = ", ".join(map(repr, beside))
        with pytest.raises(DataError, match=rf"got one object with the keys {keys}, 'data'; write one record per"):
            load_questions(tmp_path / "q.json")
    (tmp_path / "q.json").write_text(json.dumps({"data": []}))
    with pytest.raises(DataError, match="expected at least one question"):
        load_questions(tmp_path / "q.json")


def test_a_damaged_first_line_is_reported_like_any_other(tmp_path):
    for lines in (("{",), ("{", GOOD), ('{"id": 1, "vid', GOOD, "{")):
        with pytest.raises(DataError, match=r"q\.jsonl:1: expected one JSON object per line"):
            load_questions(write(tmp_path / "q.jsonl", *lines))
    # If one object spans several lines, the error names the faulty line.
    (tmp_path / "q.jsonl").write_text(json.dumps({"data": [GOOD]}, indent=2).replace('"red",', '"red"'))
    with pytest.raises(DataError, match=r"q\.jsonl:\d+: expected JSON, got text that cannot be parsed"):
        load_questions(tmp_path / "q.jsonl")


def test_marks_with_blanks_inside_are_text(tmp_path):
    def question_of(text):
        return load_questions(write(tmp_path / "q.jsonl", GOOD | {"question": text}))[0].question

    for text in ("In HTML, what does < video > do?", "What does <video > do?", "What does < image> do?", "<video />?"):
        assert question_of(text) == text
    assert question_of("<VIDEO> Which?") == question_of("<video_1>Which?") == question_of("<video 1>Which?") == "Which?"
    assert question_of("Which <video/> is it? < video >") == "Which <video> is it? < video >"


@pytest.mark.parametrize(("alias", "field"), [("video", "videos"), ("image", "images")])
def test_empty_lists_do_not_hide_a_medium(tmp_path, alias, field):
    record = {name: value for name, value in GOOD.items() if name != "videos"} | {"videos": [], "images": []}
    (question,) = load_questions(write(tmp_path / "q.jsonl", record | {alias: "clip.mp4"}))
    assert [Path(path).name for path in getattr(question, field)] == ["clip.mp4"] and len(question.media) == 1


def test_questions_about_text_alone_say_so(tmp_path):
    """An empty list alone may be a mistake, so both must be there."""
    record = {name: value for name, value in GOOD.items() if name != "videos"} | {"videos": [], "images": []}
    (question,) = load_questions(write(tmp_path / "q.jsonl", record))
    assert question.videos == question.images == () and question.media == []
    write_questions(tmp_path / "again.jsonl", [question], media_root=tmp_path)
    assert json.loads((tmp_path / "again.jsonl").read_text())["images"] == []
    assert load_questions(tmp_path / "again.jsonl") == [question]
    for changes in ({"images": None}, {"videos": None}, {"video": []}):
        lacking = {name: value for name, value in (record | changes).items() if value is not None}
        if "video" in changes:
            del lacking["videos"]
        with pytest.raises(DataError, match="with both lists empty for a question about text alone"):
            load_questions(write(tmp_path / "q.jsonl", lacking))
    for task, answer in (("temporal", "1 to 2"), ("spatial", "1,2,3,4")):
        asked = {name: value for name, value in record.items() if name != "options"}
        with pytest.raises(DataError, match="a video, since temporal|a type other than spatial"):
            load_questions(write(tmp_path / "q.jsonl", asked | {"task_type": task, "answer": answer}))


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    """The last value would silently take effect."""
    twice = json.dumps(GOOD).replace('"answer": "B"', '"answer": "B", "answer": "A"')
    message = r"field 'answer': expected each key once, got 'B' and 'A' in the object of id 'q1'; keep one of the two"
    with pytest.raises(DataError, match=r"q\.jsonl:2: " + message):
        load_questions(write(tmp_path / "q.jsonl", GOOD | {"id": "q0"}, twice))
    for text in (f"[{twice}]", f'{{"data": [{twice}]}}', twice.replace("{", "{\n", 1)):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(DataError, match=r"q\.json: " + message):
            load_questions(tmp_path / "q.json")
    # Keys that repeat inside other values are refused too, even with equal values.
    inner = json.dumps(GOOD).replace('["a.mp4"]', '[{"path": "a.mp4", "start": 1, "start": 1}]')
    with pytest.raises(DataError, match=r"q\.jsonl: field 'start': expected each key once, got 1 and 1; keep one"):
        load_questions(write(tmp_path / "q.jsonl", inner))


def test_options_listed_in_the_question_are_not_shown_twice(tmp_path):
    def question_of(text, **changes):
        return load_questions(write(tmp_path / "q.jsonl", GOOD | {"question": text} | changes))[0].question

    assert question_of("Which?\nOptions:\nA. red\n\nB. green") == "Which?"
    assert question_of("Which?\n(A) red\n(B) green\nLook closely.") == "Which?\nLook closely."
    assert question_of("Which?\nA. Red.\nB. Green.") == "Which?"
    # The question shows other options, text that only resembles options, or nothing but the list.
    for text in ("Which?\nA. tea\nB. milk", "What is said?\nA: Hello!\nB: Hi!", "A. red\nB. green"):
        assert question_of(text) == text
    for text in (
        "Is the car in (b) red?",
        "Which is like B. green tea?",
        "Is it a red or b. red wine",
        "Does the red car stop?",
    ):
        assert question_of(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Which?\nA. green\nB. red", r"expected 'red' after A, its letter in 'options', got 'b\. red'; use the same"),
        ("A. green\nB. red", r"expected 'red' after A"),
        ("Which?\nB. red\nA. green", r"expected 'red' after A"),
        ("Which? (A) Green (B) Red", r"expected 'red' after A, its letter in 'options', got '\(b\) red'"),
        ("Which? A: green; B: red.", r"expected 'red' after A"),
        ("Which?\nB. red\nC. green", r"expected 'red' after A"),
        # The prompt would have two lists, and one letter would mean two options.
        ("Which?\nA. red\nB. blue", r"expected the list in the question to be the same as 'options', got \['A\. red'"),
        ("Which?\nA. red\nB. green\nC. blue", r"expected the list in the question to be the same as 'options'"),
    ],
)
def test_a_question_that_gives_options_other_letters_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=r"q\.jsonl:1: field 'question': " + message):
        load_questions(write(tmp_path / "q.jsonl", GOOD | {"question": text}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["B. tea", "A. milk"], r"expected letters in the order A, B, got B, A; put the options in the order of"),
        (["(b) tea", "(a) milk"], r"got B, A"),
        ({"A": "B. tea", "B": "A. milk"}, r"got B, A"),
        (["A. tea", "A. milk"], r"got A, A"),
        (["B. tea", "C. milk", "D. water"], r"got B, C, D"),
        (["A. tea", "B. milk", "D. water"], r"got A, B, D"),
        # Not every option has a letter.
        (["B. tea", "milk"], r"got B;"),
        (["tea", "A. milk"], r"got A;"),
        (["A. tea", "B.  "], r"expected a text after each letter, got 'B\.  '; add it or remove the option"),
        (["tea", "B."], r"expected a text after each letter, got 'B\.'"),
        (["tea", "tea"], r"expected different options, got 'tea' twice; remove one of the two"),
        (["A. tea", "B. tea "], r"got 'tea' twice"),
        ([5, "5"], r"got '5' twice"),
    ],
)
def test_options_that_contradict_themselves_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=r"q\.jsonl:1: field 'options': .*" + message):
        load_questions(write(tmp_path / "q.jsonl", GOOD | {"options": options, "answer": "A"}))


@pytest.mark.parametrize(
    ("options", "images"),
    [
        # These are names, letters as options, texts that differ only in case, and pictures.
        (["A. Lincoln", "G. Washington"], 0),
        (["Newton", "P. Curie"], 0),
        (["p.m.", "a.m."], 0),
        (["J.S. Bach", "A.A. Milne"], 0),
        (["C", "A", "B"], 0),
        (["A.", "B."], 0),
        (["paris", "Paris"], 0),
        (["-5", "5"], 0),
        (["<image>", "<image>"], 2),
    ],
)
def test_similar_but_distinct_options_are_kept(tmp_path, options, images):
    record = GOOD | {"options": options, "answer": "A. " + options[0]}
    record |= {"videos": [], "images": ["1.png", "2.png"]} if images else {}
    (question,) = load_questions(write(tmp_path / "q.jsonl", record | ({"answer": "A"} if images else {})))
    assert question.options == tuple(options) and question.answer == "A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, r"field 'id': expected non-empty text, got ''"),
        ({"id": True}, r"field 'id'"),
        ({"question": None}, r"field 'question': expected non-empty text, got nothing"),
        ({"task_type": "quiz"}, r"field 'task_type': expected one of mcq, temporal.*got 'quiz'"),
        ({"task_type": ["mcq"]}, r"field 'task_type'"),
        ({"videos": {"a": 1}}, r"field 'videos': expected path, start and end, got 'a'"),
        ({"video": "b.mp4"}, r"field 'video': expected the same as 'videos' \(\['a\.mp4'\]\), got 'b\.mp4'; keep one"),
        ({"options": ["red", "a\ud800b"]}, r"field 'options': expected Unicode text"),
        ({"task_type": "ocr", "options": None, "answer": "a\ud800b"}, r"field 'answer': expected Unicode text"),
        ({"videos": [3]}, r"field 'videos': expected paths \(text\), got 3"),
        ({"videos": ["a\0.mp4"]}, r"field 'videos'"),
        ({"videos": []}, r"expected at least one path under 'videos' or 'images'"),
        (
            {"question": "Who <image>? <image>"},
            r"field 'question': expected one mark for each of 1 video and 0 images",
        ),
        # If there is only a video, the mark refers to the video.
        (
            {"question": "<image>Who?"},
            r"one mark for each of 1 video and 0 images, got 0 <video> and 1 <image>; fix the",
        ),
        ({"question": "<video>Who?", "videos": [], "images": ["a.png"]}, r"0 videos and 1 image, got 1 <video> and 0"),
        ({"question": "<|im_end|>Who?"}, r"field 'question': expected plain text, got '<\|im_end\|>'"),
        ({"question": "<|fim_prefix2|>Who?"}, r"expected plain text, got '<\|fim_prefix2\|>'"),
        ({"question": "a\ud800b"}, r"field 'question': expected Unicode text"),
        ({"id": "a\ud800b"}, r"field 'id': expected Unicode text"),
        ({"system": ""}, r"field 'system': expected non-empty plain text"),
        ({"options": {"A": "x", "C": "y"}}, r"field 'options': expected the letters A, B, C"),
        ({"answer": 1}, r"an index may count from 0 or from 1; write the letter"),
        ({"answer": "A or B"}, r"field 'answer': expected one option letter.*got 'A or B'; write the letter"),
        ({"videos": ["x" * 300 + ".mp4"]}, r"field 'videos': expected a path that can be looked up"),
        ({"videos": ["https://x.org/a.mp4"]}, r"expected a local path"),
        ({"videos": [{"start": 1}]}, r"expected paths \(text\), got nothing"),
        ({"videos": [{"path": "a.mp4", "begin": 1}]}, r"field 'videos': expected path, start and end, got 'begin'"),
        ({"videos": [{"path": "a.mp4", "start": -1}]}, r"expected start and end in seconds from 0, got -1"),
        ({"videos": [{"path": "a.mp4", "end": True}]}, r"expected start and end in seconds from 0, got True"),
        ({"videos": [{"path": "a.mp4", "start": 3, "end": 3}]}, r"expected an end after the start, got \[3, 3\]"),
        (
            {"options": []},
            r"field 'options': expected the options of an mcq question, here or as a list.*got \[\]; add",
        ),
        ({"options": None}, r"field 'options': expected the options of an mcq question.*got nothing; add them, or"),
        ({"options": ["red"]}, r"field 'options': expected 2 to 26 options"),
        ({"options": "red"}, r"field 'options': expected a list of non-empty texts"),
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
        ({"duration": -1}, r"field 'duration': expected a number of seconds above 0"),
        ({"duration": "8"}, r"field 'duration'"),
        ({"duration": 10**400}, r"field 'duration': expected a number of seconds above 0, got 1000"),
        ({"task_type": "numeric", "options": None, "answer": 10**400}, r"field 'answer': expected one finite number"),
        ({"task_type": "temporal", "options": None, "answer": [3, 10**400]}, r"field 'answer': expected '<start> to"),
        ({"task_type": "ocr", "options": None, "answer": 10**400}, r"field 'answer': expected text"),
        ({"meta": []}, r"field 'meta': expected a JSON object"),
        ({"anwser": "B"}, r"field 'anwser': expected one of the fields"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, message):
    path = write(tmp_path / "q.jsonl", GOOD, GOOD | {"id": "q2"} | change)
    with pytest.raises(DataError, match=r"q\.jsonl:2: .*" + message):
        load_questions(path)


TIMED = {"id": "t", "question": "When?", "task_type": "temporal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The times are milliseconds or frame numbers.
        ({"duration": 20.0, "answer": "12000 to 15000"}, r"expected an interval of the video.*duration of 20 s"),
        ({"duration": 20.0, "answer": "18 to 21.5"}, r"got '18 to 21\.5'.*duration of 20 s"),
        ({"duration": 200.0, "answer": "180 to 211"}, r"duration of 200 s"),
        # The times count from the start of the part.
        (
            {"videos": [{"path": "a.mp4", "start": 30, "end": 40}], "answer": "0 to 4"},
            r"the part shown is 30 s to 40 s",
        ),
        ({"videos": [{"path": "a.mp4", "start": 30}], "answer": "0 to 4"}, r"the part shown is 30 s to its end"),
        ({"videos": [{"path": "a.mp4", "end": 40}], "answer": "35 to 45"}, r"the part shown is 0 s to 40 s"),
        ({"answer": "-3 to 5"}, r"times count from 0"),
        # None of the videos contains the interval.
        ({"videos": ["a.mp4", "b.mp4"], "answer": "-5 to 3"}, r"times count from 0"),
        ({"videos": ["a.mp4", "b.mp4"], "duration": 10, "answer": "200 to 300"}, r"duration of 10 s"),
        (
            {"videos": [{"path": "a.mp4", "end": 10}, {"path": "a.mp4", "start": 30, "end": 40}], "answer": "12 to 20"},
            r"the part shown is 0 s to 10 s",
        ),
    ],
)
def test_intervals_that_the_video_cannot_hold_are_refused(tmp_path, change, message):
    path = write(tmp_path / "q.jsonl", TIMED | {"videos": ["a.mp4"]} | change)
    with pytest.raises(DataError, match=r"q\.jsonl:1: field 'answer': .*" + message):
        load_questions(path)


@pytest.mark.parametrize(
    "change",
    [
        # The end is within 1 s or within 5% of the duration.
        {"duration": 20.0, "answer": "18 to 20.9"},
        {"duration": 200.0, "answer": "180 to 209"},
        {"videos": [{"path": "a.mp4", "start": 30, "end": 40}], "answer": "29.5 to 40.5"},
        # The duration may be that of the part.
        {"videos": [{"path": "a.mp4", "start": 30, "end": 40}], "duration": 10, "answer": "31 to 33"},
        {"videos": [{"path": "a.mp4", "start": 30}], "answer": "100 to 130"},
        # With two videos it is unknown which video is meant, and one of them contains the interval.
        {"videos": ["a.mp4", "b.mp4"], "answer": "30 to 40"},
        {"videos": [{"path": "a.mp4", "end": 10}, {"path": "a.mp4", "start": 30, "end": 40}], "answer": "32 to 38"},
        {"videos": [{"path": "a.mp4", "end": 10}, "b.mp4"], "answer": "100 to 130"},
    ],
)
def test_intervals_that_the_video_can_hold_are_kept(tmp_path, change):
    (question,) = load_questions(write(tmp_path / "q.jsonl", TIMED | {"videos": ["a.mp4"]} | change))
    assert question.answer == change["answer"]


def test_times_need_a_video(tmp_path):
    record = TIMED | {"images": ["a.png"], "answer": "1 to 3"}
    for change in ({}, {"videos": []}, {"answer": None}):
        path = write(tmp_path / "q.jsonl", record | change)
        with pytest.raises(
            DataError, match=r"q\.jsonl:1: field 'videos': expected a video, since temporal answers are"
        ):
            load_questions(path, require_answer=change != {"answer": None})


def test_one_video_may_be_named_twice(tmp_path):
    (question,) = load_questions(write(tmp_path / "q.jsonl", GOOD | {"video": "a.mp4", "image": []}))
    assert question.videos == (str(tmp_path.resolve() / "a.mp4"),)


def test_a_folder_is_not_a_medium(tmp_path):
    (tmp_path / "frames").mkdir()
    path = write(tmp_path / "q.jsonl", GOOD | {"videos": ["frames"]})
    with pytest.raises(
        DataError, match=r"q\.jsonl:1: field 'videos': expected a file, got 'frames \(a folder\)'.*ffmpeg"
    ):
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


def test_a_pool_is_not_a_question_file(tmp_path):
    line = {"id": "q1", "k": 0, "text": "B", "model": "m"}
    for format in ("auto", "rmsd", "llava"):
        with pytest.raises(DataError) as caught:
            load_questions(write(tmp_path / "q.jsonl", line, line | {"k": 1}), format=format)
        assert str(caught.value).endswith(
            "q.jsonl:1: expected a question, got the keys 'id', 'k', 'text', 'model' of a teacher answer; if this is "
            "the pool, swap the two files or name the question file here"
        )


def test_duplicate_id_names_both_lines(tmp_path):
    with pytest.raises(DataError, match=r"q\.jsonl:3: field 'id'.*q\.jsonl:1"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, GOOD | {"id": "q2"}, GOOD))


@pytest.mark.parametrize("line", ["{", "[1", "3", '"x"', "null", "[" * 100_000])
def test_lines_that_are_not_objects(tmp_path, line):
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


def test_a_home_folder_is_expanded(tmp_path):
    for path in ("~/a.mp4", "~you/a.mp4"):
        with pytest.raises(DataError, match=r"field 'videos': expected a path, got '~.*'~' is not expanded; write the"):
            load_questions(write(tmp_path / "q.jsonl", GOOD | {"videos": [path]}))
    # A file name may begin with a tilde.
    (tmp_path / "~a.mp4").write_bytes(b"x")
    (question,) = load_questions(write(tmp_path / "q.jsonl", GOOD | {"videos": ["~a.mp4"]}))
    assert question.videos == (str(tmp_path.resolve() / "~a.mp4"),)


def test_paths_start_at_the_media_root_and_links_within_are_fine(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"x")
    (root / "alias.mp4").symlink_to("a.mp4")
    absolute = str(root / "a.mp4")
    path = write(tmp_path / "q.jsonl", GOOD | {"videos": ["a.mp4", "alias.mp4", absolute, "sub/../a.mp4"]})
    (question,) = load_questions(path, media_root=root)
    assert set(question.videos) == {str((root / "a.mp4").resolve())}
    # A missing file is a fault of the sample and is found when the file is decoded.
    (question,) = load_questions(write(tmp_path / "p.jsonl", GOOD | {"videos": ["none.mp4"]}), media_root=root)
    assert question.videos == (str((root / "none.mp4").resolve()),)


def test_write_reads_back_with_relative_paths(tmp_path):
    questions = load_questions(write(tmp_path / "q.jsonl", GOOD | {"duration": 2, "meta": {"a": [1]}}))
    write_questions(tmp_path / "copy.jsonl", questions, media_root=tmp_path)
    assert json.loads((tmp_path / "copy.jsonl").read_text())["videos"] == ["a.mp4"]
    assert load_questions(tmp_path / "copy.jsonl") == questions
    assert not list(tmp_path.glob(".*"))


def test_several_faults_are_reported_at_once(tmp_path):
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


def test_an_existing_file_may_have_a_backslash_in_its_name(tmp_path):
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
    # Without marks, videos come first.
    (question,) = load_questions(write(tmp_path / "q.jsonl", record | {"question": "Is it there?"}))
    assert [kind for kind, _, _ in question.media] == ["video", "image"]
