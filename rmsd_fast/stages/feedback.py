"""Give each rollout of stage 2 its hints for the self-teacher: those of its question, and a judge's feedback on it.

The judge is asked for advice about every rollout, without its media. VISD (arXiv 2605.06094) does so with structured
feedback; the prompts here are in our own words.
"""

from __future__ import annotations

from collections.abc import Sequence

from rmsd_fast.data.marks import MARK
from rmsd_fast.data.prompts import HintError
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import bare_options
from rmsd_fast.method.hints import Hint, view_text, with_advice, without_media
from rmsd_fast.setting_rules.uses import asks_judge, teaches, together
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_metrics import Metric, mean
from rmsd_fast.teacher.hints import stated_answer

_SYSTEM = (
    "You advise a model that answers questions about videos and images. You are shown a question and one response of "
    "the model, and the correct answer if it is known. You do not see the video or the image."
)
_REQUEST = (
    "Question:\n{question}\n\n{truth}Response of the model:\n{response}\n\nWrite advice to the model about this "
    "response, in at most three sentences of plain text. Name the first step that is wrong or not supported, and what "
    "to look at or to think through instead. If the response is right, say which step matters most. Reply with the "
    "advice alone."
)


def set_hints(state: StageState, groups: list[RolloutGroup], *, step: int) -> dict[str, Metric]:
    """Store the hints of each rollout in the groups, and return this process's part of the metrics.

    The media of a hint that could not be read are left out. A teacher with weights of its own also scores a rollout
    without hints. A judge's reply that cannot be a hint leaves its rollout without feedback.

    Args:
        state: state of the stage. All processes ask its judge together.
        groups: groups of this process.
        step: step within stage 2, counted from 0.
    """
    settings = state.settings
    if not teaches(settings, step):
        return {"self_teacher/feedback_share": (mean, 0.0, 0)} if asks_judge(settings) else {}
    advice: list[str | None] = []
    if state.judge is not None:
        with state.timer("feedback"):
            advice = state.judge([(g.prompt.question, rollout.text) for g in groups for rollout in g.rollouts])
    replies, usable = iter(advice), 0
    plain = [Hint("")] if settings.self_teacher.kind == "path" else []
    for group in groups:
        hints, group.hints = state.hints.get(group.prompt.question.id, ()), []
        if group.prompt.teacher is None:
            hints = without_media(hints)
        for _ in group.rollouts:
            advised = _advised(state, hints, next(replies, None))
            usable += advised is not None
            group.hints.append((list(hints) if advised is None else advised) or plain)
    return {"self_teacher/feedback_share": (mean, usable, len(advice))} if asks_judge(settings) else {}


def _advised(state: StageState, hints: Sequence[Hint], reply: str | None) -> list[Hint] | None:
    """Return the hints of a question with a judge's reply, or None if the self-teacher cannot read it."""
    if reply is None:
        return None
    most = state.settings.self_teacher.max_hint_tokens
    advised = with_advice(hints, view_text("feedback", {"feedback": reply}), together=together(state.settings))
    try:
        state.builder.check_hint(advised[-1].text, max_tokens=most)
    except HintError:
        return None
    return advised


def feedback_messages(question: Question, response: str) -> list[dict[str, str]]:
    """Return the messages that ask a judge for advice about a response to a question."""
    options = bare_options(question.options) if question.options else []
    lines = [MARK.sub("", question.question).strip()]
    lines += [f"{chr(ord('A') + number)}. {MARK.sub('', option)}" for number, option in enumerate(options)]
    truth = "" if question.answer is None else f"Correct answer: {stated_answer(question)}\n\n"
    text = _REQUEST.format(question="\n".join(lines), truth=truth, response=response.strip())
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]


def read_feedback(text: str, finish_reason: str | None) -> str | None:
    """Return the advice in a judge's reply, without its reasoning; None if there is none or if it was cut off."""
    advice = text.rpartition("</think>")[2].strip()
    return advice if advice and finish_reason != "length" else None
