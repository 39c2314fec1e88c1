"""Which questions a step takes, and their prompts, decoded ahead of the step.

The order is a function of (seed, stage, epoch): a position in the run is an integer, and that integer is all the state
there is to save.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import MediaError

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

    A question whose media cannot be used is replaced by another one, chosen by a hash of its position, counted in
    `bad_in_step`, and listed in `bad_media.jsonl` of the run folder.

    Args:
        positions_per_step: questions per step over all processes.
        rank, size: this process takes the rank-th contiguous share of each step.
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
        cache_mib: int,
        threads: int,
        max_prompt_tokens: int,
        run_folder: Path,
    ):
        if positions_per_step % size:
            raise SettingsError(
                f"batch_size of stage {stage}: expected a multiple of the {size} processes, got {positions_per_step}"
            )
        self.builder, self.questions, self.stage, self.seed = builder, questions, stage, seed
        self.positions_per_step, self.share = positions_per_step, positions_per_step // size
        self.rank = rank
        self.max_prompt_tokens = max_prompt_tokens
        self.bad_list = run_folder / "bad_media.jsonl"
        self.cache = _PromptCache(cache_mib * 2**20)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.ahead: tuple[int, list[Future]] | None = None
        self.bad_in_step = 0
        self.lock = threading.Lock()
        self.listed: set[str] = set()

    def step(self, step: int, last_step: int) -> list[Prompt]:
        """This process's prompts of a step (counted from 0); starts decoding those of the next one."""
        futures = self._futures(step)
        if step + 1 < last_step:
            self.ahead = (step + 1, self._submit(step + 1))
        results = [future.result() for future in futures]
        # Counted when a step takes them, not when they are decoded ahead: the count is part of what a resume repeats.
        self.bad_in_step = sum(bad for _, bad in results)
        return [prompt for prompt, _ in results]

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _futures(self, step: int) -> list[Future[tuple[Prompt, int]]]:
        if self.ahead is not None and self.ahead[0] == step:
            return self.ahead[1]
        return self._submit(step)

    def _submit(self, step: int) -> list[Future]:
        first = step * self.positions_per_step + self.rank * self.share
        return [self.pool.submit(self._prompt_at, first + i) for i in range(self.share)]

    def _prompt_at(self, position: int) -> tuple[Prompt, int]:
        """The prompt of a position, and how many unusable questions were passed over for it."""
        n = len(self.questions)
        index = order_position(n, position, seed=self.seed, stage=self.stage)
        for attempt in range(ATTEMPTS):
            question = self.questions[index]
            try:
                return self._prompt(question), attempt
            except (MediaError, PromptError) as error:
                self._note(question, str(error))
            index = _hash(f"replace/{self.seed}/{self.stage}/{position}/{attempt}") % n
        raise TooManyBadSamples(
            f"no usable question found in {ATTEMPTS} tries at position {position}; see {self.bad_list}"
        )

    def _prompt(self, question: Question) -> Prompt:
        prompt = self.cache.get(question.id)
        if prompt is None:
            prompt = self.builder.build(question)
            if len(prompt.input_ids) > self.max_prompt_tokens:
                raise MediaError(
                    f"question {question.id}: prompt of {len(prompt.input_ids)} tokens exceeds data.max_prompt_tokens="
                    f"{self.max_prompt_tokens}; lower video.max_video_pixels or video.num_frames"
                )
            self.cache.put(question.id, prompt)
        return prompt

    def _note(self, question: Question, reason: str) -> None:
        with self.lock:
            if question.id in self.listed:
                return
            self.listed.add(question.id)
            with self.bad_list.open("a") as file:
                file.write(json.dumps({"id": question.id, "stage": self.stage, "reason": reason}) + "\n")


class _PromptCache:
    """Prompts with their frames by question id; the least recently used leave when the bytes exceed the budget."""

    def __init__(self, budget_bytes: int):
        self.budget = budget_bytes
        self.bytes = 0
        self.entries: OrderedDict[str, Prompt] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: str) -> Prompt | None:
        with self.lock:
            prompt = self.entries.get(key)
            if prompt is not None:
                self.entries.move_to_end(key)
            return prompt

    def put(self, key: str, prompt: Prompt) -> None:
        size = sum(frames.pixels.nbytes for frames in prompt.media)
        with self.lock:
            if size > self.budget or key in self.entries:
                return
            self.entries[key] = prompt
            self.bytes += size
            while self.bytes > self.budget:
                _, old = self.entries.popitem(last=False)
                self.bytes -= sum(frames.pixels.nbytes for frames in old.media)
