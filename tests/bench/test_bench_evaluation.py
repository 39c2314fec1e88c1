"""Test the comparison with lmms-eval and V-STaR's script: its answers, its table, and its own side of the scores."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bench.evaluation.agreement import Reading, agreement_tables, lmms_eval_reader, one_capital, read_all, version_of
from bench.evaluation.answers import KINDS, LETTERS, NO_OPTION, ONE_LETTER, UNCLEAR, Answer, generate
from bench.evaluation.vstar import made_records, own_scores, published_scores

OPTIONS = ("Apples", "By train", "Candles", "12")


def test_answers_are_the_same_for_a_seed_and_mean_their_letter():
    answers = generate(2000)
    assert answers == generate(2000) and answers != generate(2000, seed=1)
    assert set(Counter(answer.kind for answer in answers).values()) == {2000 // len(KINDS)}
    for answer in answers:
        if answer.kind in ONE_LETTER:
            assert answer.meant in answer.text
        assert (answer.meant is None) == (answer.kind in NO_OPTION or answer.kind in UNCLEAR)
    # Every letter is meant about equally often.
    meant = Counter(answer.meant for answer in answers if answer.meant)
    assert set(meant) == set(LETTERS) and max(meant.values()) < 1.2 * min(meant.values())


def test_the_lenient_reading_finds_the_letter_that_an_answer_means():
    readings = read_all(generate(400), lambda text: None)
    wrong = [r for r in readings if r.ours != r.answer.meant and r.answer.kind not in UNCLEAR]
    # As in the field, a text that begins with the article A is read as the answer A.
    assert all(r.answer.kind == "no letter" and r.answer.text.startswith("A ") for r in wrong), wrong


def test_the_table_counts_agreement_and_right_readings():
    def reading(kind, text, meant, theirs, ours):
        return Reading(Answer(kind, text, OPTIONS, meant), theirs, ours)

    readings = [
        reading("letter alone", "B", "B", "B", "B"),
        reading("phrase and option", "The answer is B. Apples", "B", "A", "B"),
        reading("no letter", "A man | walks", None, "A", "A"),
        reading("two letters", "A or B", None, "A", "B"),
    ]
    text = agreement_tables(readings)
    assert "| phrase and option | 1 | 0% | 0% | 100% |" in text and "| two letters | 1 | 0% | - | - |" in text
    assert "| **all** | 4 | 50% | 33.33% | 66.67% |" in text
    assert "| **states one letter** | 2 | 50% | 50% | 100% |" in text
    assert "| **states one letter, no other capital A to D** | 1 | 100% | 100% | 100% |" in text
    assert "| phrase and option | 1 | `'The answer is B. Apples'` | B | A | B | lenient | the last capital" in text
    assert "| no letter | 1 | `'A man \\| walks'` | none | A | A | neither |" in text
    assert "| two letters | 1 | `'A or B'` | unclear | A | B | unclear |" in text
    assert one_capital(Answer("tags", "<think>Apples</think>B", OPTIONS, "B"))


def test_predictions_of_vstar_are_scored():
    records = made_records(3, seed=0)
    record = records[0] | {"timestamps": [2.0, 8.0], "grade": 2, "width": 1000, "height": 500}
    record["bboxes"] = [{"timestamp": t, "xmin": 100, "ymin": 100, "xmax": 300, "ymax": 200} for t in (3, 4)]
    record |= {"answer_temporal": [5.0, 11.0], "answer_temporal_2": None}
    record |= {
        "answer_spatial": {"3": [100, 100, 300, 200]},
        "answer_spatial_2": {"3": [200, 100, 400, 200], "9": [0] * 4},
    }
    scores = {question.meta["groups"]["ask"]: score for question, score in own_scores([record, *records[1:]])[:5]}
    # [2, 8] and [5, 11] share 3 of 9 s. One of two boxes is right; then one of two overlaps by 1/3.
    assert scores == pytest.approx({"what": 1, "when1": 1 / 3, "where1": 1 / 2, "where2": 1 / 6, "when2": 0})


def test_a_folder_without_the_functions_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--lmms-eval: expected a checkout of lmms-eval"):
        lmms_eval_reader(tmp_path)
    with pytest.raises(SystemExit, match="--vstar: expected a folder with eval.py"):
        published_scores(tmp_path, [])
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.7.3"\n')
    assert version_of(tmp_path) == "0.7.3"


@pytest.mark.skipif("RMSD_LMMS_EVAL" not in os.environ, reason="RMSD_LMMS_EVAL names no checkout of lmms-eval")
def test_lmms_eval_reads_no_letter_that_the_lenient_reading_misses():
    readings = read_all(generate(2000), lmms_eval_reader(Path(os.environ["RMSD_LMMS_EVAL"])))
    assert all(r.agrees or r.ours == r.answer.meant for r in readings)
    stated = [r for r in readings if r.answer.kind in ONE_LETTER and one_capital(r.answer)]
    assert len(stated) > 800 and all(r.agrees for r in stated)
