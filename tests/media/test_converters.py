"""Test reading the question files of ms-swift, LLaVA and Video-R1."""

import json

import pytest

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import load_questions

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
LETTERED = [SWIFT["messages"][1], {"role": "assistant", "content": "two"}]
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
    # The id depends on the position, so reordering the file changes the ids.
    assert question.meta == {"format": "ms-swift", "id_by_position": True} and question.system == "Be brief."
    (question,) = load(tmp_path, SWIFT | {"task_type": "numeric", "id": "q7"})
    assert (question.id, question.meta) == ("q7", {"format": "ms-swift"})


@pytest.mark.parametrize(
    ("answer", "task", "truth"),
    [
        # The letter may be read from a sign, because the question shows no options.
        ("B", "open", "B"),
        ("(B)", "open", "(B)"),
        ("3.5 to 10", "temporal", "3.5 to 10"),
        ("<answer>3.5 to 10</answer>", "temporal", "3.5 to 10"),
        ('{"time": [3.5, 10]}', "temporal", "3.5 to 10"),
        ("[10, 20, 30, 40]", "spatial", "10,20,30,40"),
        ("3", "numeric", "3"),
        ("00:03 to 00:05", "temporal", "3 to 5"),
        ("3.0 - 5.0", "temporal", "3.0 to 5.0"),
        # These may be a score, a range, or two years.
        ("3-5", "open", "3-5"),
        ("1,200", "numeric", "1200"),
        ("three", "open", "three"),
        ("3 cups", "open", "3 cups"),
        ("b", "open", "b"),
        ("I", "open", "I"),
        ("yes", "open", "yes"),
    ],
)
def test_a_missing_task_type_is_inferred_from_the_answer(tmp_path, answer, task, truth):
    record = SWIFT | {"messages": [SWIFT["messages"][1], {"role": "assistant", "content": answer}]}
    (question,) = load(tmp_path, record)
    assert (question.task_type, question.answer, question.meta["inferred"]) == (task, truth, True)
    # A task type that the record or the setting names takes precedence.
    (question,) = load(tmp_path, record | {"task_type": "open"})
    assert question.task_type == "open" and "inferred" not in question.meta
    (question,) = load(tmp_path, record, task_type="ocr")
    assert (question.task_type, question.answer) == ("ocr", truth if task == "open" else question.answer)


@pytest.mark.parametrize(("answer", "task"), [("3 to 2", "temporal"), ("30,20,10,5", "spatial")])
def test_answer_errors_mention_an_inferred_task_type(tmp_path, answer, task):
    """A score is not an interval."""
    with pytest.raises(
        DataError, match=rf"fix it; or set the record's task_type, which was inferred from the answer as {task}$"
    ):
        load(tmp_path, asked("What is the score?", answer))
    (question,) = load(tmp_path, asked("What is the score?", answer, task_type="ocr"))
    assert question.answer == answer
    with pytest.raises(DataError, match=r"fix it$"):
        load(tmp_path, asked("When?", answer, task_type=task))


def test_nested_null_values_count_as_absent(tmp_path):
    """Table formats give every record, turn and part the union of all keys."""
    empty = {"text": None, "video": None, "image": None, "fps": None}
    parts = [empty | {"type": "video", "video": "v.mp4"}, empty | {"type": "text", "text": "Which?"}]
    turns = [{"role": "system", "content": None}, {"role": "user", "content": parts}]
    record = {"messages": turns, "images": None, "system": None, "solution": "B"}
    record["options"] = {"A": "tea", "B": "milk", "C": None}
    (question,) = load(tmp_path, record)
    assert (question.question, question.options, question.answer) == ("Which?", ("tea", "milk"), "B")
    assert (
        question.system is None
        and len(question.videos) == 1
        and question.meta == {"format": "ms-swift", "id_by_position": True, "inferred": True}
    )


def test_options_make_it_multiple_choice(tmp_path):
    record = SWIFT | {"messages": SWIFT["messages"][1:], "options": ["two", "2", "6"]}
    with pytest.raises(DataError, match=r"got '2'; an index may count from 0 or from 1; write the letter"):
        load(tmp_path, record)
    record |= {"messages": SWIFT["messages"][1:2], "options": {"A": "5", "B": "2", "C": "6"}, "answer": "6"}
    (question,) = load(tmp_path, record)
    # "6" is not an index into three options, so it is the text of the last option.
    assert (question.task_type, question.answer) == ("mcq", "C")


def asked(question: str, answer: str, **fields) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": "l", "video": "v.mp4", "conversations": turns} | fields


LISTED = "What is poured?\nA. tea\nB. milk\nAnswer with the letter."


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A. tea is poured into it", "A"),
        ("B", "B"),
        ("(B) Milk.", "B"),
        ("B) The liquid is white.", "B"),
        ("milk", "B"),
        ("B. milk: white", "B"),
        ("A. tea\nIt is brown.", "A"),
        ("B) B is white.", "B"),
    ],
)
def test_a_list_of_options_in_the_question_makes_it_multiple_choice(tmp_path, answer, letter):
    """This is the form of LLaVA-Video-178K. Open questions accept any text."""
    (question,) = load(tmp_path, asked(LISTED, answer))
    assert (question.task_type, question.answer, question.options) == ("mcq", letter, ("tea", "milk"))
    assert question.question == "What is poured?\nAnswer with the letter." and question.meta["inferred"]
    # The result is the same if the record or the setting names the type.
    (question,) = load(tmp_path, asked(LISTED, answer), task_type="mcq")
    assert (question.answer, question.options) == (letter, ("tea", "milk"))


@pytest.mark.parametrize(
    "answer",
    [
        *("A. milk is poured", "B. it is not clear", "B. That is wrong", "C. something", "Milk is poured."),
        # These replies hold two answers: two texts, two letters, or two letters joined by a word.
        *("A. tea\nB. milk", "A. tea; milk", "A. or B.", "A) and B)", "A. B.", "A. Tea or milk", "A. (b)", "A: b)"),
        *("A. tea and water", "A. tea/coffee", "B. All of the above", "A. 茶或水", "B. milk, and so is A", "B. Ａ"),
        # These replies express doubt or denial, some of them after the text of the option.
        *(
            "B: unclear, maybe A",
            "A. tea, maybe",
            "A. Tea? Hard to say.",
            "A. tea is wrong",
            "A. Tea, which is not hot.",
        ),
    ],
)
def test_replies_without_a_clear_option_are_not_read_as_a_choice(tmp_path, answer):
    (question,) = load(tmp_path, asked(LISTED, answer))
    assert (question.task_type, question.answer, question.options) == ("open", answer, None)
    assert "A. tea" in question.question
    with pytest.raises(DataError, match=r"field 'conversations': expected one option letter such as 'B' among AB"):
        load(tmp_path, asked(LISTED, answer, task_type="mcq"))


def test_longer_options_and_letters_as_options(tmp_path):
    text = "Which car?\nA. red\nB. red truck\nC. blue"
    assert load(tmp_path, asked(text, "B. red truck on the left"))[0].answer == "B"
    # These replies have the letter of one option and the words of another.
    assert load(tmp_path, asked(text, "A. red truck on the left"))[0].task_type == "open"
    (question,) = load(tmp_path, asked("Which sign?", "B. A is on the sign", options=["C", "A", "B"]))
    assert question.answer == "B"
    with pytest.raises(DataError, match="field 'conversations': expected one option letter"):
        load(tmp_path, asked("Which sign?", "B. A is on the sign of C", options=["C", "A", "B"]))
    # The full text of an option is unambiguous, regardless of the words in it.
    options = ["salt and pepper", "not sugar", "Vitamin B", "a box or not a box?"]
    for letter, text in zip("ABCD", options, strict=True):
        assert load(tmp_path, asked("Which?", f"{letter}. {text}", options=options))[0].answer == letter
    assert load(tmp_path, asked("Which?", "C. Vitamin B is shown", options=options))[0].answer == "C"


@pytest.mark.parametrize("answer", ["A. tea\nC. water", "A. or B.", "A) and C)", "A. B. C.", "B: unclear, maybe C"])
def test_several_answers_are_refused_if_the_record_has_options(tmp_path, answer):
    with pytest.raises(DataError, match=r"field 'conversations': expected one option letter such as 'B' among ABC"):
        load(tmp_path, asked("Which?", answer, options=["tea", "milk", "water"]))


def test_a_dialogue_is_not_a_list_of_options(tmp_path):
    (question,) = load(tmp_path, asked("What do they do?\nA: Hello!\nB: Hi!", "They greet each other."))
    assert question.task_type == "open" and question.question.endswith("B: Hi!")
    two = "First\nA. tea\nB. milk\nThen\nA. cup\nB. jug"
    assert load(tmp_path, asked(two, "A. tea"))[0].options is None


@pytest.mark.parametrize(
    "question",
    ["Which? A. tea B. milk", "Which? (A) tea (B) milk", "Which is it: a) tea, b) milk?", "Which?\nA: tea; B: milk."],
)
def test_a_letter_means_an_option_only_if_options_are_shown(tmp_path, question):
    for settings in ({}, {"task_type": "mcq"}):
        (shown,) = load(tmp_path, asked(question, "B"), **settings)
        assert (shown.task_type, shown.answer, shown.options) == ("mcq", "B", None)
    for kind in ("math", "multiple choice"):
        record = VIDEO_R1 | {"problem": question, "problem_type": kind, "options": None}
        assert load(tmp_path, record)[0].task_type == "mcq"


@pytest.mark.parametrize(
    "question",
    [
        *("Which letter is on the sign?", "Is it before 9 a.m. or after?", "What is A?", "Is it A or B?"),
        *("Is it in the U.S.A. or B.C.?", "Which of f(a) and f(b) is larger?", "Which letter follows (A)? (B)?"),
    ],
)
def test_a_letter_without_options_is_not_a_choice(tmp_path, question):
    (read,) = load(tmp_path, asked(question, "B"))
    assert (read.task_type, read.answer) == ("open", "B")
    for record in (asked(question, "B", task_type="mcq"), VIDEO_R1 | {"problem": question, "options": []}):
        with pytest.raises(DataError, match=r"field 'options': expected the options of an mcq question, here or as"):
            load(tmp_path, record)


def test_content_parts_solution_query_and_other_keys(tmp_path):
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": "p.png"},
        {"type": "text", "text": " in "},
        {"type": "video", "video": "v.mp4", "video_start": 3, "video_end": 10},
    ]
    (question,) = load(tmp_path, {"messages": [{"role": "user", "content": parts}], "solution": "<answer>yes</answer>"})
    assert question.question == "Is <image> in <video>" and question.answer == "yes"
    assert [(kind, span) for kind, _, span in question.media] == [("image", None), ("video", (3.0, 10.0))]
    (question,) = load(tmp_path, {"query": "<video>How many?", "response": "3", "videos": ["v.mp4"], "source": "x"})
    assert (question.question, question.task_type, question.answer) == ("How many?", "numeric", "3")
    assert question.meta["source"] == {"source": "x"}


@pytest.mark.parametrize(
    ("kind", "answer", "task", "truth"),
    [
        ("temporal grounding", '<answer>{"time": [12.3, 25.7]}</answer>', "temporal", "12.3 to 25.7"),
        ("spatial grounding", '{"boxes": [1, 2, 30, 40]}', "spatial", "1,2,30,40"),
        ("boolean", "Yes", "mcq", "A"),
        ("boolean", "no", "mcq", "B"),
        ("math", "42", "numeric", "42"),
        ("open-ended", "a dog", "open", "a dog"),
        (None, "3", "numeric", "3"),
    ],
)
def test_easyr1_and_easyvideor1(tmp_path, kind, answer, task, truth):
    record = {"problem": "<video>What?", "answer": answer, "videos": ["v.mp4"], "problem_type": kind}
    (question,) = load(tmp_path, record)
    assert (question.question, question.task_type, question.answer) == ("What?", task, truth)
    assert question.options == (("Yes", "No") if kind == "boolean" else None)


@pytest.mark.parametrize(
    ("fields", "options", "answer"),
    [
        ({"problem_type": "boolean", "options": ["A. No", "B. Yes"], "solution": "<answer>A</answer>"}, None, "A"),
        ({"problem_type": "boolean", "options": ["A. No", "B. Yes"], "solution": "Yes"}, None, "B"),
        ({"problem_type": "binary classification", "options": ["Real", "Fake"], "solution": "B"}, None, "B"),
        ({"problem_type": "boolean", "options": [], "solution": "no."}, ("Yes", "No"), "B"),
        (
            {"problem_type": "boolean", "problem": "Red?\nA. No\nB. Yes", "options": None, "solution": "A"},
            ("No", "Yes"),
            "A",
        ),
    ],
)
def test_yes_no_questions_keep_their_options(tmp_path, fields, options, answer):
    (question,) = load(tmp_path, VIDEO_R1 | fields)
    assert (question.task_type, question.answer) == ("mcq", answer)
    assert question.options == (options or tuple(fields["options"]))


@pytest.mark.parametrize("solution", ["<answer>A</answer>", "Fake", "1", "true"])
def test_without_options_only_yes_and_no_are_recognized(tmp_path, solution):
    record = VIDEO_R1 | {"problem_type": "boolean", "options": None, "solution": solution}
    with pytest.raises(DataError, match=r"field 'solution': expected Yes or No, since there are no options.*give the"):
        load(tmp_path, record)


def test_free_form_questions_do_not_lose_options(tmp_path):
    record = VIDEO_R1 | {"problem_type": "free-form", "solution": "<answer>a dog</answer>"}
    with pytest.raises(DataError, match=r"field 'options': expected none, since only mcq questions have options"):
        load(tmp_path, record)
    assert load(tmp_path, record | {"options": []})[0].task_type == "open"


@pytest.mark.parametrize(
    "record",
    [
        VIDEO_R1 | {"videos": ["./clips/v.mp4"]},
        VIDEO_R1 | {"video": "./clips/v.mp4", "answer": "B"},
        LLAVA | {"videos": ["v.mp4"]},
        SWIFT | {"video": "v.mp4", "system": "Be brief.\n", "answer": "2", "solution": "<answer>2</answer>"},
        SWIFT | {"videos": [], "video": "v.mp4", "history": []},
    ],
)
def test_equal_duplicate_values_are_merged(tmp_path, record):
    (question,) = load(tmp_path, record)
    assert len(question.videos) == 1 and not question.images
    assert question.answer in ("B", "2", "A car passes.") and question.system in (None, "Be brief.", "Be brief.\n")


def test_one_image_may_be_named_twice(tmp_path):
    record = {"problem": "Which?", "answer": "3", "images": ["i.png"], "image_path": "i.png"}
    (question,) = load(tmp_path, record)
    assert question.images == (str(tmp_path.resolve() / "i.png"),)
    parts = [{"type": "image", "image": "i.png"}, {"type": "text", "text": "How many?"}]
    (question,) = load(tmp_path, {"messages": [{"role": "user", "content": parts}], "images": ["i.png"], "answer": "3"})
    assert len(question.images) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (VIDEO_R1 | {"videos": ["w.mp4"]}, r"field 'videos': expected the same as 'path' \(\['\./clips/v\.mp4'\]\)"),
        (VIDEO_R1 | {"images": ["i.png"], "image_path": "j.png"}, r"field 'image_path': expected the same as 'images'"),
        (VIDEO_R1 | {"answer": "A"}, r"field 'answer': expected the same as 'solution' \('B'\), got 'A'; keep one"),
        (SWIFT | {"video": "w.mp4"}, r"field 'video': expected the same as 'videos' \(\['v\.mp4'\]\), got 'w\.mp4'"),
        (LLAVA | {"images": ["i.png"], "image": "j.png"}, r"field 'image': expected the same as 'images'"),
        (SWIFT | {"answer": "2", "solution": "3"}, r"field 'solution': expected the same as 'answer' \('2'\), got '3'"),
        (
            SWIFT | {"solution": "3"},
            r"field 'messages': expected no answer in it, or the same as 'solution' \('3'\), got '2'",
        ),
        (LLAVA | {"answer": "A bus."}, r"field 'conversations': .* the same as 'answer' \('A bus\.'\), got"),
        (
            {"query": "<video>How many?", "response": "2", "solution": "3", "videos": ["v.mp4"]},
            r"field 'response': expected no answer in it, or the same as 'solution'",
        ),
        (SWIFT | {"system": "Be long."}, r"field 'messages': expected the same as 'system' \('Be long\.'\)"),
        (SWIFT | {"query": "How many?"}, r"field 'query': expected no value next to 'messages'"),
        (SWIFT | {"response": "2"}, r"field 'response': expected no value next to 'messages'"),
        (
            SWIFT | {"conversations": LLAVA["conversations"]},
            r"field 'conversations': expected no value next to 'messages'",
        ),
        (
            VIDEO_R1 | {"question": "Which two?"},
            r"field 'question': expected no value next to 'problem', got 'Which two\?'",
        ),
        (LLAVA | {"problem": "Which?"}, r"field 'problem': expected no value next to 'conversations', got 'Which\?'"),
        ({"query": "How many?", "videos": ["v.mp4"], "question": "Who?"}, r"field 'question': .* next to 'query'"),
        (
            VIDEO_R1 | {"problem_type": "numerical", "task_type": "open"},
            r"field 'task_type': expected the task type of its 'problem_type' 'numerical', numeric, got 'open'",
        ),
        (VIDEO_R1 | {"problem_type": "math", "task_type": "ocr"}, r"field 'task_type': .* mcq or numeric, got 'ocr'"),
        (VIDEO_R1 | {"problem_type": "boolean", "task_type": "open"}, r"field 'task_type': .*, mcq, got 'open'"),
        (SWIFT | {"history": [["a", "b"]]}, r"field 'history': expected one question and its answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}], "videos": ["w.mp4"]},
            r"field 'videos': expected no files, or those in the parts of 'messages', got \['w\.mp4'\]",
        ),
    ],
)
def test_two_keys_that_disagree_are_refused_by_name(tmp_path, record, message):
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*" + message):
        load(tmp_path, record)


@pytest.mark.parametrize(
    ("kind", "named", "solution", "task", "answer"),
    [
        ("numerical", "numeric", "3", "numeric", "3"),
        ("math", "numeric", "3", "numeric", "3"),
        ("boolean", "mcq", "no", "mcq", "B"),
        # An unknown problem type does not conflict with a named task type.
        ("riddle", "ocr", "EXIT", "ocr", "EXIT"),
        (None, "ocr", "EXIT", "ocr", "EXIT"),
    ],
)
def test_a_problem_type_and_a_task_type_that_agree(tmp_path, kind, named, solution, task, answer):
    record = VIDEO_R1 | {"problem_type": kind, "task_type": named, "solution": solution, "options": []}
    (question,) = load(tmp_path, record)
    assert (question.task_type, question.answer) == (task, answer)


def test_null_does_not_determine_the_format(tmp_path):
    record = {"messages": None, "query": None, "id": "q", "question": "Which?", "videos": ["v.mp4"]}
    (question,) = load(tmp_path, record | {"task_type": "ocr", "answer": "EXIT"})
    assert (question.id, question.task_type, question.answer) == ("q", "ocr", "EXIT")


def test_other_ids_and_keys_are_kept(tmp_path):
    (question,) = load(tmp_path, VIDEO_R1 | {"id": "other"})
    assert question.id == "12" and question.meta["source"]["id"] == "other"


def test_the_image_beside_a_video_is_shown(tmp_path):
    (question,) = load(tmp_path, VIDEO_R1 | {"image_path": "q.png"})
    assert [kind for kind, _, _ in question.media] == ["video", "image"]
    (question,) = load(tmp_path, VIDEO_R1 | {"path": ["v.mp4", "w.mp4"], "options": [], "problem_type": "ocr"})
    assert len(question.videos) == 2


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


def test_one_image_mark_of_llava_stands_for_its_one_video(tmp_path):
    def marked(text, **fields):
        turns = [{"from": "human", "value": text}, LLAVA["conversations"][1]]
        return load(tmp_path, LLAVA | {"conversations": turns} | fields)[0].question

    assert marked("<image>\nWhat happens?") == "What happens?"
    assert marked("What happens in <image>?") == "What happens in <video>?"
    for text, fields in (
        ("<image>\n<image>\nWhich?", {"video": ["v.mp4", "w.mp4"]}),
        ("<image_1>\nWhich?", {}),
        ("<video>\nWhich?", {"image": "i.png", "video": None}),
    ):
        with pytest.raises(DataError, match=r"field 'conversations': expected one mark for each of"):
            marked(text, **fields)
    turns = [{"role": "user", "content": "<image>How many?"}]
    with pytest.raises(DataError, match=r"expected one mark for each of 1 video and 0 images, got 0 <video> and 1"):
        load(tmp_path, SWIFT | {"messages": turns, "solution": "2"})


@pytest.mark.parametrize(
    ("solution", "reply", "fields"),
    [
        ("2", "<think>two</think><answer>2</answer>", {}),
        (2, "2", {}),
        ("<answer>3 to 5</answer>", "00:03 - 00:05", {}),
        ("B", "B. Milk is poured.", {"options": ["tea", "milk"]}),
        ("milk", "B", {"options": {"A": "tea", "B": "milk"}}),
        ("A man.", "a man", {}),
        ("2", "", {}),
    ],
)
def test_an_assistant_turn_that_gives_the_solution_again(tmp_path, solution, reply, fields):
    turns = [SWIFT["messages"][1], {"role": "assistant", "content": reply}]
    (question,) = load(tmp_path, SWIFT | {"messages": turns, "solution": solution} | fields)
    (alone,) = load(tmp_path, SWIFT | {"messages": turns[:1], "solution": solution} | fields)
    assert question == alone


def test_video_r1(tmp_path):
    (question,) = load(tmp_path, VIDEO_R1)
    assert (question.id, question.task_type, question.answer) == ("12", "mcq", "B")
    assert question.options == ("A. cat", "B. dog")
    assert question.videos == (str(tmp_path.resolve() / "clips" / "v.mp4"),)
    assert question.meta["source"] == {"problem_type": "multiple choice", "data_source": "some set"}


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


@pytest.mark.parametrize("answer", ["[0, 0, 1920, 1080]", "0.1,0.2,0.5,0.6"])
def test_boxes_in_other_units_are_refused(tmp_path, answer):
    record = SWIFT | {"messages": [SWIFT["messages"][1], {"role": "assistant", "content": answer}]}
    with pytest.raises(DataError, match=r"field 'messages': expected 'x1,y1,x2,y2'.*1000"):
        load(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SWIFT | {"messages": "hi"}, r"field 'messages': expected a list of turns"),
        (SWIFT | {"messages": [{"role": "user"}]}, r"field 'messages\[0\]'"),
        (SWIFT | {"messages": [{"role": "tool", "content": "x"}]}, r"field 'messages\[0\]\.role'.*got 'tool'"),
        (SWIFT | {"messages": SWIFT["messages"][1:] * 2}, r"expected one user turn.*got 2 user and 2 assistant turns"),
        (
            SWIFT | {"messages": [SWIFT["messages"][1], {"role": "assistant", "content": "two"}], "task_type": "mcq"},
            r"field 'options': expected the options of an mcq question",
        ),
        (
            SWIFT | {"messages": LETTERED, "task_type": "mcq", "options": ["tea", "milk"]},
            r"field 'messages': expected one option letter",
        ),
        (SWIFT | {"videos": []}, r"at least one path under 'videos' or 'images'"),
        (SWIFT | {"audios": ["a.wav"]}, r"field 'audios': expected only videos and images"),
        (SWIFT | {"videos": [["1.jpg", "2.jpg"]]}, r"field 'videos': expected paths of files, got 'a list of frames'"),
        (SWIFT | {"videos": ["v.mp4", "w.mp4"]}, r"expected one mark for each of 2 videos and 0 images, got 1"),
        (SWIFT | {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"content\[0\]': expected a part"),
        (
            SWIFT | {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4", "fps": 2}]}]},
            r"content\[0\]\.fps'.*set frames and pixels for the whole run",
        ),
        (SWIFT | {"messages": [{"role": "user", "content": "<video>Where? <bbox>"}]}, r"boxes as numbers"),
        ({"query": "<video>Q", "history": [["a", "b"]], "videos": ["v.mp4"]}, r"field 'history'"),
        (VIDEO_R1 | {"problem_type": "tracking"}, r"field 'problem_type': expected one of.*got 'tracking'"),
        (
            VIDEO_R1 | {"problem_type": "math", "options": [], "solution": "$4$"},
            r"field 'solution': expected a number.*'\$4\$'",
        ),
        (
            VIDEO_R1 | {"problem_type": "OCR", "options": [], "solution": "<answer></answer>"},
            r"field 'solution'.*got nothing",
        ),
        (LLAVA | {"video": "../v.mp4"}, r"field 'video': expected a path inside the media root"),
        (VIDEO_R1 | {"problem_type": "riddle"}, r"field 'problem_type': expected one of multiple choice"),
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


def test_a_named_format_overrides_detection(tmp_path):
    with pytest.raises(DataError, match=r"format video-r1 \(data\.format=video-r1\), got one"):
        load(tmp_path, SWIFT, format="video-r1")
    with pytest.raises(DataError, match=r"field 'problem'"):
        load(tmp_path, {"path": "v.mp4"}, format="video-r1")


def test_two_formats_in_one_file_are_refused(tmp_path):
    own = {"id": "q", "question": "Which?", "videos": ["v.mp4"], "task_type": "ocr", "answer": "EXIT"}
    for first, second, read, looks in (
        (LLAVA, SWIFT, "llava", "ms-swift"),
        (own, LLAVA, "rmsd", "llava"),
        (SWIFT, own, "ms-swift", "rmsd"),
    ):
        message = rf"data\.jsonl:2: expected a record of the format {read} \(the format of the "
        with pytest.raises(DataError, match=message + rf"first record\), got one that looks like {looks}; use a"):
            load(tmp_path, first, second)


def test_a_question_that_is_null_is_missing(tmp_path):
    record = {"id": "q", "question": None, "videos": ["v.mp4"], "task_type": "ocr", "answer": "EXIT"}
    for records in ([record], [record | {"question": "Which?"}, record | {"messages": None, "id": "r"}]):
        with pytest.raises(
            DataError, match=rf"data\.jsonl:{len(records)}: field 'question': expected .*, got nothing;"
        ):
            load(tmp_path, *records)
    with pytest.raises(DataError, match=r"field 'problem': expected the question, got nothing"):
        load(tmp_path, VIDEO_R1 | {"problem": None})


def test_a_record_of_verl_is_named(tmp_path):
    """The list of turns in the record is not a list of records."""
    record = {"prompt": [{"role": "user", "content": "<video>How many?"}]}
    more = {"data_source": "x", "reward_model": {"ground_truth": "3"}, "videos": ["v.mp4"]}
    for fields in ({}, more):
        message = r"data\.jsonl:1: expected a supported format, got the keys 'prompt'.*, as verl writes them"
        with pytest.raises(DataError, match=message + "; rename 'prompt' to 'messages'"):
            load(tmp_path, record | fields)
    (question,) = load(tmp_path, {"messages": record["prompt"], "solution": "3", "videos": ["v.mp4"]})
    assert (question.task_type, question.answer) == ("numeric", "3")


def test_evaluation_records_keep_their_breakdowns(tmp_path):
    # EasyVideoR1's file of VideoMME has the original's fields next to its own.
    record = VIDEO_R1 | {"question": "Which one?", "answer": "B", "duration": "short", "domain": "Knowledge"}
    record |= {"task_type": "Counting Problem", "sub_category": "Law", "url": "https://example.com"}
    (question,) = load(tmp_path, record)
    assert (question.task_type, question.answer, question.duration) == ("mcq", "B", None)
    assert question.meta["groups"] == {
        "duration_group": "short",
        "domain": "Knowledge",
        "sub_category": "Law",
        "original_task_type": "Counting Problem",
    }
    with pytest.raises(DataError, match="field 'question': expected no value next to 'problem'"):
        load(tmp_path, record | {"question": "Another one?"})
    assert "groups" not in load(tmp_path, VIDEO_R1)[0].meta


def test_copies_of_the_original_that_say_the_same(tmp_path):
    # EasyVideoR1's file of MVBench has the option's text as the answer, and the video in its first container.
    record = VIDEO_R1 | {"question": "Which one?", "answer": "Dog", "video": "v.webm"}
    (question,) = load(tmp_path, record)
    assert question.answer == "B" and question.videos == (str(tmp_path.resolve() / "clips" / "v.mp4"),)
    with pytest.raises(DataError, match="field 'answer': expected the same as 'solution'"):
        load(tmp_path, record | {"answer": "cat"})
    with pytest.raises(DataError, match="field 'videos?': expected the same as"):
        load(tmp_path, record | {"video": "w.webm"})
    with pytest.raises(DataError, match="field 'duration': expected a number of seconds"):
        load(tmp_path, record | {"duration": "12 s"})


def test_an_interval_next_to_empty_boxes(tmp_path):
    record = VIDEO_R1 | {"problem_type": "temporal grounding", "options": []}
    (question,) = load(tmp_path, record | {"solution": '<answer>{"time": [3.5, 10], "boxes": {}}</answer>'})
    assert (question.task_type, question.answer) == ("temporal", "3.5 to 10")
    with pytest.raises(DataError, match="field 'solution': expected '<start> to <end>' in seconds"):
        load(tmp_path, record | {"solution": '<answer>{"time": [3.5, 10], "boxes": {"4": [1, 2, 3, 4]}}</answer>'})


def test_an_image_mark_next_to_a_video_without_one(tmp_path):
    (question,) = load(tmp_path, VIDEO_R1 | {"problem": "What is <image 1>?", "image_path": "i.png"})
    assert question.question == "<video>What is <image>?"
    assert [kind for kind, _, _ in question.media] == ["video", "image"]
    (question,) = load(tmp_path, VIDEO_R1 | {"problem": "<image 1> Which?", "image_path": "i.png"})
    assert question.question == "Which?"
    with pytest.raises(DataError, match="expected one mark for each of 1 video and 1 image, got 0 <video> and 2"):
        load(tmp_path, VIDEO_R1 | {"problem": "<image 1> or <image 2>?", "image_path": "i.png"})


def test_a_letter_in_answer_tags_is_a_letter(tmp_path):
    options = ["A. C", "B. A", "C. B"]
    (question,) = load(tmp_path, VIDEO_R1 | {"options": options, "solution": "<answer>C</answer>"})
    assert question.answer == "C"
    with pytest.raises(DataError, match="it may mean A or C"):
        load(tmp_path, VIDEO_R1 | {"options": options, "solution": "C"})


def test_held_out_questions_may_have_equal_options_or_one(tmp_path):
    equal = VIDEO_R1 | {"options": ["A. cat", "B. dog", "C. cat"]}
    one = VIDEO_R1 | {"options": ["A. cat"], "solution": "<answer>A</answer>", "problem_id": 13}
    first, second = load(tmp_path, equal, one, held_out=True)
    assert (first.answer, second.answer, second.options) == ("B", "A", ("A. cat",))
    for record, says in ((equal, "expected different options, got 'cat' twice"), (one, "expected 2 to 26 options")):
        with pytest.raises(DataError, match=says):
            load(tmp_path, record)


@pytest.mark.parametrize(
    ("kind", "solution", "task", "answer"),
    [("REC", "3", "numeric", "3"), ("SSR", "No", "mcq", "B"), ("CRR", "Yes", "mcq", "A")],
)
def test_problem_types_of_ovo_bench(tmp_path, kind, solution, task, answer):
    record = VIDEO_R1 | {"problem_type": kind, "options": [], "solution": f"<answer>{solution}</answer>"}
    (question,) = load(tmp_path, record)
    assert (question.task_type, question.answer) == (task, answer)


def test_tasks_of_benchmarks_are_refused_in_question_files(tmp_path):
    record = {"id": "a", "question": "Where?", "videos": ["v.mp4"], "answer": "{}", "task_type": "boxes"}
    with pytest.raises(
        DataError, match="field 'task_type': .* got 'boxes'; only the readers of evaluate.benchmark make"
    ):
        load(tmp_path, record)


ASKED = {"messages": [{"role": "user", "content": "<image>\nHow many cups?"}], "images": ["a.png"], "solution": "2"}


def test_what_other_projects_tell_a_teacher_becomes_hints(tmp_path):
    prompt = "<image>\nHow many cups?\n\nReference solution:\nOne and one.\n\nNow think on your own."
    added = "Reference solution:\nOne and one.\n\nNow think on your own."
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": prompt}]}]
    for teacher_prompt in (prompt, turns, [*turns, {"role": "assistant", "content": None}]):
        (question,) = load(tmp_path, ASKED | {"teacher_prompt": teacher_prompt})
        assert question.hints == {"context": added} and question.question == "How many cups?"
        assert "source" not in question.meta
    (question,) = load(tmp_path, ASKED | {"teacher_prompt": "Look twice. How many cups?"})
    assert question.hints == {"context": "Look twice."}
    (question,) = load(tmp_path, ASKED | {"teacher_prompt": "How many cups?", "teacher_images": None})
    assert question.hints == {}
    # Other pictures, of any number.
    (question,) = load(tmp_path, ASKED | {"teacher_images": ["b.png", {"path": "c.png"}]})
    shown = [str(tmp_path.resolve() / name) for name in ("b.png", "c.png")]
    assert question.hints == {"media": {"videos": [], "images": shown, "spans": []}}
    # TRL's field, and its own one next to ours.
    (question,) = load(tmp_path, ASKED | {"privileged_context": "Two.", "hints": {"answer": "2 cups"}})
    assert question.hints == {"answer": "2 cups", "context": "Two."}


def test_key_frames_and_items_of_stgr_become_hints(tmp_path):
    frames = [{"idx": 7, "time": 3.5, "path": "7.jpg"}, {"idx": 2, "time": 1, "path": "2.jpg"}]
    items = {"2": {"red cup": [[0.1, 0.2, 0.3, 0.4]]}, "7": {"red cup": [[0, 0, 1, 1]], "a hand ": []}}
    (question,) = load(tmp_path, LLAVA | {"key_frames": frames, "key_items": items})
    assert question.hints == {"keyframes": [1, 3.5], "cue": "red cup, a hand"}
    (question,) = load(tmp_path, LLAVA | {"key_frames": [], "key_items": {}})
    assert question.hints == {} and "source" not in question.meta
    # Another meaning of the same names.
    (question,) = load(tmp_path, LLAVA | {"key_frames": [3, 5]})
    assert question.hints == {} and question.meta["source"] == {"key_frames": [3, 5]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_prompt": "Two."}, "'teacher_prompt': expected a text that contains the user's turn, got 'Two.'"),
        ({"teacher_prompt": [{"role": "system", "content": "x"}]}, "'teacher_prompt': expected a text, or turns"),
        (
            {"teacher_prompt": "How many cups? Two.", "privileged_context": "2"},
            "'privileged_context': expected no other hint 'context', got 'Two.'",
        ),
        ({"privileged_context": ["2"]}, r"'hints.context': expected non-empty plain text"),
        ({"teacher_images": []}, "'hints.media': expected at least one path"),
        ({"teacher_images": ["../b.png"]}, "'teacher_images': expected a path inside the media root"),
        ({"teacher_images": ["b.png"], "videos": ["v.mp4"]}, "'teacher_images': expected none in a record with videos"),
        ({"key_frames": [{"time": 9}], "images": []}, "'key_frames': expected a video"),
    ],
)
def test_fields_for_teachers_that_cannot_be_read_are_refused(tmp_path, changes, says):
    record = ASKED | changes
    if "videos" in changes or record["images"] == []:
        record["messages"] = [{"role": "user", "content": "How many cups?"}]
    if record["images"] == []:
        record |= {"images": ["a.png"]}
    with pytest.raises(DataError, match=says):
        load(tmp_path, record)
