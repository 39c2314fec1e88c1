"""Test the pool file: schema, appending, truncated lines, keys, and the check against questions."""

import json
from dataclasses import replace

import pytest

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.pool import (
    TeacherResponse,
    check_pool,
    load_pool,
    media_digest,
    request_key,
    write_pool,
)

LINE = {"id": "q1", "k": 0, "key": "", "text": "<think>a</think><answer>B</answer>"}


@pytest.fixture
def question(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"frames")
    return Question("q1", "Which?", "mcq", videos=(str(tmp_path / "v.mp4"),), options=("a", "b"), answer="B")


def key_of(question, **changes):
    settings = {"sampling": {"temperature": 1.0}, "frame_indices": [0, 4], "media_digest": media_digest(question)}
    return request_key(question, **settings | changes)


def test_write_load(tmp_path):
    first = TeacherResponse("q1", 1, "", "b \ud800", finish_reason="length", usage={"completion_tokens": 4}, model="m")
    second = TeacherResponse("q1", 0, "", "a\u2028\nx", valid=True, quality=0.5, sampling={"top_p": 0.9})
    write_pool(tmp_path / "pool.jsonl", [first, second, TeacherResponse("q2", 0, "", "")])
    pool = load_pool(tmp_path / "pool.jsonl")
    assert pool == {"q1": [second, first], "q2": [TeacherResponse("q2", 0, "", "")]}


def test_a_line_needs_no_more_than_id_k_and_text(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "q1", "k": 0, "text": "x"}) + "\n")
    (response,) = load_pool(tmp_path / "p.jsonl")["q1"]
    # The finish reason is unknown, so the response may be truncated.
    assert response == TeacherResponse("q1", 0, "", "x") and response.finish_reason is None
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "q1", "k": 0}) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1: field 'text'.*needs id, k, text"):
        load_pool(tmp_path / "p.jsonl")


def test_integral_floats_of_tables_are_integers(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": 12.0, "k": 0.0, "text": "x"}) + "\n")
    assert load_pool(tmp_path / "p.jsonl") == {"12": [TeacherResponse("12", 0, "", "x")]}


def test_null_values_of_servers_become_defaults(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE | {"finish_reason": None, "usage": None, "quality": None}) + "\n")
    assert load_pool(tmp_path / "p.jsonl")["q1"][0] == TeacherResponse(**LINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": [3]}, "field 'id': expected non-empty text"),
        ({"k": -1}, "field 'k': expected an integer from 0, got -1"),
        ({"k": True}, "field 'k'"),
        ({"k": 1.5}, "field 'k'"),
        ({"finish_reason": {"type": 3}}, "field 'finish_reason': expected text such as 'stop', or an object with it"),
        ({"finish_reason": {"reason": "stop"}}, "field 'finish_reason': expected text such as 'stop'"),
        ({"key": 3}, "field 'key': expected text"),
        ({"usage": []}, "field 'usage': expected a JSON object"),
        ({"valid": "yes"}, "field 'valid': expected true or false"),
        ({"quality": 1.5}, r"field 'quality': expected a number in \[0, 1\], got 1.5"),
        ({"quality": float("nan")}, "field 'quality'"),
        ({"answer": "B"}, "field 'answer': expected one of the fields"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE | {"k": 5}) + "\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:2: " + message):
        load_pool(tmp_path / "p.jsonl")


def test_a_question_file_is_not_a_pool(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "q1"}) + "\n")
    with pytest.raises(DataError, match="field 'k': expected a value, got nothing; a pool line needs id, k, text$"):
        load_pool(tmp_path / "p.jsonl")
    question = {"id": "q1", "videos": ["a.mp4"], "question": "Which?", "task_type": "ocr", "answer": "EXIT"}
    for record in (question, {"id": 1, "conversations": []}, {"problem": "?", "answer": "B"}):
        (tmp_path / "p.jsonl").write_text((json.dumps(record) + "\n") * 3)
        with pytest.raises(DataError) as caught:
            load_pool(tmp_path / "p.jsonl")
        # The error is reported once, not for every line, and without the advice to remove lines that questions need.
        assert "p.jsonl:1: expected a teacher answer with id, k, text, got the keys" in str(caught.value)
        assert "if this is the question file, swap the two files" in str(caught.value)
        assert "\n" not in str(caught.value) and "remove" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (LINE | {"reasoning_content": "x"}, r"'reasoning_content': .*; put it into 'text', as <think>…</think> before"),
        (LINE | {"thinking": "x"}, r"field 'thinking': .*; put it into 'text'"),
        ({"id": "q", "k": 0, "response": "B"}, r"field 'response': .*; rename it to 'text'"),
        ({"id": "q", "k": 0, "content": None}, r"field 'content': .*; rename it to 'text'"),
        ({"id": "q", "k": 0, "answer": "B"}, r"field 'answer': .*; rename it to 'text'"),
        ({"question_id": "q", "k": 0, "text": "B"}, r"field 'question_id': .*; rename it to 'id'"),
        ({"id": "q", "index": 0, "text": "B"}, r"field 'index': .*; rename it to 'k'"),
        # The question is stored with its answers.
        ({"id": "q", "k": 0, "response": "B", "question": "Which?"}, r"field 'response': .*; rename it to 'text'"),
        (LINE | {"answer": "B"}, r"field 'answer': .*; remove it"),
        (LINE | {"question": "Which?"}, r"field 'question': .*; remove it"),
    ],
)
def test_errors_for_fields_of_other_programs_name_the_right_field(tmp_path, line, advice):
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1: .*" + advice):
        load_pool(tmp_path / "p.jsonl")


def test_a_null_text_is_an_empty_answer(tmp_path):
    """OpenAI's API returns a filtered response in this format."""
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE | {"text": None, "finish_reason": "content_filter"}) + "\n")
    (response,) = load_pool(tmp_path / "p.jsonl")["q1"]
    assert (response.text, response.finish_reason) == ("", "content_filter")


def test_the_finish_reason_may_be_an_object(tmp_path):
    """SGLang's native API uses this format."""
    endings = [{"type": "length", "length": 5}, {"type": "stop", "matched": 151645}]
    lines = [json.dumps(LINE | {"k": k, "finish_reason": ending}) + "\n" for k, ending in enumerate(endings)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    assert [response.finish_reason for response in load_pool(tmp_path / "p.jsonl")["q1"]] == ["length", "stop"]


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    line = json.dumps(LINE).replace('"text"', '"text": "<think>a</think><answer>A</answer>", "text"')
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:2: field 'text': expected each key once, got '<think>a</think><ans"):
        load_pool(tmp_path / "p.jsonl")


def test_errors_for_duplicate_responses_name_both_lines(tmp_path):
    (tmp_path / "p.jsonl").write_text((json.dumps(LINE) + "\n") * 2)
    with pytest.raises(DataError, match=r"p\.jsonl:2: field 'k'.*p\.jsonl:1"):
        load_pool(tmp_path / "p.jsonl")


def test_truncated_last_line(tmp_path):
    whole, torn = json.dumps(LINE), json.dumps(LINE | {"k": 1, "text": "é"}, ensure_ascii=False).encode()
    path = tmp_path / "p.jsonl"
    # The file is cut between the two bytes of "é", so the tail is not valid UTF-8.
    path.write_bytes(whole.encode() + b"\n" + torn[: torn.index("é".encode()) + 1])
    with pytest.raises(DataError, match=r"p\.jsonl:2: .*interrupted"):
        load_pool(path)
    # A damaged line in the middle, or a damaged line with a line end, is not a truncated tail.
    for text in (whole[:-5] + "\n" + whole, whole + "\n" + whole[:-5] + "\n"):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            load_pool(path)
        assert "interrupted" not in str(caught.value)


def test_empty_and_missing(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match="at least one teacher response"):
        load_pool(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_pool(tmp_path / "none.jsonl")


def test_key_depends_on_everything_that_determines_the_request(question, tmp_path):
    key = key_of(question)
    assert key == key_of(replace(question, answer="A", meta={"x": 1}, duration=3.0, id="other"))
    (tmp_path / "moved.mp4").write_bytes(b"frames")
    assert key == key_of(replace(question, videos=(str(tmp_path / "moved.mp4"),)))
    changed = [
        key_of(replace(question, question="Which ?")),
        key_of(replace(question, options=("b", "a"))),
        key_of(replace(question, task_type="open")),
        key_of(question, sampling={"temperature": 0.9}),
        key_of(question, frame_indices=[0, 5]),
        key_of(question, frame_indices=None),
    ]
    (tmp_path / "v.mp4").write_bytes(b"other frames")
    changed.append(key_of(question))
    assert len({key, *changed}) == 8


def test_media_digest_needs_the_file(question):
    with pytest.raises(DataError, match=r"question 'q1': .*gone\.mp4 cannot be read"):
        media_digest(replace(question, videos=("/gone.mp4",)))


def test_check_pool(question, tmp_path, caplog):
    def pool(key):
        return {"q1": [TeacherResponse("q1", 0, key, "")], "extra": [TeacherResponse("extra", 0, "", "")]}

    check_pool(pool(key_of(question)), [question], check_media=True)
    assert not caplog.records
    with caplog.at_level("INFO"):
        check_pool(pool(""), [question])
    assert "responses to 1 question have no key" in caplog.text
    with pytest.raises(
        DataError, match=r"got them for 1 of 2 \(missing: 'q2'; the pool has 'q1', 'extra'\).*teacher\.pool"
    ):
        check_pool(pool(""), [question, replace(question, id="q2")])
    # A pool without any of the questions belongs to other questions, regardless of the share that may be missing.
    with pytest.raises(DataError, match=r"got them for 0 of 1 \(missing: 'q2'"):
        check_pool(pool(""), [replace(question, id="q2")], max_unanswered_share=1.0)
    with pytest.raises(DataError, match=r"questions as they are now, got others for 1 question \(ids: 'q1'\).*collect"):
        check_pool(pool(key_of(question)), [replace(question, question="Where?")])
    with pytest.raises(DataError, match=r"keys made by request_key"):
        check_pool(pool("my-key"), [question])
    key = key_of(question)
    (tmp_path / "v.mp4").write_bytes(b"other frames")
    check_pool(pool(key), [question])
    with pytest.raises(DataError, match=r"media as they are now"):
        check_pool(pool(key), [question], check_media=True)
