"""Read the hints of a run for its self-teacher, and check that there are enough of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.prompts import HintError, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.method.hints import Hint
from rmsd_fast.runtime.process_group import World
from rmsd_fast.setting_rules.uses import asks_judge, question_views, rewards_rollouts
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
    apart: bool = False,
) -> dict[str, tuple[Hint, ...]]:
    """Return what the self-teacher is told about each training question. A judge's feedback is not part of it.

    Args:
        inputs: the training questions.
        builder: builder of the student's prompts.
        targets: the pool's answers to the questions, by id.
        settings: settings of the run.
        world: this process in the run.
        apart: whether each view is a hint of its own, as stage 1 shows them to the student.
    Raises:
        SettingsError: no question has any of `self_teacher.views`, or, if no reward has a weight, more than
            `data.max_bad_share` of the questions have none.
        DataError: more than `data.max_bad_share` of the hints cannot be used, or the self-teacher cannot know to which
            clock their times refer.
    """
    teacher, views = settings.self_teacher, question_views(settings)
    for question in inputs.train:
        if not builder.states_times:
            _refuse_late(question, views)
        if together(settings):
            _refuse_other_clock(question, views, states_times=builder.states_times)
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

    def absent(question: Question) -> bool:
        nonlocal asked
        asked += 1
        if missing := _absent_media(question):
            refused.setdefault("missing_media", []).append(f"{missing[0]} does not exist; check data.media_root")
        return bool(missing)

    hints = build_hints(
        *(inputs.train, targets, views, refuse, absent), together=together(settings) and not apart, seed=settings.seed
    )
    if apart and not any(hint.text for told in hints.values() for hint in told):
        raise SettingsError(
            "sft.hinted_share: expected training questions with a hint that has a text, got none with any of "
            f"{views}; add the field hints to data.train, or set sft.hinted_share=0"
        )
    number = sum(map(len, refused.values()))
    if number > settings.data.max_bad_share * asked:
        reasons = ", ".join(f"{reason} {len(faults):,}" for reason, faults in refused.items())
        most = max(refused, key=lambda reason: len(refused[reason]))
        raise DataError(
            f"hints: {number:,} of {counted(asked, 'hint')} for the self-teacher cannot be used: {reasons}, first: "
            f"{refused[most][0]}; or raise data.max_bad_share"
        )
    line, few = describe_hints(hints, settings)
    if world.is_main:
        left_out = f", {counted(number, 'hint')} left out" if number else ""
        log.log(logging.WARNING if few else logging.INFO, "%s%s", line, left_out)
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
    views = question_views(settings)
    hints = build_hints(
        *(inputs.train, targets, views, lambda text: False, lambda question: bool(_absent_media(question))),
        together=together(settings),
        seed=settings.seed,
    )
    line, few = describe_hints(hints, settings)
    number = count_views(inputs.train, targets, views, settings)
    counts = ", ".join(f"{view} {count:,}" for view, count in number.items())
    return f"{'WARNING: ' * few}{line} ({counts}; none was tokenized)" if counts else line


def count_views(
    questions: Sequence[Question], targets: Mapping[str, Targets], views: Sequence[str], settings: RunConfig
) -> dict[str, int]:
    """Return the number of questions that have each view."""
    counts = {}
    for view in views:
        hints = build_hints(
            *(questions, targets, [view], lambda text: False, lambda question: bool(_absent_media(question))),
            together=True,
            seed=settings.seed,
        )
        counts[view] = sum(map(bool, hints.values()))
    return counts


def together(settings: RunConfig) -> bool:
    """Return whether one self-teacher reads all views."""
    return settings.kd.kind != "avsd"


def always_scored(settings: RunConfig) -> bool:
    """Return whether the self-teacher also scores rollouts of questions without hints, or all rollouts get feedback."""
    return settings.self_teacher.kind == "path" or asks_judge(settings)


def describe_hints(hints: Mapping[str, tuple[Hint, ...]], settings: RunConfig) -> tuple[str, bool]:
    """Return a line that says how many questions have hints, and whether that is too few to be intended.

    Raises:
        SettingsError: no question has any, or, if no reward has a weight, too many have none.
    """
    hinted, views = sum(map(bool, hints.values())), question_views(settings)
    without = len(hints) - hinted
    judged = ", and a judge writes feedback" if asks_judge(settings) else ""
    if not hinted and views:
        raise SettingsError(
            f"self_teacher.views: expected hints that the training questions have, got {views}, of which no "
            "question has any; add the field hints to data.train, or set self_teacher.views=[answer]"
        )
    most = settings.data.max_bad_share
    learns = rewards_rollouts(settings) or always_scored(settings) or "distill" not in settings.stages
    if not learns and without > most * len(hints):
        first = next(name for name, told in hints.items() if not told)
        raise SettingsError(
            f"self_teacher.views: expected at most {most:g} of the training questions (data.max_bad_share) without a "
            "hint if no reward has a weight, since nothing is learned from them, got "
            f"{without:,} of {len(hints):,} without any of {views}, first {first!r}; remove these questions, add their "
            "hints to data.train, or raise data.max_bad_share"
        )
    line = f"self-teacher: {hinted:,} of {counted(len(hints), 'question')} have hints{judged}"
    return line, not always_scored(settings) and without > most * len(hints)


def _absent_media(question: Question) -> list[str]:
    """Return the files of `hints.media` that do not exist."""
    shown = question.hints.get("media") or {}
    return [path for name in ("videos", "images") for path in shown.get(name, ()) if not os.path.exists(path)]


def _refuse_other_clock(question: Question, views: list[str], *, states_times: bool) -> None:
    """Raise DataError for times of the student's video if the self-teacher is shown other media."""
    timed = [view for view in ("window", "keyframes") if view in views and view in question.hints]
    if not timed or "media" not in views or "media" not in question.hints:
        return
    videos = question.hints["media"]["videos"]
    if not states_times or not videos or not set(videos) <= set(question.videos):
        raise DataError(
            f"hints of question {question.id!r}: expected no {' and '.join(timed)} next to hints.media, since the "
            "self-teacher is shown other media, whose times differ or are not stated, got times; leave "
            f"{timed[0]} or media out of self_teacher.views, or show parts of the same videos to a Qwen3-VL"
        )


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
