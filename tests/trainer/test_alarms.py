"""Test by hand when each alarm is raised and when it is not, and that its advice names existing settings."""

from __future__ import annotations

import dataclasses
import math
import random
import re

import pytest

from rmsd_fast.config import RunConfig
from rmsd_fast.runtime.alarms import CONDITIONS, AlarmWatch, find_alarms

ACCURACY, LENGTH = "discriminator/pair_accuracy", "discriminator/length_correlation"


def rows(key: str, values: list, stage: str = "distill") -> list[dict]:
    return [{"stage": stage, "step": step, key: value} for step, value in enumerate(values, start=1)]


def raised(*args, totals=None, **options) -> list[tuple[str, int, float]]:
    alarms = find_alarms(rows(*args, **options), totals or {})
    return [(alarm.condition.metric, alarm.step, pytest.approx(alarm.value)) for alarm in alarms]


@pytest.mark.parametrize(
    ("key", "bad", "fine", "step"),
    [
        (ACCURACY, 0.5, 0.6, 40),
        (ACCURACY, 0.97, 0.94, 20),
        (LENGTH, 0.35, 0.29, 20),
        (LENGTH, -0.35, -0.29, 20),
        ("rollout/valid_share", 0.6, 0.75, 20),
        ("rollout/truncated_share", 0.25, 0.15, 20),
        ("rollout/empty_share", 0.1, 0.04, 20),
        ("teacher/empty_share", 0.4, 0.25, 40),
        ("advantage/zero_share", 0.6, 0.45, 40),
        ("teacher/headroom", -0.05, 0.01, 40),
        ("policy/kl", 1.5, 0.5, 20),
        ("self_teacher/gap_size", 0.0005, 0.01, 20),
        ("self_teacher/hinted_share", 0.3, 0.6, 40),
        ("self_teacher/feedback_share", 0.3, 0.6, 40),
        ("credit/clipped_share", 0.95, 0.8, 20),
        ("kd/clipped_share", 0.95, 0.8, 20),
        ("policy/importance_ratio", 1.2, 1.05, 20),
        ("policy/importance_ratio", 0.8, 0.95, 20),
        ("policy/engine_kl", 0.02, 0.005, 20),
        ("policy/engine_kl", -0.02, -0.005, 20),
        ("rollout/repeated_4grams", 0.4, 0.2, 20),
        ("rollout/length_ratio", 0.4, 0.6, 20),
        ("rollout/length_ratio", 2.2, 1.8, 20),
    ],
)
def test_each_condition_is_raised_once_at_its_first_judged_step(key, bad, fine, step):
    assert raised(key, [bad] * 200) == [(key, step, bad)]
    assert raised(key, [bad] * (step - 1)) == []
    assert raised(key, [fine] * 200) == []
    assert raised(key, [bad] * 200, stage="sft") == []


def test_accuracy_is_compared_with_chance_late_in_warm_up_and_in_stage_2():
    warm_up = rows(ACCURACY, [0.5] * 40, stage="warm_up")
    alarms = find_alarms([*warm_up, *rows(ACCURACY, [0.52] * 40)], {"warm_up": 40, "distill": 40})
    assert [(a.stage, a.step, a.value) for a in alarms] == [
        ("warm_up", 30, pytest.approx(0.5)),
        ("distill", 40, pytest.approx(0.52)),
    ]
    # Late means after three quarters of the stage, so a D that learns from step 60 of 200 raises no alarm.
    learns = [0.5] * 60 + [0.7] * 140
    assert raised(ACCURACY, learns, stage="warm_up", totals={"warm_up": 200}) == []
    assert raised(ACCURACY, [0.5] * 200, stage="warm_up", totals={"warm_up": 200}) == [(ACCURACY, 150, 0.5)]
    # A short warm-up is checked at its twentieth step, which is the first with two windows.
    assert raised(ACCURACY, [0.5] * 25, stage="warm_up", totals={"warm_up": 25}) == [(ACCURACY, 20, 0.5)]
    # D learns by the end of a warm-up of 40 steps: the mean of steps 21 to 30 is 0.65.
    learns = [0.5] * 20 + [0.56 + 0.02 * i for i in range(20)]
    assert raised(ACCURACY, learns, stage="warm_up", totals={"warm_up": 40}) == []


def test_equal_rewards_are_no_alarm_while_the_self_teacher_adds_advantages():
    flat = rows("advantage/zero_share", [0.9] * 200)
    taught = [row | {"kd/clipped_share": 0.0 if row["step"] <= 100 else None} for row in flat]
    assert [(a.condition.metric, a.step) for a in find_alarms(flat, {})] == [("advantage/zero_share", 40)]
    assert [(a.condition.metric, a.step) for a in find_alarms(taught, {})] == [("advantage/zero_share", 140)]


def test_the_least_gap_is_above_the_rounding_of_the_dtype():
    # In bfloat16, an empty hint had a gap of 0.0029.
    for gap, dtypes in ((0.0005, ["float32", "bfloat16"]), (0.003, ["bfloat16"]), (0.02, [])):
        silent = rows("self_teacher/gap_size", [gap] * 20)
        assert [dtype for dtype in ("float32", "bfloat16") if find_alarms(silent, {}, dtype)] == dtypes


def test_accuracy_below_chance_is_no_alarm_once_the_rollouts_are_better():
    values = [{"stage": "distill", "step": step, ACCURACY: 0.4, "teacher/headroom": -0.1} for step in range(1, 101)]
    assert [alarm.condition.metric for alarm in find_alarms(values, {})] == ["teacher/headroom"]
    for row in values[40:]:
        row["teacher/headroom"] = 0.0
    # The first 40 steps do not count.
    found = {alarm.condition.metric: alarm.step for alarm in find_alarms(values, {})}
    assert found == {"teacher/headroom": 40, ACCURACY: 80}


def test_both_windows_must_be_out_of_bounds():
    # After 20 steps of 0.9 it takes two windows of 0.99. The older window may hold one 0.9: the mean is 0.981 and its
    # standard error 0.0285 / sqrt(10) = 0.009, so 0.981 - 0.018 > 0.95. With two, the bound is 0.972 - 2 * 0.0379 /
    # sqrt(10) = 0.948.
    assert raised(ACCURACY, [0.9] * 20 + [0.99] * 18) == []
    assert raised(ACCURACY, [0.9] * 20 + [0.99] * 19) == [(ACCURACY, 39, (19 * 0.99 + 0.9) / 20)]
    # One window is above the bounds, and the other is below them.
    assert raised(LENGTH, [0.5] * 10 + [-0.5] * 10) == []


def test_noise_around_a_good_level_raises_no_alarm():
    # The demonstration has few answers of different lengths, so single steps range from -0.8 to 0.8.
    assert raised(LENGTH, [0.8, -0.7, 0.8, 0.4, -0.3] * 20) == []
    # (4 * 1.0 + 6 * 0) / 10 = 0.4 is above 0.3, but within two standard errors of 0.163.
    assert raised(LENGTH, [1.0, 0.0, 0.0, 1.0, 0.0] * 4) == []


def test_drifting_metrics_with_a_good_level_raise_no_alarm():
    """In this autoregressive process each step keeps half of the step before, so ten steps underestimate its spread."""
    draw = random.Random(0)
    for key, mean, deviation in ((LENGTH, 0.1, 0.12), (ACCURACY, 0.65, 0.05), ("advantage/zero_share", 0.3, 0.12)):
        for _ in range(50):
            values, drift = [], 0.0
            for _ in range(468):
                drift = 0.5 * drift + draw.gauss(0.0, deviation * 0.75**0.5)
                values.append(mean + drift)
            assert raised(key, values) == []


def test_missing_and_non_finite_values_are_skipped():
    values = [0.99, None, math.nan, "x"] * 19
    assert raised(ACCURACY, values) == []
    assert raised(ACCURACY, [*values, None, 0.99]) == [(ACCURACY, 78, 0.99)]


def test_a_window_does_not_span_two_stages():
    assert find_alarms([*rows(ACCURACY, [0.99] * 19, stage="warm_up"), *rows(ACCURACY, [0.99] * 19)], {}) == []


def test_replaying_logged_steps_does_not_raise_an_alarm_again():
    steps = rows(ACCURACY, [0.99] * 30)
    watch = AlarmWatch({})
    before = [alarm for row in steps[:20] for alarm in watch.see("distill", row["step"], row)]
    after = [alarm for row in steps[20:] for alarm in watch.see("distill", row["step"], row)]
    assert len(before) == 1 and after == []


def test_alarm_text():
    (alarm,) = find_alarms(rows("rollout/truncated_share", [0.25] * 20), {})
    assert alarm.text() == (
        "ALARM: many rollouts are truncated (distill step 20)\n"
        "  rollout/truncated_share: expected at most 0.2, got 0.25, the mean of 20 steps\n"
        "  They reach rollout.max_new_tokens before they end, so they have no answer.\n"
        "  What to do: raise rollout.max_new_tokens, or train stage 1 for longer so that answers end."
    )
    assert all(
        len(row) <= 100 for c in CONDITIONS for row in dataclasses.replace(alarm, condition=c).text().splitlines()
    )
    assert [c.expected for c in CONDITIONS if c.metric in (LENGTH, "rollout/valid_share")] == [
        "-0.3 to 0.3",
        "at least 0.7",
    ]


def test_settings_that_the_advice_names_exist():
    sections = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}
    for condition in CONDITIONS:
        for section, name in re.findall(r"\b([a-z_]+)\.([a-z][a-z_0-9]+)", f"{condition.meaning} {condition.advice}"):
            assert hasattr(sections[section](), name), f"{section}.{name}"
