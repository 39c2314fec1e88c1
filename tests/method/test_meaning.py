"""Test the wordings of open answers about generated clips, and the score of their meaning."""

import random
from pathlib import Path

import pytest

from rmsd_fast.data.records import Question
from rmsd_fast.made import wording
from rmsd_fast.made.clips import COLORS, SHAPES, make_question, sample_content
from rmsd_fast.made.meaning import has_content, meaning_score
from rmsd_fast.made.teacher import SimulatedTeacher, simulate_teacher
from rmsd_fast.made.wording import PARAPHRASES, PLACES, paraphrase, reference_text, wrong_text
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.quality import words_of

MADE = {"color": "red", "shape": "block", "place": "top left"}
CONTENTS = [{"color": c, "shape": s, "place": p} for c in COLORS for s in SHAPES for p in PLACES]


def other_contents(made):
    rng = random.Random(str(made))
    for key, values in (("color", COLORS), ("shape", SHAPES), ("place", PLACES)):
        yield made | {key: rng.choice([value for value in values if value != made[key]])}


@pytest.mark.parametrize("template", [None, *PARAPHRASES])
def test_every_wording_is_understood(template, monkeypatch):
    if template:
        monkeypatch.setattr(wording, "PARAPHRASES", (template,))
    rng = random.Random(0)
    for made in CONTENTS:
        text = paraphrase(**made, rng=rng) if template else reference_text(**made)
        assert meaning_score(text, made) == 1.0, text
        assert not any(meaning_score(text, other) for other in other_contents(made)), text


def test_wrong_texts_mean_something_else():
    rng = random.Random(0)
    changed = []
    for made in CONTENTS:
        text = wrong_text(**made, rng=rng)
        assert meaning_score(text, made) == 0.0, text
        changed.append([made["color"] in text, made["shape"] in text, text.endswith(f"at the {made['place']}.")])
    # One of the three is wrong, each in a third of the cases; 288 contents.
    assert all(sum(row) == 2 for row in changed)
    assert all(sum(not row[i] for row in changed) / 288 == pytest.approx(1 / 3, abs=0.11) for i in range(3))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("A red block at the top left.", 1.0),
        ("a RED BLOCK, upper-left", 1.0),
        ("In the upper left there is a shape of the kind block, colored red.", 1.0),
        ("A red square in the top left corner.", 1.0),
        # A wrong color, shape or place.
        ("A blue block at the top left.", 0.0),
        ("A red oval at the top left.", 0.0),
        ("A red block at the top right.", 0.0),
        ("A red block at the top.", 0.0),
        # Something is missing.
        ("A red block.", 0.0),
        ("A block at the top left.", 0.0),
        ("Something red at the top left.", 0.0),
        ("", 0.0),
        # Contradictions, denial and doubt.
        ("A red block at the top left and a blue one.", 0.0),
        ("A red block at the top left or bottom left.", 0.0),
        ("A red block at the top left, in the middle.", 0.0),
        ("A red block, an oval, at the top left.", 0.0),
        ("There is no red block at the top left.", 0.0),
        ("It isn\N{RIGHT SINGLE QUOTATION MARK}t a red block at the top left.", 0.0),
        ("Maybe a red block at the top left.", 0.0),
        # Parts of words are not read.
        ("A reddish block at the top left.", 0.0),
    ],
)
def test_meaning_of_texts(text, score):
    assert meaning_score(text, MADE) == score


@pytest.mark.parametrize(
    ("place", "words", "score"),
    [
        ("centre", "centre", 1.0),
        ("centre", "center", 1.0),
        ("center", "centre", 1.0),
        ("centre", "middle part", 1.0),
        ("centre", "top center", 0.0),
        ("top", "top center", 1.0),
        ("top", "upper middle", 1.0),
        ("top", "upper left", 0.0),
        ("top", "center", 0.0),
        ("left", "middle left", 1.0),
        ("left", "left-hand side", 1.0),
        ("bottom right", "lower right", 1.0),
        ("bottom right", "lower right center", 0.0),
    ],
)
def test_places(place, words, score):
    assert meaning_score(f"A red block at the {words}.", MADE | {"place": place}) == score


def test_questions_that_record_their_content():
    def question(meta):
        return Question("q", "What?", "open", videos=("v.mp4",), meta=meta)

    assert has_content(question({"made": MADE}))
    assert not any(has_content(question(meta)) for meta in ({}, {"made": "2020"}, {"made": {"color": "red"}}))


def overlap(text, reference):
    """Return the F1 and the recall of words."""
    words, expected = words_of(text), words_of(reference)
    common = sum(min(words.count(word), expected.count(word)) for word in set(expected))
    return 2 * common / (len(words) + len(expected)), common / len(expected)


def test_word_overlap_by_hand():
    reference = "A red block at the top left."
    # In common: "the", "left" and "red" of 15 and 7 words; "block," keeps its comma.
    assert overlap("In the upper left part there is one shape of the kind block, colored red.", reference) == (
        pytest.approx(2 * 3 / (15 + 7)),
        pytest.approx(3 / 7),
    )
    # In common: all but the color.
    assert overlap("A blue block at the top left.", reference) == (pytest.approx(6 / 7), pytest.approx(6 / 7))


def test_word_overlap_prefers_wrong_answers_to_every_paraphrase(monkeypatch):
    rng = random.Random(0)
    for made in CONTENTS:
        reference = reference_text(**made)
        wrong = [overlap(reference_text(**other), reference) for other in CONTENTS if _differences(made, other) == 1]
        right = []
        for template in PARAPHRASES:
            monkeypatch.setattr(wording, "PARAPHRASES", (template,))
            right.append(overlap(paraphrase(**made, rng=rng).replace(",", " ").replace(":", " "), reference))
        assert max(f1 for f1, _ in right) < min(f1 for f1, _ in wrong), made
        # Recall is equal if the color changes the article: "An orange block at the left." has 4 of 6 words too.
        assert max(recall for _, recall in right) <= min(recall for _, recall in wrong), made


def _differences(made, other):
    return sum(made[key] != other[key] for key in made)


def test_paraphrased_pool(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"x")
    rng = random.Random(0)
    contents = [sample_content(rng, heldout=False) for _ in range(500)]
    questions = [make_question(c, "open", rng, identity=f"{i}", clip=clip) for i, c in enumerate(contents)]
    answers = _answers(questions, SimulatedTeacher(error_rate=0.35, wording="paraphrased"))
    means = [meaning_score(text, question.meta["made"]) for question, text in answers]
    # Four standard errors of a share over 1,000 answers, twice of each question: 0.06.
    assert sum(means) / len(means) == pytest.approx(0.65, abs=0.06)
    by_meaning = {score: [] for score in (0.0, 1.0)}
    for (question, text), score in zip(answers, means, strict=True):
        by_meaning[score].append(overlap(text, question.answer)[0])
    assert max(by_meaning[1.0]) < min(by_meaning[0.0])
    # With the wording of the reference, right answers are the reference itself.
    answers = _answers(questions, SimulatedTeacher(error_rate=0.35))
    assert {text == q.answer for q, text in answers if meaning_score(text, q.meta["made"])} == {True}
    assert all(overlap(text, q.answer)[0] < 1 for q, text in answers if not meaning_score(text, q.meta["made"]))


def _answers(questions, teacher):
    asked = {question.id: question for question in questions}
    responses = simulate_teacher(questions, k=2, seed=0, teacher=teacher)
    read = [(asked[response.id], parse_answer(response.text, "open")) for response in responses]
    for response, (_, text) in zip(responses, read, strict=True):
        assert text is None or f"<think>{text}</think>" in response.text
    return [(question, text) for question, text in read if text is not None]


def test_only_open_answers_are_paraphrased(tmp_path):
    clip = Path(tmp_path / "clip.mp4")
    clip.write_bytes(b"x")
    rng = random.Random(0)
    questions = [
        make_question(sample_content(rng, heldout=False), task, rng, identity=task, clip=clip)
        for task in ("mcq", "temporal", "spatial", "numeric", "ocr")
    ]
    texts = [
        [response.text for response in simulate_teacher(questions, k=4, seed=0, teacher=SimulatedTeacher(wording=name))]
        for name in ("reference", "paraphrased")
    ]
    assert texts[0] == texts[1]
