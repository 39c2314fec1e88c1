"""Which questions a step takes, and their prompts, decoded ahead of the step.

The order is a function of (seed, stage, epoch): a position in the run is an integer, and that integer is all the state
there is to save.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question

ATTEMPTS = 20


class TooManyBadSamples(UserError, RuntimeError):
    """More samples than `data.max_bad_share` could not be used."""


def order_position(n: int, position: int, *, seed: int, stage: str) -> int:
    """Index of the question at a position of the endless shuffled stream over n questions."""
    epoch, place = divmod(position, n)
    return int(_permutation(n, seed, stage, epoch)[place])


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng(_hash(f"order/{seed}/{stage}/{epoch}")).permutation(n)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class PromptLoader:
    """Prompts of a stage's steps, in an order that depends on nothing but settings.

    A question that cannot be used is replaced by another one, chosen by a hash of its position, counted in
    `bad_in_step`, and listed in `bad_media.jsonl` of the run folder.

    Threads decode the prompts of the next `ahead` steps while a step is computed, and no more than these: memory is
    bounded by their frames, and a slow step holds decoding up. Results are taken in order, so timing changes nothing.

    Args:
        builder: `PromptBuilder`; its media reader caches frames.
        positions_per_step: questions per step over all processes.
        rank, size: this process takes the rank-th contiguous share of each step.
        threads: how many prompts are built at once.
        ahead: steps; 0 = a step's prompts are built when it asks for them.
        max_prompt_tokens: longer prompts are unusable.
        run_folder: gets `bad_media.jsonl`.
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
        run_folder: Path,
    ):
        if positions_per_step % size:
            raise SettingsError(
                f"batch_size of stage {stage}: expected a multiple of the {size} processes, got {positions_per_step}"
            )
        self.builder, self.questions, self.stage, self.seed = builder, questions, stage, seed
        self.positions_per_step, self.share = positions_per_step, positions_per_step // size
        self.rank, self.ahead = rank, ahead
        self.max_prompt_tokens = max_prompt_tokens
        self.bad_list = run_folder / "bad_media.jsonl"
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.submitted: dict[int, list[Future[tuple[Prompt, int]]]] = {}
        self.bad_in_step = 0
        self.lock = threading.Lock()
        self.listed: set[str] = set()

    def step(self, step: int, last_step: int) -> list[Prompt]:
        """This process's prompts of a step (counted from 0); starts those of the steps after it, before last_step."""
        self._submit(step)
        for later in range(step + 1, min(step + 1 + self.ahead, last_step)):
            self._submit(later)
        results = [future.result() for future in self.submitted.pop(step)]
        # Counted when a step takes them, not when they are decoded ahead: the count is part of what a resume repeats.
        self.bad_in_step = sum(bad for _, bad in results)
        return [prompt for prompt, _ in results]

    def close(self) -> None:
        """Begin no more prompts. Those that are being built are not waited for: a file may hang."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, step: int) -> None:
        if step not in self.submitted:
            first = step * self.positions_per_step + self.rank * self.share
            self.submitted[step] = [self.pool.submit(self._prompt_at, first + i) for i in range(self.share)]

    def _prompt_at(self, position: int) -> tuple[Prompt, int]:
        """The prompt of a position, and how many unusable questions were passed over for it."""
        n = len(self.questions)
        index = order_position(n, position, seed=self.seed, stage=self.stage)
        for attempt in range(ATTEMPTS):
            question = self.questions[index]
            prompt = self._prompt(question)
            if prompt is not None:
                return prompt, attempt
            index = _hash(f"replace/{self.seed}/{self.stage}/{position}/{attempt}") % n
        raise TooManyBadSamples(
            f"no usable question found in {ATTEMPTS} tries at position {position}; see {self.bad_list}"
        )

    def _prompt(self, question: Question) -> Prompt | None:
        """The question's prompt; None where it is unusable, which is listed once."""
        try:
            return self.builder.build(question, max_tokens=self.max_prompt_tokens)
        except (MediaError, PromptError) as error:
            reason = str(error)
        with self.lock:
            if question.id not in self.listed:
                self.listed.add(question.id)
                with self.bad_list.open("a") as file:
                    file.write(json.dumps({"id": question.id, "stage": self.stage, "reason": reason}) + "\n")
        return None
