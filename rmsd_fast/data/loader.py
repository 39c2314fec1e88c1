"""Choose the questions of each step, and decode their prompts ahead of the step.

The order is a function of (seed, stage, epoch). The position in the run is an integer, which is the only state to save.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question

ATTEMPTS = 20
# Id of a question that cannot be used, or of which the hint cannot be used, and the reason.
Fault = tuple[str, str]


class TooManyBadSamples(UserError, RuntimeError):
    """The share of bad samples exceeds `data.max_bad_share`."""


def order_position(n: int, position: int, *, seed: int, stage: str) -> int:
    """Return the index of the question at a position of the endless shuffled stream over n questions."""
    epoch, place = divmod(position, n)
    return int(_permutation(n, seed, stage, epoch)[place])


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng(_hash(f"order/{seed}/{stage}/{epoch}")).permutation(n)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class PromptLoader:
    """Yield the prompts of a stage's steps, in an order that depends only on settings.

    A question that cannot be used is replaced by another question, chosen by a hash of its position, and is listed in
    `faults`.

    Threads decode the prompts of at most the next `ahead` steps while a step is computed. This limits the memory for
    frames, because decoding waits for a slow step. Results are taken in order, so timing has no effect.

    Args:
        builder: `PromptBuilder`; its media reader caches frames.
        questions: the stage's questions.
        stage: name of the stage.
        seed: seed of the order.
        positions_per_step: questions per step over all processes.
        rank, size: this process takes the rank-th contiguous share of each step.
        threads: number of prompts that are built at the same time.
        ahead: number of steps to decode ahead; 0 builds the prompts of a step on demand.
        max_prompt_tokens: longer prompts cannot be used.
        order: name that decides the order together with the seed, so that two stages can have the same; "" = `stage`.
        is_wanted: whether the stage can use a question; another one silently takes its place. None = all questions.
        shows_media: whether a self-teacher is shown the media of a question's `hints.media` in a step, counted from 0.
            If they cannot be used, the question is kept without them. None = never.

    Attributes:
        faults: (question id, reason) of each question of the last step that was skipped, or lacks the media of its
            hints. They are counted when a step takes them, not when they are decoded ahead, because a resumed run
            repeats them.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        questions: list[Question],
        *,
        stage: str,
        seed: int,
        positions_per_step: int,
        rank: int,
        size: int,
        threads: int,
        ahead: int,
        max_prompt_tokens: int,
        order: str = "",
        is_wanted: Callable[[Question], bool] | None = None,
        shows_media: Callable[[Question, int], bool] | None = None,
    ):
        if positions_per_step % size:
            raise SettingsError(
                f"batch_size of stage {stage}: expected a multiple of the {size} processes, got {positions_per_step}; "
                "change batch_size or the number of processes"
            )
        self.builder, self.questions, self.stage, self.seed = builder, questions, stage, seed
        self.order = order or stage
        self.positions_per_step, self.share = positions_per_step, positions_per_step // size
        self.rank, self.ahead = rank, ahead
        self.max_prompt_tokens = max_prompt_tokens
        self.is_wanted = is_wanted or (lambda question: True)
        self.shows_media = shows_media or (lambda question, step: False)
        if not any(map(self.is_wanted, questions)):
            raise ValueError(f"stage {stage}: expected questions that the stage can use, got none of {len(questions)}")
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.submitted: dict[int, list[Future[tuple[Prompt | None, list[Fault]]]]] = {}
        self.faults: list[Fault] = []

    def step(self, step: int, last_step: int) -> list[Prompt]:
        """Return this process's prompts of a step (counted from 0), and start the prompts of the next steps before
        last_step.

        Raises:
            TooManyBadSamples: ATTEMPTS questions in a row could not be used; `faults` lists all of them.
        """
        self._submit(step)
        for later in range(step + 1, min(step + 1 + self.ahead, last_step)):
            self._submit(later)
        results = [future.result() for future in self.submitted.pop(step)]
        self.faults = [fault for _, faults in results for fault in faults]
        prompts = [prompt for prompt, _ in results if prompt is not None]
        if len(prompts) < len(results):
            raise TooManyBadSamples(
                f"no usable question after {ATTEMPTS} tries for one position of step {step + 1}; see the reasons above"
            )
        return prompts

    def close(self) -> None:
        """Stop starting prompts. Do not wait for prompts in progress, because a file may hang."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, step: int) -> None:
        if step not in self.submitted:
            first = step * self.positions_per_step + self.rank * self.share
            self.submitted[step] = [self.pool.submit(self._prompt_at, first + i) for i in range(self.share)]

    def _prompt_at(self, position: int) -> tuple[Prompt | None, list[Fault]]:
        """Return the prompt of a position (None if no question can be used), and the skipped questions."""
        n = len(self.questions)
        index = order_position(n, position, seed=self.seed, stage=self.order)
        faults = []
        for attempt in range(ATTEMPTS):
            question = self._wanted_question(index, position, attempt)
            try:
                prompt = self.builder.build(question, max_tokens=self.max_prompt_tokens)
            except (MediaError, PromptError) as error:
                faults.append((question.id, str(error)))
            else:
                return self._with_teacher(prompt, position // self.positions_per_step, faults), faults
            index = _hash(f"replace/{self.seed}/{self.order}/{position}/{attempt}") % n
        return None, faults

    def _with_teacher(self, prompt: Prompt, step: int, faults: list[Fault]) -> Prompt:
        """Add the self-teacher's prompt if it is shown other media. If they cannot be used, note the reason instead."""
        question = prompt.question
        if not self.shows_media(question, step):
            return prompt
        try:
            return replace(prompt, teacher=self.builder.build_teacher(question, max_tokens=self.max_prompt_tokens))
        except (MediaError, PromptError) as error:
            # The control of stage 2 uses the question, too, and reads no hints.
            faults.append((question.id, f"used without hints.media: {error}"))
            return prompt

    def _wanted_question(self, index: int, position: int, attempt: int) -> Question:
        """Return the question at an index, or the first of a hashed sequence that the stage can use."""
        for draw in itertools.count():
            question = self.questions[index]
            if self.is_wanted(question):
                return question
            index = _hash(f"unwanted/{self.seed}/{self.order}/{position}/{attempt}/{draw}") % len(self.questions)
