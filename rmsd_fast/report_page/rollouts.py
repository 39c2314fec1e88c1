"""Render the rollouts of some logged steps: each question with its teacher answers and its rollouts.

Like samples.jsonl, rollouts.jsonl contains text of models and data files, which is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmsd_fast.report_page.curves import STAGE_TITLES
from rmsd_fast.report_page.films import Films
from rmsd_fast.report_page.marks import TRUTH, response_mark, truth_mark
from rmsd_fast.report_page.samples import film_strip, is_number, question_html, response_html
from rmsd_fast.report_page.svg import number
from rmsd_fast.report_page.text import visible

# Maximum number of questions per step; a run may log more.
QUESTIONS_SHOWN = 4
TEACHER_COLOR, STUDENT_COLOR = 1, 2
# Names of record fields on the page.
_NAMES = {"quality": "q", "d_score": "D", "log_ratio": "k1"}
_COLORS = {TRUTH: "ground truth", str(TEACHER_COLOR): "teacher answers", str(STUDENT_COLOR): "rollouts"}


def rollouts_section(rows: Sequence[Mapping[str, Any]], films: Films) -> str:
    """Return cards of the first, the middle and the last logged step of each stage.

    Args:
        rows: lines of rollouts.jsonl, checked by `run_folder`.
        films: reads the media.
    """
    head = '<h2 id="rollouts">Rollouts while training</h2>'
    stages: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], {}).setdefault(row["step"], []).append(row)
    if not stages:
        return f'{head}<p class="muted">No rollouts were logged (no rollouts.jsonl).</p>'
    out = [
        head,
        '<p class="muted">Questions of the first, a middle and the last logged step of each stage, with the teacher '
        "answers T and the rollouts R, best first. Equal answers share a card. q = quality, p = matching probability, "
        "D = discriminator score before the step. With token credit, tokens with positive advantages are green, and "
        "those with negative ones red. All logged steps are in rollouts.jsonl.</p>",
    ]
    for stage, steps in stages.items():
        out.append(f"<h3>{visible(STAGE_TITLES.get(stage, stage))}</h3>")
        numbers = sorted(steps)
        shown = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
        for step in shown:
            cards = [_card(row, films) for row in steps[step][:QUESTIONS_SHOWN]]
            more = len(steps[step]) - len(cards)
            tail = f'<p class="muted">{more} more questions of this step are in rollouts.jsonl.</p>' if more else ""
            unfolded = " open" if step == shown[-1] else ""
            out.append(f"<details{unfolded}><summary>Step {step}</summary>{''.join(cards)}{tail}</details>")
    return "".join(out)


def _card(row: Mapping[str, Any], films: Films) -> str:
    task = str(row.get("task_type", ""))
    teacher = [(f"T{answer.get('k', '?')}", answer) for answer in row["teacher"]]
    rollouts = [(f"R{index}", rollout) for index, rollout in enumerate(row["rollouts"])]
    rollouts.sort(key=lambda named: _rank(named[1]), reverse=True)
    marks = truth_mark(task, row.get("answer"))
    for color, side in ((TEACHER_COLOR, teacher), (STUDENT_COLOR, rollouts)):
        for name, response in side:
            marks += response_mark(name, color, task, response.get("text"))
    teacher_cards = _answers([(name, _teacher_answer(answer)) for name, answer in teacher])
    rollout_cards = _answers([(name, _rollout(rollout)) for name, rollout in rollouts])
    return (
        f'<article class="card sample"><div><span class="badge">{visible(task)}</span>'
        f'<span class="muted small">{visible(row.get("id", ""))}</span></div>'
        f"{film_strip(row, marks, _COLORS, films)}{question_html(row)}"
        f"<h4>Teacher answers</h4>{teacher_cards}<h4>Rollouts</h4>{rollout_cards}</article>"
    )


def _rank(rollout: Mapping[str, Any]) -> float:
    """Return the sort key of a rollout: its advantage, or, in the warm-up, its discriminator score."""
    for key in ("advantage", "d_score"):
        if is_number(rollout.get(key)):
            return rollout[key]
    return -math.inf


@dataclass(frozen=True)
class _Answer:
    """The content of a card. Except for `text`, all fields are HTML. `kind` is the CSS class of the card's edge, and
    `credit` the text colored by the credit of its tokens, or ""."""

    kind: str
    facts: str
    details: str
    text: str
    credit: str = ""


def _teacher_answer(answer: Mapping[str, Any]) -> _Answer:
    # Responses with a quality below tau are not matched with rollouts.
    unused = answer.get("p") == 0
    facts = f"{_facts(answer, 'quality')} · not used" if unused else _facts(answer, "quality", "p", "d_score")
    return _Answer("unused" if unused else "", facts, "", str(answer.get("text") or ""))


def _rollout(rollout: Mapping[str, Any]) -> _Answer:
    advantage = rollout.get("advantage")
    kind = ("good" if advantage > 0 else "bad" if advantage < 0 else "") if is_number(advantage) else ""
    details = _facts(rollout, "reward", "outer", "task", "content", "log_ratio", "tokens")
    if rollout.get("truncated") is True:
        details += " · cut"
    if "match" in rollout:
        details += f" · matched with T{visible(rollout['match'])}"
    credit = token_credit_html(rollout.get("token_credit"))
    return _Answer(kind, _facts(rollout, "advantage", "d_score"), details, str(rollout.get("text") or ""), credit)


def token_credit_html(credit: Any) -> str:
    """Return the text of a rollout with a background for each token: green = its advantage is positive, red = negative.

    The strength is the size of the advantage as a share of the rollout's largest. Return "" without credit, or if it is
    damaged.

    Args:
        credit: `token_credit` of a rollout in rollouts.jsonl: pairs of text and advantage.
    """
    pairs = credit if isinstance(credit, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 and is_number(pair[1]) for pair in pairs):
        return ""
    largest = max((abs(value) for _, value in pairs), default=0.0)
    out = []
    for text, value in pairs:
        # A twentieth of the largest advantage, and more, gets a color.
        level = math.ceil(4 * abs(value) / largest - 0.2) if largest else 0
        side = "up" if value > 0 else "down"
        tip = f"{value:.3g}".replace("-", "−")
        out.append(f'<span class="{side}{level}" title="{tip}">{visible(text)}</span>' if level else visible(text))
    return "".join(out)


def _facts(record: Mapping[str, Any], *keys: str) -> str:
    """Return name and value of the numeric fields. The warm-up has no rewards, and a run without D has no scores."""
    present = [key for key in keys if is_number(record.get(key))]
    return " · ".join(f"{_NAMES.get(key, key)} {number(record[key]).replace('-', '−')}" for key in present)


def _answers(named: Sequence[tuple[str, _Answer]]) -> str:
    """Return one card per distinct answer, in order, with the names of all responses that gave it."""
    names: dict[_Answer, list[str]] = {}
    for name, answer in named:
        names.setdefault(answer, []).append(name)
    cards = []
    for answer, agreeing in names.items():
        head = f"<b>{visible(', '.join(agreeing))}</b><span>{answer.facts}</span>"
        text = answer.credit or response_html(answer.text) or "(empty)"
        cards.append(
            f'<div class="answer {answer.kind}"><header>{head}</header><p class="hint">{answer.details}</p>'
            f'<pre class="text">{text}</pre></div>'
        )
    return f'<div class="answers short">{"".join(cards) or "none"}</div>'
