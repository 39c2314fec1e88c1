"""Test the invented records of all benchmarks, and the page with the tables of a student that answers them."""

from __future__ import annotations

import re

import pytest
from material import WORLD

from bench.core.records import RESULTS
from bench.evaluation.fixture_records import COLOR, write_annotation, write_clips
from bench.evaluation.fixtures import UNTRAINED, evaluate_all, main, page
from rmsd_fast.config import BENCHMARKS
from rmsd_fast.data.benchmarks import load_benchmark
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.quality import quality_score

QUESTIONS = {"videomme": 4, "videommmu": 3, "worldsense": 4, "longvideobench": 4, "mlvu": 7, "mathvista": 3}
QUESTIONS |= {"mathverse": 10, "vstar": 20}
# How many of them have colors as options.
OF_COLORS = {"videomme": 4, "videommmu": 3, "worldsense": 3, "longvideobench": 4, "mlvu": 7, "mathvista": 1}
OF_COLORS |= {"mathverse": 5, "vstar": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixtures")
    return folder, write_clips(folder)


def test_the_answers_of_the_records_are_right(made, caplog):
    folder, clips = made
    for benchmark in BENCHMARKS:
        path = write_annotation(benchmark, folder, clips)
        questions = load_benchmark(benchmark, path, media_root=folder, check_count=False)
        assert len(questions) == QUESTIONS[benchmark]
        # A question of MathVerse has its options in its text, which the image may show instead.
        texts = {q.id: q.meta.get("judged_question", q.question) for q in questions}
        asked = [q for q in questions if q.task_type == "mcq" and COLOR in texts[q.id]]
        assert len(asked) == OF_COLORS[benchmark]
        for question in asked:
            name = (question.videos or question.images)[0].rpartition("/")[2].partition(".")[0]
            (clip,) = (clip for clip in clips if clip.name == name)
            options = question.options or re.findall(r"^[A-D]:(.+)$", texts[question.id], re.MULTILINE)
            assert len(options) == 4
            shown = options["ABCD".index(question.answer)]
            assert shown.rpartition(" ")[2] == clip.content.color
    # Intervals and boxes of V-STaR are those of the clips, whose questions of training have the same ground truths.
    for clip, (what, when, where, *_) in zip(clips, zip(*[iter(questions)] * 5, strict=True), strict=True):
        content = clip.content
        assert what.question == COLOR and what.answer == content.color
        answer = f"<think></think><answer>{content.start}.0 to {content.end}.0</answer>"
        assert quality_score(answer, "temporal", when.answer) == 1
        boxes = parse_answer(f"<think></think><answer>{where.answer}</answer>", "boxes")
        assert sorted(boxes) == [str(second) for second in range(content.start, content.end)]
    assert "does not know the fields" not in caplog.text


def test_a_student_answers_all_of_them(made):
    folder, clips = made
    build_tiny_student(folder / "student", texts=["Which colour is the shape?"], layers=1)
    results = evaluate_all(folder, clips, str(folder / "student"), "benchmark", WORLD, "evaluate.max_new_tokens=2")
    assert {name: result["students"]["student"]["all"]["n"] for name, result in results.items()} == QUESTIONS
    assert all(result["unusable"]["student"]["count"] == 0 for result in results.values())
    text = page(results, "A student", "rmsd")
    kept = (RESULTS / "fixtures.md").read_text(encoding="utf-8")
    written = "Written by `python -m bench.evaluation.fixtures --model FOLDER --about TEXT --prompt rmsd`."
    assert written in text and written in kept
    assert "fixtures`." in page(results, UNTRAINED, "benchmark")
    for name, result in results.items():
        assert f"## {name}\n" in text and f"## {name}\n" in kept
        assert f"no comparison with the paper: {QUESTIONS[name]} of " in kept and "lenient, in percent: mean" in text
        assert all(group in kept for group in result["students"]["student"].get("groups", {}))


@pytest.mark.parametrize("given", [["--model", "x"], ["--about", "A student"]])
def test_a_student_is_described(given, capsys):
    with pytest.raises(SystemExit):
        main(given)
    assert "--model and --about: expected both or neither" in capsys.readouterr().err
