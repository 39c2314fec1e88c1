"""Question files of ms-swift, LLaVA and Video-R1."""

import json

import pytest

from rmsd_fast.data.records import DataError, load_questions

SWIFT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>\nHow many cars?"},
        {"role": "assistant", "content": "<think>two</think><answer>2</answer>"},
    ],
    "videos": ["v.mp4"],
}
LLAVA = {
    "id": "l7",
    "video": "v.mp4",
    "conversations": [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "A car passes."},
    ],
}
VIDEO_R1 = {
    "problem_id": 12,
    "problem": "Which one?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. cat", "B. dog"],
    "solution": "<answer>B</answer>",
    "path": "./clips/v.mp4",
    "data_source": "some set",
}


def load(tmp_path, *records, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_questions(path, **settings)


def test_ms_swift(tmp_path):
    (question,) = load(tmp_path, SWIFT | {"task_type": "numeric"})
    assert (question.id, question.question, question.task_type) == ("data-0", "How many cars?", "numeric")
    assert question.answer == "2" and question.videos == (str(tmp_path.resolve() / "v.mp4"),)
    assert question.meta == {"format": "ms-swift", "system": "Be brief."}


def test_without_a_task_type_nothing_is_graded(tmp_path):
    letter = {"role": "assistant", "content": "B"}
    (question,) = load(tmp_path, SWIFT | {"messages": [SWIFT["messages"][1], letter]})
    assert question.task_type == "open" and question.answer == "B"


def test_ms_swift_images_options_and_a_key_for_the_answer(tmp_path):
    record = {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["i.png"], "id": "x"}
    record |= {"task_type": "mcq", "options": ["a", "b"], "answer": "A"}
    (question,) = load(tmp_path, record)
    assert question.images == (str(tmp_path.resolve() / "i.png"),) and question.videos == ()
    assert (question.question, question.options, question.answer) == ("Which?", ("a", "b"), "A")


def test_llava(tmp_path):
    (question,) = load(tmp_path, LLAVA)
    assert (question.id, question.question, question.answer) == ("l7", "What happens?", "A car passes.")
    assert question.task_type == "open" and question.videos == (str(tmp_path.resolve() / "v.mp4"),)


def test_video_r1(tmp_path):
    (question,) = load(tmp_path, VIDEO_R1)
    assert (question.id, question.task_type, question.answer) == ("12", "mcq", "B")
    assert question.options == ("A. cat", "B. dog")
    assert question.videos == (str(tmp_path.resolve() / "clips" / "v.mp4"),)
    assert question.meta["problem_type"] == "multiple choice" and question.meta["data_source"] == "some set"


@pytest.mark.parametrize(
    ("kind", "solution", "task", "answer"),
    [
        ("numerical", "<answer>3.5</answer>", "numeric", "3.5"),
        ("regression", 12, "numeric", "12"),
        ("OCR", "<answer> EXIT 4 </answer>", "ocr", "EXIT 4"),
        ("free-form", "<answer>a dog</answer>", "open", "a dog"),
    ],
)
def test_video_r1_types(tmp_path, kind, solution, task, answer):
    record = VIDEO_R1 | {"problem_type": kind, "solution": solution, "data_type": "image", "options": []}
    (question,) = load(tmp_path, record)
    assert (question.task_type, question.answer) == (task, answer)
    assert question.images and not question.videos


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SWIFT | {"messages": "hi"}, r"field 'messages': expected a list of turns"),
        (SWIFT | {"messages": [{"role": "user"}]}, r"field 'messages\[0\]'"),
        (SWIFT | {"messages": [{"role": "tool", "content": "x"}]}, r"field 'messages\[0\]\.role'.*got 'tool'"),
        (SWIFT | {"messages": SWIFT["messages"][1:] * 2}, r"expected one user turn.*got 2 user and 2 assistant turns"),
        (
            SWIFT | {"messages": SWIFT["messages"][1:], "task_type": "mcq"},
            r"field 'messages': expected one option letter",
        ),
        (SWIFT | {"videos": []}, r"either 'videos' or 'images'"),
        (LLAVA | {"video": "../v.mp4"}, r"field 'video': expected a path inside the media root"),
        (VIDEO_R1 | {"problem_type": "riddle"}, r"field 'problem_type': expected one of multiple choice"),
        (VIDEO_R1 | {"problem_type": None}, r"field 'problem_type'"),
        (VIDEO_R1 | {"data_type": "audio"}, r"field 'data_type': expected 'video' or 'image', got 'audio'"),
        (VIDEO_R1 | {"solution": "<answer>C</answer>"}, r"field 'solution': expected one option letter.*among AB"),
        (VIDEO_R1 | {"solution": None}, r"field 'solution': .*got nothing"),
        (VIDEO_R1 | {"solution": ["B"]}, r"field 'solution'"),
        (VIDEO_R1 | {"path": None}, r"field 'path': expected paths"),
        (VIDEO_R1 | {"problem": 3}, r"field 'problem'"),
        ({"text": "x"}, r"expected a key 'question' \(our format\).*got the keys 'text'"),
    ],
)
def test_errors_name_the_fields_of_the_source(tmp_path, record, message):
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*" + message):
        load(tmp_path, record)


def test_a_named_format_is_not_guessed(tmp_path):
    with pytest.raises(DataError, match=r"field 'problem'"):
        load(tmp_path, SWIFT, format="video-r1")


def test_two_formats_in_one_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:2: field 'conversations'"):
        load(tmp_path, LLAVA, SWIFT)
