"""Answer held-out questions with a student, greedily and, with `evaluate.rollouts`, by sampling."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from tqdm import tqdm

from rmsd_fast.config import RunConfig
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import GRADED_TASKS
from rmsd_fast.models.students import Student
from rmsd_fast.rollout.base import Rollout, Sampling
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.process_group import World, all_gather_objects
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.answer_records import (
    NOT_FINITE,
    answer_record,
    clusters_of,
    reason_of,
    with_samples,
    without_samples,
)
from rmsd_fast.stages.answer_store import AnswerStore
from rmsd_fast.stages.evaluation_batches import plan_batches, spread
from rmsd_fast.stages.evaluation_forecast import forecast_line, time_batch
from rmsd_fast.stages.protocol import video_of
from rmsd_fast.stages.reranker import Reranker
from rmsd_fast.stages.summaries import count_unusable

log = logging.getLogger("rmsd_fast")
# Batches that are timed for the forecasts.
_TIMED_BATCHES = 4


def answer_questions(
    student: Student,
    questions: list[Question],
    settings: RunConfig,
    world: World,
    media: MediaReader | None = None,
    *,
    name: str,
    stop: StopSignal | None = None,
    store: AnswerStore | None = None,
    engine: AnswerEngine | None = None,
    reranker: Reranker | None = None,
    forecast: bool = False,
) -> list[dict]:
    """Return a student's answers, one record per question, as the same list on every process.

    A record has the greedy answer and, with `evaluate.rollouts`, the scores of as many sampled ones; see
    `stages.answer_records`.

    Every process holds the whole model and answers its share of the batches, while the media of the next batch are
    decoded. Questions about the same media are in the same batch where they fit, because they are then decoded, encoded
    and prefilled together. A question is recorded with `error` and scored 0 if its media cannot be used, its prompt is
    too long, or the student's logits are not finite.

    Args:
        student: the student to evaluate.
        questions: questions to answer.
        settings: settings of the run.
        world: this process in the run.
        media: reader of the videos and images.
        name: name of the student for messages.
        stop: stop signal, checked between batches.
        store: keeps the answers of each batch, and has those of an interrupted evaluation.
        engine: generates the answers; None = the student's model does.
        reranker: scores the sampled responses to closed questions, if given.
        forecast: whether to print how long the rest will take, after the second batch and again after the fourth. These
            batches are then spread over the questions, because long videos may be together in a file.
    Raises:
        Stopped: the program was asked to end.
    """
    answering = Answering(student, settings, world, media, clusters_of(questions), engine=engine, reranker=reranker)
    # Batches do not depend on what is answered already, so that rounding gives the same answers after a kill.
    done = store.done if store is not None else {}
    batches = plan_batches(questions, settings.evaluate.prompts_per_batch, world.size)
    open_batches = [batch for batch in batches if any(question.id not in done for question in batch)]
    share = open_batches[world.rank :: world.size]
    if forecast:
        sample = spread(share, _TIMED_BATCHES)
        share = [*sample, *(batch for batch in share if not any(batch is timed for timed in sample))]
    clock = _Clock(share, world) if forecast and world.is_main else None
    records: list[dict] = []
    # Without a terminal, print one line every ten seconds to show that a long evaluation makes progress.
    live = sys.stderr.isatty()
    with tqdm(
        total=sum(map(len, share)),
        desc=f"evaluate {name}",
        unit="question",
        disable=not world.is_main,
        mininterval=0.1 if live else 10,
        leave=True,
    ) as progress:
        for batch in answering.prompts_ahead(share):
            if stop is not None:
                stop.check()
            answered = answering.answer(batch)
            if store is not None:
                store.append(answered)
            records += answered
            progress.update(len(batch))
            if clock is not None and (line := clock.answered()):
                progress.write(line, file=sys.stderr)
    by_id = {record["id"]: record for part in all_gather_objects(records, world) for record in part} | done
    everything = [by_id[question.id] for question in questions]
    if world.is_main:
        _warn_of_unusable(everything, name)
    return everything


def time_questions(
    student: Student,
    questions: list[Question],
    settings: RunConfig,
    world: World,
    media: MediaReader,
    *,
    engine: AnswerEngine | None = None,
    reranker: Reranker | None = None,
) -> str:
    """Answer a batch per process, drop the answers, and return a line about the time of all questions.

    The batches are those of the evaluation, spread over the questions. A question about other media, if there is one,
    is answered before, so that kernels are compiled and no frame of the batch is cached. The arguments are those of
    `answer_questions`.
    """
    answering = Answering(student, settings, world, media, clusters_of(questions), engine=engine, reranker=reranker)
    batches = plan_batches(questions, settings.evaluate.prompts_per_batch, world.size)
    timed = spread(batches, world.size)
    # There may be fewer batches than processes, all of which take part.
    batch = timed[world.rank % len(timed)]
    shown = {medium for question in batch for medium in question.media}
    ids = {question.id for question in batch}
    for question in questions:
        if question.id not in ids and shown.isdisjoint(question.media):
            (prompts,) = answering.prompts_ahead([[question]])
            answering.answer(prompts)
            break
    measured = time_batch(answering, batch, world, questions=sum(map(len, timed)))
    return forecast_line(measured.seconds_per_question(world.device), len(questions), measured.questions)


class _Clock:
    """Time the first batches of an evaluation on the main process.

    Args:
        batches: the batches of this process.
        world: this process in the run.
    """

    def __init__(self, batches: list[list[Question]], world: World) -> None:
        self._sizes, self._world = [len(batch) for batch in batches], world
        self._done, self._first_end = 0, 0.0

    def answered(self) -> str:
        """Note that a batch is answered, and return a line about the time of the rest, or ""."""
        now = time.perf_counter()
        self._done += 1
        if self._done == 1:
            # The first batch includes the compilation of kernels.
            self._first_end = now
        if self._done not in (2, _TIMED_BATCHES):
            return ""
        measured = sum(self._sizes[1 : self._done])
        each = (now - self._first_end) / measured
        left = sum(self._sizes[self._done :])
        # All processes answer as many questions in this time.
        size = self._world.size
        return forecast_line(each / size, left * size, measured * size) if left else ""


# The greedy response to each prompt, in a list of its own, and the sampled ones; None if none were asked for.
Answers = tuple[list[list[Rollout]], list[list[Rollout]] | None]


class AnswerEngine(Protocol):
    """Generate the answers of an evaluation."""

    def answer(self, prompts: list[Prompt], greedy: Sampling, sampled: Sampling | None = None) -> Answers:
        """Return the responses to each prompt.

        Args:
            prompts: the prompts of a batch.
            greedy: parameters of greedy decoding, with n = 1.
            sampled: parameters of the sampled responses, which are drawn besides; None = only greedy ones.
        """


class HfAnswers:
    """Generate answers with the student's model.

    Args:
        student: the student.
        builder: builder of the prompts.
        settings: settings of the run.
        world: this process in the run.
    """

    def __init__(self, student: Student, builder: PromptBuilder, settings: RunConfig, world: World) -> None:
        self._model, evaluate = student.model, settings.evaluate
        # As many rows at a time for sampled answers as for greedy ones.
        rows = max(1, evaluate.prompts_per_batch // max(1, evaluate.rollouts))
        self._greedy, self._sampler = (
            HfRollout(
                builder,
                prompts_per_batch=batch,
                device=world.device,
                cuda_graphs=settings.rollout.cuda_graphs,
                share_media=True,
                tokens_per_call=settings.micro_tokens,
            )
            for batch in (evaluate.prompts_per_batch, rows)
        )

    def answer(self, prompts: list[Prompt], greedy: Sampling, sampled: Sampling | None = None) -> Answers:
        """Return the responses to each prompt; see `AnswerEngine`."""
        features = self._greedy.encode(self._model, prompts)
        first = self._greedy.generate(self._model, prompts, greedy, features=features)
        if sampled is None:
            return first, None
        return first, self._sampler.generate(self._model, prompts, sampled, features=features)


class Answering:
    """Build the prompts of batches, and answer them with a student.

    Args:
        student: the student.
        settings: settings of the run.
        world: this process in the run.
        media: reader of the videos and images.
        clusters: the cluster of each question by its id.
        engine: see `answer_questions`.
        reranker: see `answer_questions`.
    """

    def __init__(
        self,
        student: Student,
        settings: RunConfig,
        world: World,
        media: MediaReader | None,
        clusters: dict[str, str],
        *,
        engine: AnswerEngine | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        evaluate = settings.evaluate
        self._settings, self._clusters, self._reranker = settings, clusters, reranker
        self._builder = PromptBuilder(student, video_of(settings), media, prompt=evaluate.prompt)
        self._engine = engine or HfAnswers(student, self._builder, settings, world)
        self._greedy = Sampling(n=1, temperature=0.0, max_new_tokens=evaluate.max_new_tokens)
        self._sampled: Sampling | None = None
        if evaluate.rollouts:
            # A response depends on the seed, the question's id and the response's index, and not on the batch.
            self._sampled = Sampling(
                n=evaluate.rollouts,
                temperature=settings.rollout.temperature,
                max_new_tokens=evaluate.max_new_tokens,
                seed=settings.seed,
            )

    def prompts_ahead(self, batches: Sequence[list[Question]]) -> Iterator[list[tuple[Question, Prompt | Exception]]]:
        """Yield the batches, each question with its prompt or an error. The next batch is built in the background."""

        def build(question: Question) -> tuple[Question, Prompt | Exception]:
            try:
                return question, self._builder.build(question, max_tokens=self._settings.data.max_prompt_tokens)
            except (MediaError, PromptError) as error:
                return question, error

        pool = ThreadPoolExecutor(self._settings.data.decode_threads, thread_name_prefix="decode")
        try:
            ahead: list[Future] = []
            for batch in [*batches, []]:
                building, ahead = ahead, [pool.submit(build, question) for question in batch]
                if building:
                    yield [future.result() for future in building]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def answer(self, batch: list[tuple[Question, Prompt | Exception]]) -> list[dict]:
        """Return the records of a batch, those of questions with an error last."""
        prompts = [prompt for _, prompt in batch if isinstance(prompt, Prompt)]
        records = self._answer_prompts(prompts) if prompts else []
        for question, error in batch:
            if not isinstance(error, Prompt):
                reason = reason_of(str(error), of_prompt=isinstance(error, PromptError))
                record = self._record(question, "", error=str(error), reason=reason)
                records.append(without_samples(record, question, self._settings))
        return records

    def _answer_prompts(self, prompts: list[Prompt]) -> list[dict]:
        greedy, sampled = self._engine.answer(prompts, self._greedy, self._sampled)
        records = [
            self._record(
                prompt.question,
                rollout.text,
                truncated=rollout.truncated,
                error="" if rollout.finite else NOT_FINITE,
            )
            for prompt, (rollout,) in zip(prompts, greedy, strict=True)
        ]
        if sampled is None:
            return records
        ranks = self._rank(prompts, sampled)
        return [
            with_samples(record, prompt.question, list(map(_ended, rollouts)), self._settings, ranks.get(number))
            for number, (record, prompt, rollouts) in enumerate(zip(records, prompts, sampled, strict=True))
        ]

    def _rank(self, prompts: list[Prompt], sampled: list[list[Rollout]]) -> dict[int, list[float | None]]:
        """Return the reranker's scores of the responses to each closed question, by the index of the prompt."""
        if self._reranker is None:
            return {}
        closed = [index for index, prompt in enumerate(prompts) if prompt.question.task_type in GRADED_TASKS]
        chosen = [prompts[i] for i in closed], [sampled[i] for i in closed]
        return dict(zip(closed, self._reranker.score(*chosen, self._builder), strict=True))

    def _record(self, question: Question, response: str, **ended) -> dict:
        return answer_record(question, self._clusters[question.id], response, self._settings, **ended)


def _ended(rollout: Rollout) -> tuple[str, bool, bool]:
    return rollout.text, rollout.truncated, rollout.finite


def _warn_of_unusable(records: list[dict], name: str) -> None:
    unusable = count_unusable(records)
    if unusable["count"]:
        log.warning(
            "evaluate %s: %d of %s could not be used and got score 0 (%s); first: %s",
            name,
            unusable["count"],
            counted(len(records), "question"),
            ", ".join(f"{reason} {count}" for reason, count in unusable["reasons"].items()),
            unusable["questions"][0]["error"],
        )
