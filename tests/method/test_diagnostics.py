"""Test teacher statistics and constant-answer floors against hand-computed numbers."""

from dataclasses import replace
from time import process_time

import pytest

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.floors import best_constant_floor
from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.scores import score_pool, score_response


def question(identity, task, answer, **fields):
    return Question(identity, "?", task, videos=("v.mp4",), answer=answer, **fields)


def said(identity, k, answer, **fields):
    return TeacherResponse(identity, k, "", f"<think>t</think><answer>{answer}</answer>", **fields)


QUESTIONS = [
    question("m", "mcq", "B", options=("x", "y")),
    question("t", "temporal", "0 to 4"),
    question("o", "open", None),
    question("none", "numeric", "3"),
]
POOL = {
    # Qualities 1, 0, invalid letter and 1 give a mean of 0.5 and an sd of 0.5.
    "m": [said("m", 0, "B"), said("m", 1, "A"), said("m", 2, "C"), said("m", 3, "(b)")],
    # IoU 0.25 and 1, a format violation, and a complete response cut by length give a mean of 1.25 / 4.
    "t": [
        said("t", 0, "0 to 1"),
        said("t", 1, "0 to 4"),
        TeacherResponse("t", 2, "", "0 to 4"),
        said("t", 3, "0 to 4", finish_reason="length", model="simulated"),
    ],
    "o": [said("o", 0, "a"), said("o", 1, "")],
}


STRICT = TeacherConfig(parse="strict")


def scored(pool, questions, cfg):
    """Return (valid, quality, reason) by question."""
    scores = score_pool(pool, questions, cfg)
    return {name: [(a.valid, a.quality, a.reason) for a in answers] for name, answers in scores.items()}


def statistics_of(cfg):
    return pool_statistics(score_pool(POOL, QUESTIONS, cfg), QUESTIONS, cfg, simulated=True)


def test_score_pool():
    assert scored(POOL, QUESTIONS, STRICT) == {
        "m": [(True, 1.0, None), (True, 0.0, None), (False, 0.0, "not_an_option"), (True, 1.0, None)],
        "t": [(True, 0.25, None), (True, 1.0, None), (False, 0.0, "format"), (False, 0.0, "truncated")],
        "o": [(True, 1.0, None), (False, 0.0, "no_answer")],
        "none": [],
    }
    assert scored(POOL, QUESTIONS, TeacherConfig(responses=1))["t"] == [(True, 0.25, None)]


def test_natural_parsing_accepts_what_strict_parsing_refuses():
    natural = score_pool(POOL, QUESTIONS, TeacherConfig())
    assert [(a.valid, a.quality, a.as_sent) for a in natural["t"]] == [
        (True, 0.25, True),
        (True, 1.0, True),
        (True, 1.0, False),
        (False, 0.0, False),
    ]
    assert natural["t"][2].text == "<think></think><answer>0 to 4</answer>"
    # "(b)" is taught as "B".
    assert natural["m"][3].text == "<think>t</think><answer>B</answer>"


@pytest.mark.parametrize("parse", ["strict", "natural"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        # These are the words of OpenAI (chat, responses), Anthropic, Gemini, vLLM and SGLang, Bedrock, DashScope, Zhipu
        # and DeepSeek.
        ("stop STOP end_turn stop_sequence completed FinishReason.STOP COMPLETE eos_token", None),
        ("length MAX_TOKENS max_output_tokens max_tokens incomplete FinishReason.MAX_TOKENS LENGTH", "truncated"),
        ("model_context_window_exceeded abort error cancelled tool_calls tool_use OTHER pause_turn", "truncated"),
        ("ERROR ERROR_TOXIC ERROR_LIMIT USER_CANCEL TIMEOUT load unload toolCalls maxTokens", "truncated"),
        ("FINISH_REASON_MAX_TOKENS finish_reason_length FinishReason.TOOL_CALL MISSING_THOUGHT_SIGNATURE", "truncated"),
        ("EndTurn endTurn stopSequence FINISH_REASON_STOP STOP_CRITERIA_MET", None),
        ("FINISH_REASON_SAFETY contentFilter guardrailIntervened", "filtered"),
        ("content_filter SAFETY RECITATION PROHIBITED_CONTENT BLOCKLIST SPII refusal", "filtered"),
        ("guardrail_intervened content_filtered sensitive IMAGE_SAFETY", "filtered"),
        # These words are unknown or carry no information.
        ("null FINISH_REASON_UNSPECIFIED elsewhere", None),
    ],
)
def test_finish_reasons_of_all_servers_count_in_both_modes(words, reason, parse):
    question = QUESTIONS[1]
    for word in words.split():
        response = said("t", 0, "0 to 4", finish_reason=word)
        answer = score_response(response, question, TeacherConfig(parse=parse))
        assert (answer.reason, answer.valid, answer.as_sent) == (reason, reason is None, reason is None), word


def test_an_answer_with_unknown_finish_reason_needs_its_tags():
    """A truncated "12" might have become "125"."""
    cut = TeacherResponse("none", 0, "", "<think>t</think><answer>3")
    reasons = {
        word: score_response(replace(cut, finish_reason=word), QUESTIONS[3], TeacherConfig()).reason
        for word in (None, "STOP", "elsewhere")
    }
    assert reasons == {None: "unfinished", "STOP": None, "elsewhere": "unfinished"}


def test_a_repaired_answer_keeps_the_format_of_its_original():
    sent = TeacherResponse("t", 0, "", "From 0 s to 4 s.")
    repaired = replace(sent, text="<think></think><answer>0 to 4</answer>", raw=sent.text)
    for cfg in (TeacherConfig(), STRICT):
        stats = pool_statistics(
            score_pool({"t": [repaired]}, [QUESTIONS[1]], cfg), [QUESTIONS[1]], cfg, simulated=False
        )["all"]
        assert (stats["valid_share"], stats["as_sent_share"]) == (1.0, 0.0)


def test_lone_surrogates_make_an_answer_invalid():
    pool = {"o": [said("o", 0, "a \ud800 b")]}
    for cfg in (TeacherConfig(), STRICT):
        assert scored(pool, [QUESTIONS[2]], cfg)["o"] == [(False, 0.0, "not_unicode")]


def test_special_tokens_make_an_answer_invalid_whatever_the_student():
    pool = {"o": [said("o", 0, "a <|im_end|> b"), said("o", 1, "a <|x|"), said("o", 2, "<|fim_prefix2|>")]}
    judged = scored(pool, [QUESTIONS[2]], TeacherConfig())["o"]
    assert judged == [(False, 0.0, "special_token"), (True, 1.0, None), (False, 0.0, "special_token")]
    # Region marks in the reasoning are special tokens too. Natural parsing keeps the text between them.
    text = "<think>at <|box_start|>(1,2),(3,4)<|box_end|></think><answer>3</answer>"
    pool = {"none": [TeacherResponse("none", 0, "", text)]}
    assert score_pool(pool, [QUESTIONS[3]], TeacherConfig())["none"][0].text == text.replace(
        "<|box_start|>(1,2),(3,4)<|box_end|>", "(1,2),(3,4)"
    )
    assert scored(pool, [QUESTIONS[3]], STRICT)["none"] == [(False, 0.0, "special_token")]


def test_metric_settings_are_used():
    pool = {"n": [said("n", 0, "3.3")]}
    questions = [question("n", "numeric", "3")]
    assert scored(pool, questions, TeacherConfig())["n"] == [(True, 0.0, None)]
    assert scored(pool, questions, TeacherConfig(numeric_eps=0.11))["n"] == [(True, 1.0, None)]
    # The relative error 0.1 is below 1 - t for t = 0.50 ... 0.85, which are 8 of 10 thresholds.
    assert scored(pool, questions, TeacherConfig(numeric_metric="mra"))["n"] == [(True, 0.8, None)]


@pytest.mark.parametrize("weighting", ["quality", "uniform"])
def test_pool_statistics(weighting):
    stats = statistics_of(TeacherConfig(min_quality=0.3, weighting=weighting, parse="strict"))
    assert stats["teacher_simulated"] is True
    assert stats["tasks"]["numeric"] is None and set(stats["tasks"]) == {"mcq", "temporal", "open", "numeric"}
    mcq, temporal = stats["tasks"]["mcq"], stats["tasks"]["temporal"]
    assert (mcq["mean"], mcq["sd_across"], mcq["sd_within"]) == (0.5, 0.0, 0.5)
    assert (mcq["valid_share"], mcq["kept_share"], mcq["truncated_share"]) == (0.75, 0.5, 0.0)
    # (0.25, 1, 0, 0) has mean 0.3125 and variance (0.0625 + 1) / 4 - 0.3125^2 = 0.16796875.
    assert temporal["mean"] == 0.3125 and temporal["sd_within"] == pytest.approx(0.16796875**0.5)
    assert (temporal["valid_share"], temporal["kept_share"], temporal["truncated_share"]) == (0.5, 0.25, 0.25)
    assert temporal["reasons"] == {"format": 1, "truncated": 1} and temporal["as_sent_share"] == 0.5
    assert mcq["best_share"] == temporal["best_share"] == 1 and stats["all"]["best_share"] == 0.75
    closed = stats["closed"]
    assert closed["mean"] == pytest.approx(0.40625) and closed["sd_across"] == pytest.approx(0.09375)
    assert (closed["low"], closed["high"]) == (0.3125, 0.5)
    assert closed["questions"] == 3 and closed["responses"] == 8
    # "none" has no responses at all.
    assert closed["empty_share"] == pytest.approx(1 / 3) and stats["all"]["empty_share"] == pytest.approx(1 / 4)
    assert stats["all"]["responses"] == 10 and stats["all"]["valid_share"] == 0.6


def test_an_invalid_response_is_never_kept():
    stats = statistics_of(TeacherConfig(min_quality=0.0, parse="strict"))
    assert stats["tasks"]["mcq"]["kept_share"] == 0.5 and stats["tasks"]["temporal"]["kept_share"] == 0.5


def test_floors():
    mcq = [question(f"m{i}", "mcq", letter, options=("w", "x", "y", "z")) for i, letter in enumerate("BBAC")]
    numeric = [question(f"n{i}", "numeric", value) for i, value in enumerate(("3", "3.0", "4", "5", "5"))]
    ocr = [question("o0", "ocr", "H 4"), question("o1", "ocr", "H 5"), question("o2", "ocr", "L 4")]
    openness = [question("p", "open", None)]
    floors = best_constant_floor([*mcq, *numeric, *ocr, *openness])
    assert floors["mcq"] == (0.5, "B")
    # "3" and "3.0" are the same number, which answers 2 of 5 questions. So does 5, and "3" comes first alphabetically.
    assert floors["numeric"] == (0.4, "3")
    # "H 4" scores 1 against itself, and one word of two against "H 5" and "L 4".
    assert floors["ocr"] == (pytest.approx(2 / 3), "H 4")
    assert floors["open"][0] == 1.0


def test_floors_of_graded_tasks_use_answers_of_no_question():
    temporal = [question("a", "temporal", "0 to 6"), question("b", "temporal", "4 to 10")]
    # Each of the two intervals scores (1 + 2/10) / 2 = 0.6, and so does the whole clip; "4 to 6" scores 1/3. On the
    # grid, "0 to 8" has 6/8 and 4/10 -> 0.575, and "2 to 8" has 4/8 and 4/8, so no interval exceeds 0.6.
    assert best_constant_floor(temporal)["temporal"][0] == pytest.approx(0.6)
    spatial = [question("a", "spatial", "0,0,200,200"), question("b", "spatial", "200,0,400,200")]
    score, _ = best_constant_floor(spatial)["spatial"]
    assert score == pytest.approx(0.5)
    wide = [question("a", "spatial", "0,0,300,200"), question("b", "spatial", "100,0,400,200")]
    # Either truth scores (1 + 200/400) / 2 = 0.75, and the box around both, on the grid, has 300/400 for either = 0.75.
    assert best_constant_floor(wide)["spatial"][0] == pytest.approx(0.75)
    three = [*wide, question("c", "spatial", "0,0,400,200"), question("d", "spatial", "0,0,400,200")]
    assert best_constant_floor(three)["spatial"] == (pytest.approx(0.875), "0,0,400,200")


def test_floors_exclude_ground_truths_that_cannot_be_scored():
    assert best_constant_floor([question("n", "numeric", None)]) == {}


def test_floors_of_many_questions_are_found_in_a_sample_and_scored_in_full():
    """The time for 4,000 questions of a task was once quadratic."""
    numeric = [question(f"n{i}", "numeric", str(i % 1999)) for i in range(4000)]
    score, _ = best_constant_floor(numeric)["numeric"]
    # The largest numbers have the widest tolerance: around 1979 it is ±19.8, with 2 questions per number.
    assert score == pytest.approx(2 * 39.6 / 4000, rel=0.05)
    text = [question(f"o{i}", "ocr", f"{'EXIT' if i % 2 else i} {i}") for i in range(4000)]
    assert best_constant_floor(text)["ocr"][0] == pytest.approx(0.25, abs=0.01)
    spatial = [question(f"s{i}", "spatial", f"{i % 50},0,{500 + i % 40},1000") for i in range(4000)]
    assert best_constant_floor(spatial)["spatial"][0] > 0.93


def test_the_floor_of_long_texts_takes_seconds():
    """1,000 answers of 60 words once took 12 s, and the time was quadratic in their length."""
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(words[(7 * i + j * j) % 300] for j in range(60)) for i in range(1000)]
    long = [question(f"o{i}", "ocr", text) for i, text in enumerate([*texts, *["EXIT " * 59 + "now"] * 250])]
    started = process_time()
    # A fifth of the questions have the answer that scores best.
    assert best_constant_floor(long)["ocr"][0] == pytest.approx(0.2, abs=0.01)
    assert process_time() - started < 6


def test_answers_without_ground_truth_are_compared_with_each_other():
    unlabeled = question("u", "temporal", None)
    assert unlabeled.is_unlabeled and not unlabeled.has_truth
    assert [q.has_truth for q in QUESTIONS] == [True, True, False, True] and not any(q.is_unlabeled for q in QUESTIONS)
    pool = {
        "u": [
            said("u", 0, "0 to 4"),
            said("u", 1, "0 to 8", finish_reason="length"),
            said("u", 2, "2 to 6"),
            said("u", 3, "0 to 8"),
        ]
    }
    # The truncated answer is excluded. The IoUs of the other three are 1/3, 1/2 and 1/2.
    assert scored(pool, [unlabeled], STRICT)["u"] == [
        (True, pytest.approx(5 / 12), None),
        (False, 0.0, "truncated"),
        (True, pytest.approx(5 / 12), None),
        (True, 0.5, None),
    ]
    # Two of the first three answers are valid. Of the first two, only one is valid, so no other answer agrees with it.
    three = scored(pool, [unlabeled], TeacherConfig(responses=3))["u"]
    assert [quality for _, quality, _ in three] == pytest.approx([1 / 3, 0, 1 / 3])
    assert scored(pool, [unlabeled], TeacherConfig(responses=2))["u"] == [(True, 0, None), (False, 0, "truncated")]
    stats = pool_statistics(
        score_pool(pool | POOL, [unlabeled, *QUESTIONS], STRICT), [unlabeled, *QUESTIONS], STRICT, simulated=True
    )
    # The qualities of the four answers add up to 4/3, and for the other question to 1.25.
    assert stats["tasks"]["temporal"]["unlabeled"] == 1 and stats["tasks"]["mcq"]["unlabeled"] == 0
    assert stats["all"]["unlabeled"] == 1 and stats["tasks"]["temporal"]["mean"] == pytest.approx((1 / 3 + 0.3125) / 2)
    assert best_constant_floor([unlabeled]) == {}
