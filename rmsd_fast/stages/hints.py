"""Read the hints of a run for its self-teacher, and check that there are enough of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.prompts import HintError, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.runtime.process_group import World
from rmsd_fast.setting_rules.uses import rewards_rollouts
from rmsd_fast.stages.inputs import Inputs
from rmsd_fast.teacher.hints import build_hints
from rmsd_fast.teacher.targets import Targets, build_targets

log = logging.getLogger("rmsd_fast")


def read_hints(
    inputs: Inputs,
    builder: PromptBuilder,
    targets: Mapping[str, Targets],
    settings: RunConfig,
    world: World,
    *,
    together: bool,
) -> dict[str, tuple[str, ...]]:
    """Return the texts that the self-teacher is told about each training question.

    Args:
        inputs: the training questions.
        builder: builder of the student's prompts.
        targets: the pool's answers to the questions, by id.
        settings: settings of the run.
        world: this process in the run.
        together: whether all views of a question are one text.
    Raises:
        SettingsError: no question has any of `self_teacher.views`, or, if no reward has a weight, more than
            `data.max_bad_share` of the questions have none.
        DataError: more than `data.max_bad_share` of the hints cannot be used, or the student cannot know to which clock
            their times refer.
    """
    teacher = settings.self_teacher
    if not builder.states_times:
        for question in inputs.train:
            _refuse_late(question, teacher.views)
    refused: dict[str, list[str]] = {}
    asked = 0

    def refuse(text: str) -> bool:
        nonlocal asked
        asked += 1
        try:
            builder.check_hint(text, max_tokens=teacher.max_hint_tokens)
        except HintError as error:
            refused.setdefault(error.reason, []).append(str(error))
            return True
        return False

    hints = build_hints(inputs.train, targets, teacher.views, refuse, together=together, seed=settings.seed)
    number = sum(map(len, refused.values()))
    if number > settings.data.max_bad_share * asked:
        reasons = ", ".join(f"{reason} {len(faults):,}" for reason, faults in refused.items())
        most = max(refused, key=lambda reason: len(refused[reason]))
        raise DataError(
            f"hints: {number:,} of {counted(asked, 'hint')} for the self-teacher cannot be used: {reasons}, first: "
            f"{refused[most][0]}; or raise data.max_bad_share"
        )
    line = describe_hints(hints, settings)
    if world.is_main:
        left_out = f", {counted(number, 'hint')} left out" if number else ""
        without = sum(not texts for texts in hints.values())
        level = logging.WARNING if without > settings.data.max_bad_share * len(hints) else logging.INFO
        log.log(level, "%s%s", line, left_out)
    return hints


def plan_hints(inputs: Inputs, settings: RunConfig) -> str:
    """Return a line about the hints of the inputs, of which no text has been tokenized.

    Raises:
        SettingsError: too few questions have hints, as in `read_hints`.
    """
    targets = build_targets(
        *(inputs.train, inputs.scores, settings.teacher, lambda text: None),
        seed=settings.seed,
        imitate=settings.sft.responses,
    )
    together, views = settings.kd.kind != "avsd", settings.self_teacher.views
    hints = build_hints(inputs.train, targets, views, lambda text: False, together=together, seed=settings.seed)
    return describe_hints(hints, settings)


def describe_hints(hints: Mapping[str, tuple[str, ...]], settings: RunConfig) -> str:
    """Return a line that says how many questions have hints.

    Raises:
        SettingsError: no question has any, or, if no reward has a weight, too many have none.
    """
    hinted, views = sum(map(bool, hints.values())), settings.self_teacher.views
    without = len(hints) - hinted
    if not hinted:
        raise SettingsError(
            f"self_teacher.views: expected hints that the training questions have, got {views}, of which no "
            "question has any; add the field hints to data.train, or set self_teacher.views=[answer]"
        )
    most = settings.data.max_bad_share
    if "distill" in settings.stages and not rewards_rollouts(settings) and without > most * len(hints):
        first = next(name for name, texts in hints.items() if not texts)
        raise SettingsError(
            f"self_teacher.views: expected at most {most:g} of the training questions (data.max_bad_share) without a "
            "hint if no reward has a weight, since nothing is learned from them, got "
            f"{without:,} of {len(hints):,} without any of {views}, first {first!r}; remove these questions, add their "
            "hints to data.train, or raise data.max_bad_share"
        )
    return f"self-teacher: {hinted:,} of {counted(len(hints), 'question')} have hints"


def _refuse_late(question: Question, views: list[str]) -> None:
    """Raise DataError for times of a part that starts late, for a student that counts them from the first frame."""
    timed = [view for view in ("window", "keyframes") if view in views and view in question.hints]
    late = max((span[0] or 0.0 for span in question.spans if span), default=0.0)
    if timed and late:
        raise DataError(
            f"hints of question {question.id!r}: expected no {' and '.join(timed)}, since the part shown starts at "
            f"{late:g} s of the file and prompts of this student state no times, got times; cut the part into a file "
            f"of its own with times from 0, leave {timed[0]} out of self_teacher.views, or use a Qwen3-VL"
        )
