"""Read the hints of a run for its self-teacher, and check that there are enough of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence

from rmsd_fast.config import MEDIA_VIEW, RunConfig, SettingsError
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.prompts import HintError, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.method.hints import Hint
from rmsd_fast.runtime.process_group import World, on_main
from rmsd_fast.setting_rules.uses import (
    always_scored,
    asks_judge,
    question_views,
    rewards_rollouts,
    shows_media,
    together,
)
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
    missing: Collection[str],
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
        missing: result of `missing_hint_media`.
        apart: whether each view is a hint of its own, as stage 1 shows them to the student.
    Raises:
        SettingsError: no question has any of `self_teacher.views`, or, if no reward has a weight, more than
            `data.max_bad_share` of the questions have none.
        DataError: more than `data.max_bad_share` of the hints cannot be used, or the self-teacher cannot know to which
            clock the times of a hint or a response refer.
    """
    teacher, views = settings.self_teacher, question_views(settings)
    for question in inputs.train:
        if not builder.states_times:
            _refuse_late(question, views)
        _refuse_other_clock(question, settings, states_times=builder.states_times)
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
        gone = [path for path in _hint_media(question) if path in missing]
        if gone:
            refused.setdefault("missing_media", []).append(f"{gone[0]} does not exist; check data.media_root")
        return bool(gone)

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


def missing_hint_media(inputs: Inputs, settings: RunConfig, world: World) -> frozenset[str]:
    """Return the files of `hints.media` that do not exist, if a self-teacher may be shown them.

    All processes call it together. The main one looks, so that all have the same hints.
    """
    if not shows_media(settings):
        return frozenset()
    return on_main(world, lambda: _missing(inputs))


def _missing(inputs: Inputs) -> frozenset[str]:
    paths = {path for question in inputs.train for path in _hint_media(question)}
    return frozenset(path for path in paths if not os.path.exists(path))


def plan_hints(inputs: Inputs, settings: RunConfig) -> str:
    """Return a line about the hints of the inputs, of which no text has been tokenized.

    Raises:
        SettingsError: too few questions have hints, as in `read_hints`.
        DataError: the self-teacher would be shown other media than those to which times refer.
    """
    for question in inputs.train:
        # The run finds out whether prompts of the student state times.
        _refuse_other_clock(question, settings, states_times=True)
    missing = _missing(inputs) if shows_media(settings) else frozenset()

    def absent(question: Question) -> bool:
        return not missing.isdisjoint(_hint_media(question))

    shown = [question for question in inputs.train if _hint_media(question)]
    lost = sum(map(absent, shown))
    if lost > settings.data.max_bad_share * len(shown):
        raise DataError(
            f"hints: the files of hints.media of {lost:,} of {counted(len(shown), 'question')} do not exist, first "
            f"{min(missing)}; check data.media_root, or raise data.max_bad_share"
        )
    targets = build_targets(
        *(inputs.train, inputs.scores, settings.teacher, lambda text: None),
        seed=settings.seed,
        imitate=settings.sft.responses,
    )
    views = question_views(settings)
    hints = build_hints(
        *(inputs.train, targets, views, lambda text: False, absent),
        together=together(settings),
        seed=settings.seed,
    )
    line, few = describe_hints(hints, settings)
    number = count_views(inputs.train, targets, views, settings, absent)
    counts = ", ".join(f"{view} {count:,}" for view, count in number.items())
    return f"{'WARNING: ' * few}{line} ({counts}; none was tokenized)" if counts else line


def count_views(
    questions: Sequence[Question],
    targets: Mapping[str, Targets],
    views: Sequence[str],
    settings: RunConfig,
    absent: Callable[[Question], bool],
) -> dict[str, int]:
    """Return the number of questions that have each view. See `build_hints` for the arguments."""
    counts = {}
    for view in views:
        hints = build_hints(questions, targets, [view], lambda text: False, absent, together=True, seed=settings.seed)
        counts[view] = sum(map(bool, hints.values()))
    return counts


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
        todo = "add their hints to data.train"
        if "best_answer" in views:
            todo = "collect more answers, or lower teacher.min_quality, so that they have a best answer"
        raise SettingsError(
            f"self_teacher.views: expected at most {most:g} of the training questions (data.max_bad_share) without a "
            "hint if no reward has a weight, since nothing is learned from them, got "
            f"{without:,} of {len(hints):,} without any of {views}, first {first!r}; {todo}, remove these questions, "
            "or raise data.max_bad_share"
        )
    line = f"self-teacher: {hinted:,} of {counted(len(hints), 'question')} have hints{judged}"
    return line, not always_scored(settings) and without > most * len(hints)


def _hint_media(question: Question) -> list[str]:
    """Return the files of `hints.media`."""
    shown = question.hints.get(MEDIA_VIEW) or {}
    return [path for name in ("videos", "images") for path in shown.get(name, ())]


def _refuse_other_clock(question: Question, settings: RunConfig, *, states_times: bool) -> None:
    """Raise DataError for times of the student's video if the self-teacher is shown other media.

    These are times in hints that it reads together with the media, and in responses to a temporal question.
    """
    views = question_views(settings)
    if not shows_media(settings) or MEDIA_VIEW not in question.hints:
        return
    videos = question.hints[MEDIA_VIEW]["videos"]
    if states_times and videos and set(videos) <= set(question.videos):
        return
    why = "since the self-teacher is shown other media, whose times differ or are not stated"
    what = "or show parts of the same videos to a Qwen3-VL"
    timed = [view for view in ("window", "keyframes") if view in views and view in question.hints]
    if timed and together(settings):
        raise DataError(
            f"hints of question {question.id!r}: expected no {' and '.join(timed)} next to hints.media, {why}, got "
            f"times; leave {timed[0]} or media out of self_teacher.views, {what}"
        )
    if question.task_type == "temporal":
        raise DataError(
            f"hints of question {question.id!r}: expected no hints.media for a temporal question, {why}, and it scores "
            f"the times in responses, got media; remove them, leave media out of self_teacher.views, {what}"
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
