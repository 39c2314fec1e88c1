"""Test parts of the report by hand: smoothing, axes, numbers, intervals in words, colors, and markup of answers."""

from __future__ import annotations

import math
import re

import pytest
from report_files import Page

from rmsd_fast.report_page.curves import GROUPS, stage_section
from rmsd_fast.report_page.evaluation import difference_name, interval, verdict
from rmsd_fast.report_page.samples import response_html, visible
from rmsd_fast.report_page.style import DARK, LIGHT, SERIES_COLORS
from rmsd_fast.report_page.svg import Series, curve_chart, number, smooth, stacked_chart, thin, ticks, value_range
from rmsd_fast.runtime.alarms import CONDITIONS


def test_colors_have_contrast() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for theme in (LIGHT, DARK):
        for i in range(1, SERIES_COLORS + 1):
            assert contrast(theme[f"s{i}"], theme["card"]) >= 3
        for name in ("ink", "muted", "good", "bad"):
            assert contrast(theme[name], theme["card"]) >= 4.5, name
        for name in ("ink", "muted", "s1"):
            assert contrast(theme[name], theme["page"]) >= 4.5, name
        assert contrast(theme["ink"], theme["note"]) >= 4.5


def test_smoothing_by_hand() -> None:
    assert smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    values = [float(i % 2) for i in range(24)]
    out = smooth(values)
    # With 24 points each point has one neighbor on each side, and the end points have one neighbor.
    assert out[0] == out[-1] == 0.5
    assert out[1] == pytest.approx(1 / 3) and out[2] == pytest.approx(2 / 3)
    values[10] = math.nan
    assert smooth(values)[10] == pytest.approx((values[9] + values[11]) / 2)


def test_warning_lines_are_bounds_of_alarms() -> None:
    """A line above 0 is an upper bound of every curve of its chart, and one below 0 a lower bound."""
    for chart in (chart for _, charts in GROUPS for chart in charts):
        for value, _ in chart.warn:
            for key, _ in chart.keys:
                bounds = [c.high if value > 0 else c.low for c in CONDITIONS if c.metric == key]
                assert value in bounds, (chart.title, key)


def test_only_a_broken_run_has_warnings() -> None:
    steps = tuple(range(1, 41))
    healthy = {
        "self_teacher/gap": Series("", steps, (-0.05,) * 40),
        "self_teacher/gap_size": Series("", steps, (0.3,) * 40),
        "self_teacher/hinted_share": Series("", steps, (1.0,) * 40),
        "kd/clipped_share": Series("", steps, (0.1,) * 40),
    }
    page = stage_section("distill", healthy)
    assert "Gap of the self-teacher" in page and "Warning:" not in page
    page = stage_section("distill", healthy | {"kd/clipped_share": Series("", steps, (0.95,) * 40)})
    assert page.count("Warning:") == 1 and "distillation is above 0.9 on 40 of 40 steps" in page
    # A run without a pool and without rewards has no charts of them.
    zeros = {f"reward/{name}/weighted": Series("", steps, (0.0,) * 40) for name in ("outer", "task", "content")}
    page = stage_section("distill", healthy | zeros | {"reward/total": Series("", steps, (0.0,) * 40)})
    assert "Rewards, weighted" not in page and "Total reward" not in page


def test_thinning_keeps_spikes() -> None:
    values = [0.0] * 5000
    values[1234], values[4321] = 9.0, -7.0
    steps, kept = thin(range(5000), values, 600)
    assert len(kept) <= 600 and max(kept) == 9.0 and min(kept) == -7.0
    assert steps == sorted(steps) and steps[kept.index(9.0)] == 1234


def test_ticks_and_numbers() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 0.3, 5) == [-0.2, 0.0, 0.2]
    assert ticks(0, 390, 5) == [0, 100, 200, 300]
    assert ticks(2.0, 2.0) == [2.0]
    written = [number(v) for v in (0, 0.12345, 12.345, 123.4, 1234.5, 12345.0, 2.5e6, 2e-6, -0.5, math.nan, None)]
    assert written == ["0", "0.123", "12.3", "123", "1234", "12.3k", "2.5M", "2e-6", "-0.5", "–", "–"]


def test_axis_range_ignores_single_spikes() -> None:
    calm = tuple(1.0 + 0.1 * (i % 5) for i in range(100))
    steps = tuple(range(100))
    low, high, remark = value_range([Series("x", steps, calm)])
    assert low < 1.0 < 1.4 < high < 1.6 and remark == ""
    low, high, remark = value_range([Series("x", steps, (*calm[:-1], 1e4))])
    assert high < 2 and "highest value 10k" in remark
    low, high, _ = value_range([Series("x", (1, 2), (0.7, 0.7))])
    assert low < 0.7 < high
    assert value_range([Series("x", (1,), (math.nan,))])[:2] == (0.0, 1.0)


def test_non_finite_values_leave_a_gap_in_a_curve() -> None:
    svg = curve_chart("t", "h", [Series("x", (1, 2, 3, 4), (1.0, 2.0, math.inf, 4.0))])
    # The first path of that class is the swatch of the legend.
    _, path = re.findall(r'class="l1" d="([^"]*)"', svg)
    assert path.count("M") == 2 and path.count("L") == 1
    assert "1 value was not finite" in svg


def test_stacked_shares() -> None:
    parts = [Series("rollout", (1, 2), (3.0, 3.0)), Series("policy", (1, 2), (1.0, 1.0))]
    page = Page(stacked_chart("Seconds", "", parts))
    assert "rollout 75%" in page.text and "policy 25%" in page.text


def test_intervals_in_words() -> None:
    entry = {"mean": 0.6213, "low": 0.55, "high": 0.692, "n": 75}
    assert interval(entry) == "62.1 [55.0, 69.2]"
    assert interval({"mean": 0.02, "low": -0.01, "high": 0.05}, sign=True) == "+2.0 [−1.0, +5.0]"
    assert interval(None) == interval({"mean": math.nan}) == "–"
    assert verdict({"low": 0.01, "high": 0.2}) == ("up", "above 0")
    assert verdict({"low": -0.2, "high": -0.01}) == ("down", "below 0")
    assert verdict({"low": 0.0, "high": 0.2}) == ("same", "contains 0")
    assert verdict({}) == ("same", "no interval")
    assert difference_name("stage2-stage1", {"stage1": "stage 1", "stage2": "stage 2"}) == "stage 2 − stage 1"


def test_response_markup_by_hand() -> None:
    tag = '<span class="tag">&lt;{}&gt;</span>'.format
    text = "<think>a<b</think><answer>B</answer>"
    assert response_html(text) == (f"{tag('think')}a&lt;b{tag('/think')}{tag('answer')}<b>B</b>{tag('/answer')}")
    assert visible("a\x00\ud800\tb\r\n<") == "a\ufffd\ufffd\tb\n&lt;"
