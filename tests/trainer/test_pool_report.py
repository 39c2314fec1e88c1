"""Test `python -m rmsd_fast.report POOL QUESTIONS`: page, JSON, unusual pools, damaged and swapped files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_files import EVIL, Page, assert_nothing_is_fetched, read
from train_runs import environment
from warm_process import run_program

from rmsd_fast.data.records import Question, write_questions
from rmsd_fast.report import main, write_pool_report
from rmsd_fast.report_page.pool_sections import best_of_section, tau_section
from rmsd_fast.teacher.pool import TeacherResponse, write_pool

TRUTHS = {"mcq": "B", "temporal": "0 to 10", "spatial": "0,0,100,100", "numeric": "3", "ocr": "EXIT now"}
NEAR = {"mcq": "A", "temporal": "0 to 6", "spatial": "0,0,100,40", "numeric": "4", "ocr": "EXIT cow"}
MODELS = ("big", "small")


def asked(count: int = 30, **fields) -> list[Question]:
    tasks = [*TRUTHS, "open"]
    return [
        replace(
            Question(f"q{i}", "?", tasks[i % 6], videos=("/v.mp4",), answer=TRUTHS.get(tasks[i % 6])),
            options=("x", "y", "z") if tasks[i % 6] == "mcq" else None,
            **fields,
        )
        for i in range(count)
    ]


def answered(questions: list[Question], k: int = 4, **fields) -> list[TeacherResponse]:
    """Return answers of which the first is invalid for every seventh question, and about half are right."""
    responses = []
    for i, question in enumerate(questions):
        for j in range(k):
            answer = (TRUTHS if (i + j) % 2 else NEAR).get(question.task_type, "A cat.")
            text = f"<think>I look {'very ' * j}closely.</think><answer>{answer}</answer>"
            values = {"finish_reason": "stop", "model": MODELS[j % 2], "usage": {"prompt_tokens": 100 + j}} | fields
            responses.append(TeacherResponse(question.id, j, "", "?" if i % 7 == 0 and j == 0 else text, **values))
    return responses


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    questions = asked()
    write_questions(tmp_path / "questions.jsonl", questions, media_root=Path("/"))
    write_pool(tmp_path / "pool.jsonl", answered(questions))
    return tmp_path / "pool.jsonl", tmp_path / "questions.jsonl"


def report(folder: Path, questions: list[Question], responses: list[TeacherResponse], *overrides: str):
    """Return the text and the parsed page of a report, and its JSON."""
    write_questions(folder / "questions.jsonl", questions, media_root=Path("/"))
    write_pool(folder / "pool.jsonl", responses)
    overrides = ("data.media_root=/", *overrides)
    path = write_pool_report(folder / "pool.jsonl", folder / "questions.jsonl", overrides=overrides)
    text, page = read(path)
    assert_nothing_is_fetched(text, page)
    return text, page, json.loads(path.with_suffix(".json").read_text())


def test_page_and_json_of_a_pool(files, capsys) -> None:
    pool, questions = files
    assert main([str(pool), str(questions), "data.media_root=/", "teacher.responses=2"]) == 0
    path = pool.with_name("pool-report.html")
    assert capsys.readouterr().out == f"{path}\n"
    text, page = read(path)
    assert_nothing_is_fetched(text, page)
    assert page.count("script") == 1 and page.count("svg") > 5
    for words in (
        "Recommendations",
        "What a pool cannot show",
        "Where the spread comes from",
        "Questions with a kept answer",
        "expected for K = 2 of their answers",
        "Expected quality of the best of K answers",
        "mcq, random guesses",
        "Quality that the discriminator leads to",
        "Can agreement stand in for labels?",
        "no final answer was found",
        "q7, k = 0",
        "prompt tokens",
        "difference from the first",
    ):
        assert words in page.text, words
    assert "simulated" not in page.text
    numbers = json.loads(path.with_suffix(".json").read_text())
    assert numbers["pool"] == str(pool) and numbers["settings"]["responses"] == 2
    # The page has the numbers of the JSON file.
    closed = numbers["best_of"]["groups"]["closed"]["quality"][0]
    shown = f"{closed['mean']:.3f} [{closed['low']:.3f}, {closed['high']:.3f}]"
    assert page.text.count(shown) >= 2
    for advice in numbers["advice"]:
        assert advice["subject"] in page.text and advice["reason"] in page.text
    for reason in numbers["not_shown"]:
        assert reason in page.text
    gain = numbers["stage2"]["closed"]["power_4-power_1"]
    assert f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]".replace("-", "−") in page.text
    kept = numbers["kept"]
    at = kept["tau"].index(0.3)
    assert f"{100 * kept['groups']['closed']['answers'][at]:.1f} / " in page.text
    precision = numbers["agreement"]["closed"]["precision"]
    assert f"{precision['value']:.3f} [{precision['low']:.3f}, {precision['high']:.3f}]" in page.text


def test_the_same_pool_gives_the_same_files(files) -> None:
    pool, questions = files
    first = [
        write_pool_report(*files, overrides=["data.media_root=/"]).with_suffix(end).read_bytes()
        for end in (".html", ".json")
    ]
    second = [
        write_pool_report(*files, overrides=["data.media_root=/"]).with_suffix(end).read_bytes()
        for end in (".html", ".json")
    ]
    assert first == second
    elsewhere = write_pool_report(pool, questions, pool.with_name("other.html"), ["data.media_root=/"])
    assert elsewhere.with_suffix(".json").read_bytes() == first[1]


def test_untrusted_text_stays_text(tmp_path) -> None:
    questions = [replace(question, id=f"{EVIL}{i}") for i, question in enumerate(asked(12))]
    responses = answered(questions, model=EVIL, usage={"prompt_tokens": EVIL})
    responses[0] = replace(responses[0], text=f"{EVIL}\x00\ud800")
    responses += answered([replace(questions[0], id=f"{EVIL}foreign")])
    responses[1] = replace(responses[1], model=f"{EVIL}2")
    # One question has no answer, so the page lists its id.
    responses = [response for response in responses if response.id != questions[3].id]
    text, page, numbers = report(tmp_path, questions, responses)
    assert page.count("script") == 1 and page.count("img") == 0
    assert "<script>alert" not in text and 'alert("pwned")' in page.text
    assert numbers["counts"]["unanswered_ids"] == [questions[3].id] and questions[3].id in page.text
    assert numbers["usage"] is None and "answers to 1 id that no question has" in page.text


def test_one_answer_per_question(tmp_path) -> None:
    questions = asked()
    _, page, numbers = report(tmp_path, questions, answered(questions, k=1))
    assert numbers["best_of"]["most"] == 1 and numbers["agreement"] is None and numbers["models"] is None
    assert set(numbers["spread"].values()) == {None}
    assert "Most questions have one answer" in page.text and "cannot be compared" in page.text


def test_all_answers_invalid(tmp_path) -> None:
    questions = asked()
    _, page, numbers = report(tmp_path, questions, answered(questions, finish_reason="length"))
    assert numbers["stage2"] is numbers["agreement"] is None
    assert numbers["quality"]["all"]["reasons"] == {"truncated": 120}
    assert "100% of them cannot be used (truncated 20)" in page.text and "No tau helps" not in page.text
    assert "Any tau has the same effect" in page.text


def test_open_questions_only(tmp_path) -> None:
    questions = [q for q in asked(60) if q.task_type == "open"]
    _, page, numbers = report(tmp_path, questions, answered(questions))
    assert numbers["kept"]["groups"] == {} and numbers["best_of"] is None
    assert "all questions are open" in page.text and "No question has a ground truth" in page.text
    assert "Quality by task" not in page.text


def test_questions_without_ground_truth(tmp_path, capsys) -> None:
    questions = [replace(q, answer=None) if i % 2 else q for i, q in enumerate(asked())]
    responses = answered(questions)
    write_questions(tmp_path / "questions.jsonl", questions, media_root=Path("/"))
    write_pool(tmp_path / "pool.jsonl", responses)
    # The default refuses them, and the error names the setting.
    assert main([str(tmp_path / "pool.jsonl"), str(tmp_path / "questions.jsonl")]) == 2
    assert "teacher.unlabeled=agreement" in capsys.readouterr().err
    _, page, numbers = report(tmp_path, questions, responses, "teacher.unlabeled=agreement")
    assert numbers["counts"]["unlabeled"] == 10 and "Agreement in place of quality" in page.text
    assert "The pool has 10 closed questions without ground truth" in page.text
    unlabeled = [replace(q, answer=None) for q in asked() if q.task_type != "open"]
    _, page, numbers = report(tmp_path, unlabeled, answered(unlabeled), "teacher.unlabeled=agreement")
    assert numbers["quality"] is None and numbers["best_of"] is None and "closed" not in numbers["means"]
    assert "25 questions have no ground truth, and no question has one to compare with" in page.text


def test_one_question(tmp_path) -> None:
    _, page, numbers = report(tmp_path, asked(1), answered(asked(1)))
    assert numbers["means"]["closed"]["low"] is None and "one question" in page.text


def test_costs_of_the_page(tmp_path) -> None:
    used = {"prompt_tokens": 1000, "completion_tokens": 100}
    prices = ("collect.input_price=2", "collect.output_price=10")
    _, page, numbers = report(tmp_path, asked(), answered(asked(), usage=used), *prices)
    # 3 thousandths for each of 120 answers, four of which are invalid.
    assert numbers["pool_usage"]["priced"] == pytest.approx(0.36)
    assert numbers["usage"]["priced"]["per_valid"] == pytest.approx(0.36 / 116)
    for words in ("Cost of the pool", "0.36", "0.0031 per valid answer", "K = 4", "all 30 questions", "0.012 [0.012,"):
        assert words in page.text, words
    assert "the same for all teachers" in page.text and "cost, as the server reported it" not in page.text
    _, page, numbers = report(tmp_path, asked(), answered(asked(), usage=used | {"cost": 0.01}))
    assert "cost, as the server reported it" in page.text and "Set collect.input_price" in page.text
    assert "Cost of K answers" not in page.text and "Cost of the pool" not in page.text


def test_simulated_pools_are_labeled(tmp_path) -> None:
    _, page, numbers = report(tmp_path, asked(), answered(asked(), model="simulated"))
    assert numbers["teacher_simulated"] is True and "The teacher was simulated" in page.text


def test_charts_have_fractional_ticks_and_names() -> None:
    shares = {"answers": [1.0, 0.5, 0.25], "questions": [1.0, 0.75, 0.5]}
    text = tau_section({"responses": 4, "tau": [0.0, 0.5, 1.0], "groups": {"closed": shares}, "at": {}}, 0.5)
    page = Page(text)
    plots = [json.loads(a["data-plot"]) for tag, a in page.tags if tag == "svg" and "data-plot" in a]
    assert [plot["xName"] for plot in plots] == ["tau", "tau"] and plots[0]["x"] == [0.0, 0.5, 1.0]
    assert ">0.2</text>" in text and "all closed 0.5" in page.text
    assert "No question has a ground truth" in best_of_section(None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{pool}"], "expected its questions as the second argument, got nothing; write rmsd_fast.report"),
        (["{pool}", "teacher.responses=2"], "expected its questions as the second argument, got teacher.responses=2"),
        (["{questions}", "{pool}"], "if this is the question file, swap the two files"),
        (["{folder}", "{questions}"], "is a folder, so the report is that of a run"),
        (["{folder}"], "expected a run folder with a config.yaml, got none"),
        (["{pool}", "{questions}", "--picture", "a.svg"], "--picture: expected the folder of a run"),
        (["{pool}", "{questions}", "--output", "{folder}/a.pdf"], "expected a name that ends in .html"),
        (["{pool}", "{questions}", "--output", "{folder}/no/a.html"], "expected a file in an existing folder"),
        (["{pool}", "{questions}", "distill.steps=2"], "distill.steps has no effect: report reads data.format"),
        (["{pool}", "{questions}", "data.media_root=/", "collect.input_price=1"], "expected both prices, got one"),
        (
            ["{pool}", "{questions}", "data.media_root=/", "collect.input_price=1", "collect.output_price=1"],
            "expected an answer with prompt and completion tokens in its `usage`, got none",
        ),
        (["{pool}", "{questions}", "collect.k=2"], "collect.k has no effect"),
        (["{pool}", "{questions}", "--teacher.responses=2"], "settings have no dashes: write teacher.responses=2"),
        (["{pool}", "{folder}/none.jsonl"], "none.jsonl"),
        (["{folder}/none.jsonl", "{questions}"], "none.jsonl: cannot be read"),
    ],
)
def test_wrong_arguments(files, tmp_path, capsys, arguments, words) -> None:
    values = {"pool": files[0], "questions": files[1], "folder": tmp_path}
    try:
        status = main([argument.format(**values) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "pool-report.html").exists() and not (tmp_path / "pool-report.json").exists()


def test_the_inputs_are_not_replaced(files) -> None:
    pool, questions = files
    moved = questions.rename(questions.with_name("pool-report.json"))
    before = moved.read_bytes()
    assert main([str(pool), str(moved), "data.media_root=/"]) == 2
    assert moved.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text.replace('"k": 1', '"k": 0', 1), "expected each (id, k) once"),
        (lambda text: text[:-20], "the last line has no newline"),
        (lambda text: text.replace("finish_reason", "reasoning", 1), "field 'reasoning': expected one of the fields"),
        (lambda text: text.replace('"text": "?"', '"text": 3', 1), "field 'text': expected text, got 3"),
        (lambda text: "", "expected at least one teacher response, got an empty file"),
        (lambda text: text.replace('"q', '"x'), "expected responses to all questions, got them for 0 of 30"),
        (lambda text: "\udcff" + text, "expected UTF-8 text"),
    ],
)
def test_damaged_pools(files, capsys, damage, words) -> None:
    pool, questions = files
    pool.write_bytes(damage(pool.read_text()).encode("utf-8", "surrogateescape"))
    assert main([str(pool), str(questions), "data.media_root=/"]) == 2
    assert words in capsys.readouterr().err and not pool.with_name("pool-report.html").exists()


def test_the_program_starts(files) -> None:
    arguments = [*map(str, files), "--output", str(files[0].with_suffix(".html")), "data.media_root=/"]
    done = run_program("rmsd_fast.report", arguments, environment(), timeout_s=120)
    assert done.returncode == 0 and done.stdout == f"{files[0].with_suffix('.html')}\n" and not done.stderr
