"""Answer the held-out questions with the students of a run, between its stages and during stage 2 and its control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from rmsd_fast.models.students import Student
from rmsd_fast.runtime.process_group import on_main
from rmsd_fast.setting_rules.uses import uses_discriminator
from rmsd_fast.stages.answer_store import AnswerStore, delete_parts
from rmsd_fast.stages.build import load
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_files import (
    predictions_path,
    read_predictions,
    write_evaluation,
    write_predictions,
)
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.progress import describe_progress, interim_name, warn_if_behind
from rmsd_fast.stages.protocol import questions_digest, run_identity
from rmsd_fast.stages.state import StageState

if TYPE_CHECKING:
    from rmsd_fast.stages.run import TrainingRun


def evaluate(run: TrainingRun, path: str, name: str) -> None:
    """Answer the held-out questions with an exported student, once per run, and write the evaluation of the answers."""

    @contextmanager
    def loaded() -> Iterator[Student]:
        yield load(path, run.settings, run.world)

    result, answered = _evaluate(run, name, loaded)
    if result and answered:
        run.metrics.message(format_table(result))
        for line in warn_if_behind(result["differences"], judged=uses_discriminator(run.settings)):
            run.metrics.message(line)


def evaluate_step(run: TrainingRun, stage: str, step: int, state: StageState) -> None:
    """Answer the held-out questions with the student of a stage after some of its steps, once per run."""

    @contextmanager
    def in_training() -> Iterator[Student]:
        with state.policy.full_weights():
            state.policy.module.activate()
            yield state.student

    result, answered = _evaluate(run, interim_name(stage, step), in_training)
    # The counts of the next step must not include the media of the evaluation. Those of the loader's own reads in the
    # meantime are lost.
    run.media.take_counts()
    if result and answered:
        for line in describe_progress(result["progress"], stage, step, judged=uses_discriminator(run.settings)):
            run.metrics.message(line)


def is_due(run: TrainingRun, stage: str, step: int) -> bool:
    """Return whether the student is evaluated after this many steps of a stage, before its last step."""
    every = run.settings.evaluate.every_steps
    interim = stage in ("distill", "control") and 0 < step < run.settings.distill.steps
    return bool(interim and every and step % every == 0 and run.material.heldout)


def _evaluate(
    run: TrainingRun, name: str, open_student: Callable[[], AbstractContextManager[Student]]
) -> tuple[dict | None, bool]:
    """Return the evaluation, on the main process only, and whether the questions were answered just now."""
    questions = run.material.heldout
    run.stop.check()
    if not questions:
        return None, False
    settings, world = run.settings, run.world
    answered = on_main(world, lambda: read_predictions(run.folder, name, questions, settings) is None)
    records: list[dict] = []
    path = predictions_path(run.folder, name)
    if answered:
        identity = {**run_identity(settings, name), "questions": questions_digest(questions)}
        # With --allow-changes, a resumed run may have other settings.
        with AnswerStore(path, identity, world, discard=True) as store, open_student() as student:
            records = answer_questions(
                student, questions, settings, world, run.media, name=name, stop=run.stop, store=store
            )
    result = None

    def write() -> None:
        nonlocal result
        if answered:
            write_predictions(run.folder, name, records)
        # Write it even if the answers already existed, because the run may have been killed between the two writes.
        result = write_evaluation(run.folder, questions, settings, simulated=run.material.simulated)

    on_main(world, write)
    # Delete them even if the answers already existed, for the same reason.
    delete_parts(path, world)
    return result, answered
