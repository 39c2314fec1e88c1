"""Test the order of questions, the replacement of bad questions, and the shares of the processes."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import torch

from rmsd_fast.data.loader import PromptLoader, TooManyBadSamples, order_position
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptError
from rmsd_fast.data.records import Question

QUESTIONS = [Question(id=f"q{i}", question="?", task_type="open", videos=(f"{i}.mp4",)) for i in range(10)]


class Builder:
    """Build prompts without media; the questions with an id in `bad` cannot be decoded."""

    def __init__(self, bad=(), tokens=3):
        self.bad, self.tokens, self.built = set(bad), tokens, Counter()

    def build(self, question, *, max_tokens):
        self.built[question.id] += 1
        if question.id in self.bad:
            raise MediaError(f"{question.videos[0]}: broken")
        if self.tokens > max_tokens:
            raise PromptError("exceeds data.max_prompt_tokens")
        ids = torch.zeros(self.tokens, dtype=torch.long)
        return Prompt(question, ids, ids, ids.expand(3, -1), ())


def loader(builder=None, **changes):
    given = {
        "stage": "sft",
        "seed": 0,
        "positions_per_step": 4,
        "rank": 0,
        "size": 1,
        "threads": 2,
        "ahead": 1,
        "max_prompt_tokens": 10,
    }
    return PromptLoader(builder or Builder(), QUESTIONS, **{**given, **changes})


def ids(prompts):
    return [prompt.question.id for prompt in prompts]


def test_every_epoch_has_its_own_permutation():
    epochs = [[order_position(10, e * 10 + i, seed=1, stage="sft") for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [order_position(10, i, seed=2, stage="sft") for i in range(10)]
    assert epochs[0] != [order_position(10, i, seed=1, stage="distill") for i in range(10)]


def test_a_step_does_not_depend_on_the_steps_before_it():
    one, two = loader(), loader()
    in_order = [ids(one.step(step, 6)) for step in range(6)]
    assert [ids(two.step(step, 6)) for step in (5, 2)] == [in_order[5], in_order[2]]


def test_processes_take_contiguous_shares():
    whole = ids(loader().step(3, 4))
    parts = [ids(loader(rank=rank, size=2).step(3, 4)) for rank in (0, 1)]
    assert parts[0] + parts[1] == whole
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        loader(size=3)


def test_bad_samples_are_replaced_and_named():
    plain = [ids(loader().step(step, 5)) for step in range(5)]
    first, again = (loader(Builder(bad={"q3"})) for _ in range(2))
    seen, faults = [], []
    for step in range(5):
        seen.append(ids(first.step(step, 5)))
        faults.append(first.faults)
    assert not any("q3" in step for step in seen)
    assert faults == [[("q3", "3.mp4: broken")] * step.count("q3") for step in plain] and sum(map(len, faults)) == 2
    # Only the positions of bad questions changed, and they change in the same way each time.
    for step, before in zip(seen, plain, strict=True):
        assert [a for a, b in zip(step, before, strict=True) if b != "q3"] == [b for b in before if b != "q3"]
    assert seen == [ids(again.step(step, 5)) for step in range(5)]


def test_too_long_prompts_are_bad_samples():
    used = loader(Builder(tokens=11))
    with pytest.raises(TooManyBadSamples, match=r"no usable question after 20 tries for one position of step 1"):
        used.step(0, 1)
    assert {reason for _, reason in used.faults} == {"exceeds data.max_prompt_tokens"}


class SlowBuilder(Builder):
    """Build as many prompts as there are permits."""

    def __init__(self):
        super().__init__()
        self.permits = threading.Semaphore(0)

    def build(self, question, *, max_tokens):
        self.permits.acquire()
        return super().build(question, max_tokens=max_tokens)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_number_of_steps_decoded_ahead_is_limited(ahead):
    builder = SlowBuilder()
    used = loader(builder, ahead=ahead)
    for _ in range(100):
        builder.permits.release()
    used.step(0, 10)
    used.pool.shutdown(wait=True)
    assert sum(builder.built.values()) == 4 * (1 + ahead)


def test_order_does_not_depend_on_timing():
    class Uneven(Builder):
        def build(self, question, *, max_tokens):
            time.sleep(0.02 if question.id in ("q1", "q4") else 0.0)
            return super().build(question, max_tokens=max_tokens)

    expected = [ids(loader(ahead=0, threads=1).step(step, 4)) for step in range(4)]
    uneven = loader(Uneven(), ahead=2, threads=3)
    assert [ids(uneven.step(step, 4)) for step in range(4)] == expected


def test_closing_starts_no_more_prompts_and_does_not_wait():
    builder = SlowBuilder()
    used = loader(builder)
    used._submit(0)
    used.close()
    for _ in range(10):
        builder.permits.release()
    used.pool.shutdown(wait=True)
    # Two threads were already building prompts.
    assert sum(builder.built.values()) <= 2


def test_two_stages_with_the_same_order_see_the_same_questions():
    first, second = loader(stage="distill"), loader(stage="control", order="distill")
    other = loader(stage="control")
    steps = [[ids(one.step(step, 3)) for step in range(3)] for one in (first, second, other)]
    assert steps[0] == steps[1] != steps[2]


def test_a_question_that_the_stage_cannot_use_is_replaced_and_the_others_stay():
    unwanted = {question.id for question in QUESTIONS[::3]}
    plain, chosen = loader(), loader(is_wanted=lambda question: question.id not in unwanted)
    replaced = 0
    for step in range(4):
        before, after = ids(plain.step(step, 4)), ids(chosen.step(step, 4))
        assert not unwanted & set(after) and chosen.faults == []
        assert all(old == new for old, new in zip(before, after, strict=True) if old not in unwanted)
        replaced += len(unwanted & set(before))
    assert replaced
    with pytest.raises(ValueError, match="stage sft: expected questions that the stage can use, got none"):
        loader(is_wanted=lambda question: False)
