"""Ask a judge for feedback about the rollouts of stage 2, and keep each of its replies in a file of the run.

The main process asks for all processes, with the client of `rmsd_fast.collect`. A reply is appended to
`feedback.jsonl` as it arrives, with the hash of its request. If a step has at least one reply, the requests of the step
that got none are appended too, with the cause, before the step uses the others. So a resumed run that repeats a step
gives each rollout the same feedback, and asks for nothing twice. If a step has no reply, the run stops, and a resumed
run asks again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from itertools import chain
from pathlib import Path

from rmsd_fast.collect_run.client import Client, GaveUp, NotSent
from rmsd_fast.collect_run.config import CollectConfig, Teacher
from rmsd_fast.collect_run.replies import Fatal, Forbidden, Refused, tokens_of
from rmsd_fast.collect_run.requests import request_body
from rmsd_fast.config import JudgeConfig
from rmsd_fast.data.errors import counted
from rmsd_fast.data.records import Question
from rmsd_fast.evaluate_judge import (
    DRAIN_S,
    FIRST_UNCLEAR,
    HEARTBEAT_S,
    WATCH_S,
    JudgeError,
    Replies,
    StoredReply,
    client_settings,
    reply_key,
)
from rmsd_fast.runtime.process_group import World, all_gather_objects, broadcast_object, on_main
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.feedback import feedback_messages, read_feedback

log = logging.getLogger("rmsd_fast")
SECTION = "self_teacher.judge"
FILE = "feedback.jsonl"
# What is asked about a rollout: the id of its question, and the messages as JSON.
_Asked = tuple[str, bytes]


def feedback_client(judge: JudgeConfig) -> tuple[CollectConfig, Teacher]:
    """Return the settings of the client.

    Raises:
        SettingsError: the URL is malformed, or the key is missing. No message contains a key.
    """
    return client_settings(judge, SECTION)


def check_replies(folder: Path) -> None:
    """Read the file of replies of a run folder that this process has locked.

    Raises:
        CheckpointError, JudgeError: the file is damaged.
    """
    with Replies(folder / FILE):
        pass


class Feedback:
    """Return a judge's advice about rollouts. All processes create it and call it together; the main one asks.

    Args:
        judge: the settings.
        folder: the run folder, in which the replies are kept.
        world: this process in the run.
        stop: stop signal of the run.
        trial: whether this is the request that tries the server before any step, for messages.
    Raises:
        CheckpointError, JudgeError: on all processes, if the file of replies is damaged.
        SettingsError: on all processes, as `feedback_client`.
    """

    def __init__(
        self, judge: JudgeConfig, folder: Path, world: World, stop: StopSignal, *, trial: bool = False
    ) -> None:
        self._world, self._stop, self._folder, self._trial = world, stop, folder, trial
        self._settings = self._replies = None
        # Whether this process has had an answer, and whether the run has had advice from this model.
        self._answered = self._usable = False
        # Causes of missing advice, and an example of each.
        self._without: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

        def open_file() -> None:
            self._settings, self._replies = feedback_client(judge), Replies(folder / FILE)
            replies = (reply for reply in self._replies.values() if reply.model == judge.model)
            self._usable = any(_advice_in(reply) is not None for reply in replies)

        on_main(world, open_file)

    def close(self) -> None:
        """Close the file of replies."""
        if self._replies is not None:
            self._replies.__exit__()

    def __call__(self, rollouts: list[tuple[Question, str]]) -> list[str | None]:
        """Return the advice about each rollout of this process, or None if the judge gives none.

        Args:
            rollouts: questions with the text of a rollout.
        Raises:
            JudgeError: on all processes, if the judge cannot be reached or answers no request of the step.
            Stopped: the run was asked to end and the replies do not arrive.
        """
        asked: list[_Asked] = [
            (question.id, json.dumps(feedback_messages(question, text)).encode()) for question, text in rollouts
        ]
        of_all = all_gather_objects(asked, self._world)
        if not self._world.is_main:
            # Collectives time out, so the main process sends a sign of life.
            while (outcome := broadcast_object(None, self._world)) is None:
                pass
        else:
            try:
                outcome = self._advice_of_ranks(of_all)
            except Exception as error:
                broadcast_object(error, self._world)
                raise
            broadcast_object(outcome, self._world)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome[self._world.rank]

    def _advice_of_ranks(self, of_all: list[list[_Asked]]) -> list[list[str | None]]:
        """Return the advice about the rollouts of each process. A request that occurs several times is sent once."""
        collect, teacher = self._settings
        keys = [[reply_key(collect, teacher.model, messages) for _, messages in of_rank] for of_rank in of_all]
        requests = dict(zip(chain(*keys), chain(*of_all), strict=True))
        advice = asyncio.run(self._ask_all(requests))
        return [[advice[key] for key in of_rank] for of_rank in keys]

    async def _ask_all(self, requests: dict[str, _Asked]) -> dict[str, str | None]:
        """Return the advice by key. Requests in flight are awaited, because they have a price, also if one fails."""
        collect, teacher = self._settings
        stored = {key: reply for key in requests if (reply := self._replies.get(key, collect.max_tokens)) is not None}
        advice = {key: self._advice(reply, requests[key][0]) for key, reply in stored.items()}
        failures: dict[str, StoredReply] = {}
        stop = asyncio.Event()
        beat_s, asked_s, fault = time.monotonic(), 0.0, None
        async with Client(collect, teacher, stop) as client:
            # A server that has answered before may be restarting.
            client.answered = self._answered
            # An answer of this step from before the run was stopped counts like one that arrives now.
            client.counts["answered"] = sum(reply.failure is None for reply in stored.values())
            tasks = {
                key: asyncio.create_task(self._ask(client, failures, key, *request))
                for key, request in requests.items()
                if key not in stored
            }
            waiting = set(tasks.values())
            try:
                while waiting:
                    ended, waiting = await asyncio.wait(waiting, timeout=WATCH_S, return_when=asyncio.FIRST_EXCEPTION)
                    faults = [error for task in ended if (error := task.exception())]
                    fault = fault or next((error for error in faults if not isinstance(error, NotSent)), None)
                    if fault is not None and not stop.is_set():
                        stop.set()
                        client.end_pauses()
                    if time.monotonic() - beat_s >= HEARTBEAT_S:
                        broadcast_object(None, self._world)
                        beat_s = time.monotonic()
                    asked_s = asked_s or (time.monotonic() if self._stop.asked else 0.0)
                    if asked_s and time.monotonic() - asked_s > DRAIN_S:
                        # The step cannot be completed, and continues from the last checkpoint.
                        self._stop.check()
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)
            self._answered = client.answered
        if fault is None and failures and not client.counts["answered"]:
            fault = self._no_answer(failures)
        if fault is not None:
            raise JudgeError(f"{fault}; {self._todo()}") if isinstance(fault, Fatal | JudgeError) else fault
        # The step uses these outcomes, so a run that repeats it must not ask again.
        for key, failure in failures.items():
            self._advice(failure, requests[key][0])
            self._replies.add(key, failure, 0, id=requests[key][0])
        return advice | {key: task.result() for key, task in tasks.items()}

    async def _ask(
        self, client: Client, failures: dict[str, StoredReply], key: str, name: str, messages: bytes
    ) -> str | None:
        """Return the advice about a rollout. A request that gets no reply is added to `failures`."""
        collect, teacher = self._settings
        body = request_body(collect, teacher.model, messages, n=1, seed=None)
        try:
            received = await client.send(lambda: body)
        except Refused as error:
            cause, said = error.reason, f"{error}"
        except Forbidden as error:
            if not client.counts["answered"]:
                raise
            cause, said = "refused", error.said
        except GaveUp as error:
            cause, said = "failed", f"{error}"
        else:
            text, finish_reason = received.answers[0]
            reply = StoredReply(text, finish_reason, collect.max_tokens, teacher.model)
            self._replies.add(key, reply, sum(tokens_of(received.usage) or ()), id=name)
            return self._advice(reply, name)
        failures[key] = StoredReply(said, None, collect.max_tokens, teacher.model, cause)
        if len(failures) >= FIRST_UNCLEAR and not client.counts["answered"]:
            raise self._no_answer(failures)
        return None

    def _no_answer(self, failures: dict[str, StoredReply]) -> JudgeError:
        example = next(iter(failures.values()))
        expected = "a reply to a first request" if self._trial else "feedback on the rollouts of a step"
        got = "none" if self._trial else f"no reply to {counted(len(failures), 'request')}"
        todo = "check the server, then start again" if self._trial else "check the server"
        return JudgeError(
            f"{SECTION}.endpoint {self._settings[1].endpoints[0]}: expected {expected}, got {got} "
            f"({example.failure}: {example.text}); {todo}"
        )

    def _todo(self) -> str:
        """Return how the run can go on after a fault."""
        if self._trial:
            return (
                f"to continue in the same folder, use --resume {self._folder}, with --allow-changes if a setting "
                f"changes, such as {SECTION}.endpoint=…"
            )
        return f"the replies in {self._replies.path} are kept; continue from the last checkpoint with --resume"

    def _advice(self, reply: StoredReply, name: str) -> str | None:
        """Return the advice in a reply about a rollout, and count the rollouts without any."""
        if reply.failure is not None:
            return self._without_advice(reply.failure, reply.text, name)
        advice = _advice_in(reply)
        if advice is None:
            cut = reply.finish_reason == "length"
            cause = f"cut off, raise {SECTION}.max_tokens" if cut else "empty"
            return self._without_advice(cause, f"{reply.text[-200:]!r}", name)
        self._usable = True
        return advice

    def _without_advice(self, cause: str, example: str, name: str) -> None:
        """Count a rollout without advice. Raise JudgeError if the first rollouts are all without any."""
        if cause not in self._examples:
            self._examples[cause] = example
            log.warning("%s: no feedback on a rollout of question %r (%s: %.300s)", SECTION, name, cause, example)
        self._without[cause] += 1
        if not self._usable and self._without.total() >= FIRST_UNCLEAR:
            ((cause, count),) = self._without.most_common(1)
            raise JudgeError(
                f"{SECTION}.model {self._settings[1].model}: expected advice as plain text, got none about the first "
                f"{self._without.total()} rollouts ({cause}: {count}, for instance {self._examples[cause]:.300}); "
                "check the model and its settings, and delete the file of replies to ask again"
            )


def _advice_in(reply: StoredReply) -> str | None:
    return None if reply.failure is not None else read_feedback(reply.text, reply.finish_reason)
