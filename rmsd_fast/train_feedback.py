"""Ask a judge for feedback about the rollouts of stage 2, and keep each of its replies in a file of the run.

The main process asks for all processes, with the client of `rmsd_fast.collect`. A reply is appended to
`feedback.jsonl` as it arrives, by the hash of question and rollout, so that a resumed run asks for nothing twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from pathlib import Path

from rmsd_fast.collect_run.client import Client, GaveUp, NotSent
from rmsd_fast.collect_run.config import CollectConfig, Teacher
from rmsd_fast.collect_run.replies import Fatal, Refused, tokens_of
from rmsd_fast.collect_run.requests import request_body
from rmsd_fast.config import JudgeConfig
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
)
from rmsd_fast.runtime.process_group import World, all_gather_objects, broadcast_object
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.feedback import feedback_key, feedback_messages, read_feedback

log = logging.getLogger("rmsd_fast")
SECTION = "self_teacher.judge"
FILE = "feedback.jsonl"
# What is asked about a rollout: its key, the id of its question, and the messages as JSON.
_Asked = tuple[str, str, bytes]


def feedback_client(judge: JudgeConfig) -> tuple[CollectConfig, Teacher]:
    """Return the settings of the client.

    Raises:
        SettingsError: the URL is malformed, or the key is missing. No message contains a key.
    """
    return client_settings(judge, SECTION)


class Feedback:
    """Return a judge's advice about rollouts. All processes call it together; the main one asks.

    Args:
        judge: the settings.
        folder: the run folder, in which the replies are kept.
        world: this process in the run.
        stop: stop signal of the run.
    Raises:
        JudgeError: the file of replies is damaged.
        SettingsError: as `feedback_client`.
    """

    def __init__(self, judge: JudgeConfig, folder: Path, world: World, stop: StopSignal) -> None:
        self._world, self._stop = world, stop
        self._settings = feedback_client(judge) if world.is_main else None
        self._replies = Replies(folder / FILE) if world.is_main else None
        # Whether any request of the run has been answered, and causes of missing advice with an example of each.
        self._answered = self._usable = False
        self._without: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def close(self) -> None:
        """Close the file of replies."""
        if self._replies is not None:
            self._replies.__exit__()

    def __call__(self, rollouts: list[tuple[Question, str]]) -> list[str | None]:
        """Return the advice about each rollout of this process, or None if the judge gives none.

        Args:
            rollouts: questions with the text of a rollout.
        Raises:
            JudgeError: on all processes, if the judge cannot be reached or rejects all requests.
            Stopped: the run was asked to end and the replies do not arrive.
        """
        asked: list[_Asked] = [
            (feedback_key(question.id, text), question.id, json.dumps(feedback_messages(question, text)).encode())
            for question, text in rollouts
        ]
        of_all = all_gather_objects(asked, self._world)
        if not self._world.is_main:
            # Collectives time out, so the main process sends a sign of life.
            while (outcome := broadcast_object(None, self._world)) is None:
                pass
        else:
            requests = {key: (name, messages) for of_rank in of_all for key, name, messages in of_rank}
            try:
                outcome = asyncio.run(self._ask_all(requests))
            except Exception as error:
                broadcast_object(error, self._world)
                raise
            broadcast_object(outcome, self._world)
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome[key] for key, _, _ in asked]

    async def _ask_all(self, requests: dict[str, tuple[str, bytes]]) -> dict[str, str | None]:
        """Return the advice by key. Requests in flight are awaited, because they have a price, also if one fails."""
        collect, teacher = self._settings
        stop = asyncio.Event()
        beat_s, asked_s, fault = time.monotonic(), 0.0, None
        async with Client(collect, teacher, stop) as client:
            # A server that has answered before may be restarting.
            client.answered = self._answered
            tasks = {key: asyncio.create_task(self._ask(client, key, *request)) for key, request in requests.items()}
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
        if fault is not None:
            kept = f"the replies in {self._replies.path} are kept; continue from the last checkpoint with --resume"
            raise JudgeError(f"{fault}; {kept}") if isinstance(fault, Fatal | JudgeError) else fault
        return {key: task.result() for key, task in tasks.items()}

    async def _ask(self, client: Client, key: str, name: str, messages: bytes) -> str | None:
        collect, teacher = self._settings
        reply = self._replies.get(key, collect.max_tokens)
        if reply is None:
            body = request_body(collect, teacher.model, messages, n=1, seed=None)
            try:
                received = await client.send(lambda: body)
            except Refused as error:
                return self._without_advice(error.reason, f"{error}", name)
            except GaveUp as error:
                if client.counts["answered"]:
                    return self._without_advice("failed", f"{error}", name)
                raise JudgeError(
                    f"{SECTION}.endpoint {teacher.endpoints[0]}: expected feedback on a rollout of question {name!r}, "
                    f"got none: {error}; check the server"
                ) from error
            text, finish_reason = received.answers[0]
            reply = StoredReply(text, finish_reason, collect.max_tokens)
            self._replies.add(key, reply, sum(tokens_of(received.usage) or ()), id=name, model=teacher.model)
        advice = read_feedback(reply.text, reply.finish_reason)
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
