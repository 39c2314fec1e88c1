"""Ask the judge of an evaluation about answers that rules cannot score, and keep each of its replies in a file.

The requests are sent by the client of `rmsd_fast.collect`. A reply is appended to the file as it arrives, with a hash
of its request, so that no answered request is sent again, whatever ends the program.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rmsd_fast.collect_run.client import Client, GaveUp, NotSent
from rmsd_fast.collect_run.config import CollectConfig, Teacher, check_url, teachers
from rmsd_fast.collect_run.replies import Fatal, Refused
from rmsd_fast.collect_run.requests import request_body
from rmsd_fast.config import JudgeConfig, UserError
from rmsd_fast.data.errors import counted
from rmsd_fast.data.records import Question
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import World, broadcast_object
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.judge import Ask, judging, needs_judge, read_reply

log = logging.getLogger("rmsd_fast")
SECTION = "evaluate.judge"
# What is added to the temperature for each attempt to get a reply that can be read, as VLMEvalKit does.
WARMER = (0.0, 0.5, 1.0)
# Stop if the first verdicts are all unreadable, or more than this share of all.
FIRST_UNCLEAR, MOST_UNCLEAR = 10, 0.05
# Interval of looking for a signal, and of telling the waiting processes that the judge is still at work, in seconds.
WATCH_S, HEARTBEAT_S = 0.5, 60.0
_SHARED = ("temperature", "max_tokens", "token_limit", "extra_body", "max_concurrency", "timeout_s", "attempts")


class JudgeError(UserError, RuntimeError):
    """A judge that does not answer, or whose replies cannot be read. What it has replied is kept."""


def client_settings(judge: JudgeConfig) -> tuple[CollectConfig, Teacher]:
    """Return the settings of the client.

    Raises:
        SettingsError: the URL is malformed, or the key is missing. No message contains a key.
    """
    check_url(judge.endpoint, SECTION)
    shared = {name: getattr(judge, name) for name in (*_SHARED, "outage_s")}
    keys = [judge.api_key_env] if judge.api_key_env else []
    collect = CollectConfig(endpoint=[judge.endpoint], model=[judge.model], api_key_env=keys, several="never", **shared)
    (teacher,) = teachers(collect, SECTION)
    return collect, teacher


def judge_answers(
    records: Sequence[dict],
    questions: Sequence[Question],
    judge: JudgeConfig,
    path: Path,
    world: World,
    stop: StopSignal | None = None,
) -> list[dict]:
    """Return the predictions with the judge's verdicts. All processes call it; only the main one asks.

    Each prediction gets `judged`, its score as the field would score it, which is also its `score`. Those about which
    the judge was asked get `judge`: its model, the verdict (see `stages.judge.judging`) and its raw replies, or
    `unclear` if no reply could be read, with score 0.

    Args:
        records: predictions, read leniently.
        questions: their questions, in the same order.
        judge: the settings.
        path: file of the replies so far, which is continued.
        world: this process in the run.
        stop: stop signal.
    Raises:
        JudgeError: the judge cannot be reached, rejects requests, or gives no readable replies.
        CheckpointError: the file of replies is damaged.
        Stopped: the program was asked to end.
    """
    if not world.is_main:
        # Collectives time out, so the main process sends a sign of life.
        while (outcome := broadcast_object(None, world)) is None:
            pass
        if isinstance(outcome, Exception):
            raise outcome
        return list(records)
    beat_s = time.monotonic()

    def watch() -> None:
        nonlocal beat_s
        if stop is not None:
            stop.check()
        if time.monotonic() - beat_s >= HEARTBEAT_S:
            broadcast_object(None, world)
            beat_s = time.monotonic()

    try:
        asked = [(q, r) for q, r in zip(questions, records, strict=True) if needs_judge(q, r)]
        with Replies(path) as replies:
            verdicts = asyncio.run(_judge(asked, judge, replies, watch)) if asked else {}
    except Exception as error:
        broadcast_object(error, world)
        raise
    broadcast_object("done", world)
    return [_with_verdict(record, verdicts.get(record["id"])) for record in records]


def _with_verdict(record: dict, verdict: dict | None) -> dict:
    score = record["lenient"] if verdict is None else verdict["score"]
    return {**record, "score": score, "judged": score, **({"judge": verdict} if verdict else {})}


class Replies:
    """The judge's replies by the hash of their request, in a file that is continued. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path, keep=None)
        # Text and finish reason by the hash of the request.
        self.texts: dict[str, tuple[str, str | None]] = {}
        for number, line in enumerate(self._lines.records(), 1):
            key, text = line.get("key"), line.get("reply")
            if not isinstance(key, str) or not isinstance(text, str):
                raise JudgeError(
                    f"{path}:{number}: expected 'key' and 'reply', got {', '.join(line) or 'nothing'}; this is another "
                    "file: write to another --output, or delete it"
                )
            self.texts[key] = text, line.get("finish_reason")

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()

    def add(self, key: str, reply: str, finish_reason: str | None, **about: Any) -> None:
        """Write a reply. It is in the file when this method returns."""
        self._lines.append({"key": key, **about, "finish_reason": finish_reason, "reply": reply})
        self.texts[key] = reply, finish_reason


async def _judge(
    asked: Sequence[tuple[Question, dict]], judge: JudgeConfig, replies: Replies, watch: Callable[[], None]
) -> dict[str, dict]:
    """Return the verdicts by question id. If one fails, the requests in flight are awaited, because they have a price.

    Args:
        asked: questions with their predictions.
        judge: the settings.
        replies: the replies so far.
        watch: called about twice a second; it raises to end the program.
    """
    collect, teacher = client_settings(judge)
    stop = asyncio.Event()
    known = len(replies.texts)
    live = sys.stderr.isatty()
    async with Client(collect, teacher, stop) as client:
        judging_all = Judging(collect, client, replies)
        tasks = [asyncio.create_task(judging_all.verdict(question, record)) for question, record in asked]
        open_tasks, fault = set(tasks), None
        with tqdm(total=len(tasks), desc=f"judge {judge.model}", unit="answer", mininterval=0.1 if live else 10) as bar:
            try:
                while open_tasks:
                    ended, open_tasks = await asyncio.wait(
                        open_tasks, timeout=WATCH_S, return_when=asyncio.FIRST_EXCEPTION
                    )
                    bar.update(len(ended))
                    watch()
                    faults = [error for task in ended if (error := task.exception())]
                    fault = fault or next((error for error in faults if not isinstance(error, NotSent)), None)
                    if fault and not stop.is_set():
                        stop.set()
                        client.end_pauses()
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
    added = len(replies.texts) - known
    log.info(
        "judge %s: %s, %d of them new, in %s",
        judge.model,
        counted(known + added, "reply", "replies"),
        added,
        replies.path,
    )
    kept = f"the answers and the replies in {replies.path} are kept, and the same command continues"
    if isinstance(fault, Fatal | JudgeError):
        raise JudgeError(f"{fault}; {kept}") from fault
    if fault is not None:
        raise fault
    verdicts = {question.id: task.result() for (question, _), task in zip(asked, tasks, strict=True)}
    unclear = [name for name, verdict in verdicts.items() if verdict.get("unclear")]
    if len(unclear) > max(1, MOST_UNCLEAR * len(asked)):
        raise JudgeError(f"{judging_all.complaint(len(asked))}; {kept}")
    if unclear:
        log.warning("%s; they count as wrong", judging_all.complaint(len(asked)))
    return verdicts


class Judging:
    """Ask for verdicts. It is used within one event loop.

    Args:
        collect: settings of the requests.
        client: sends them.
        replies: the replies so far, and new ones.
    """

    def __init__(self, collect: CollectConfig, client: Client, replies: Replies) -> None:
        self._collect, self._client, self._replies = collect, client, replies
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._model = client.teacher.model
        self._counts: Counter[str] = Counter()
        self._unreadable = ""

    async def verdict(self, question: Question, record: dict) -> dict[str, Any]:
        """Return the verdict about an answer, with the raw replies.

        Raises:
            JudgeError: all attempts of a request have failed, or no reply at all can be read.
            Fatal: no request can succeed.
            NotSent: another verdict has failed.
        """
        steps = judging(question, record["response"])
        replies: list[str] = []
        request = next(steps)
        while True:
            reading = await self._ask(question, request, replies)
            if reading is None:
                self._counts["unclear"] += 1
                self._unreadable = self._unreadable or f"question {question.id!r}: {replies[-1]!r:.200}"
                if self._counts["unclear"] >= FIRST_UNCLEAR and not self._counts["clear"]:
                    raise JudgeError(self.complaint(self._counts["unclear"]))
                return {"model": self._model, "score": 0.0, "unclear": True, "replies": replies}
            try:
                request = steps.send(reading)
            except StopIteration as end:
                self._counts["clear"] += 1
                return {"model": self._model, **end.value, "replies": replies}

    def complaint(self, asked: int) -> str:
        """Return a message about the unreadable replies.

        asked: number of answers that the message is about.
        """
        advice = "choose another model"
        if cut := self._counts["length"]:
            advice = f"raise {SECTION}.max_tokens, which has cut off {counted(cut, 'reply', 'replies')}"
        return (
            f"{SECTION}.model {self._model}: expected replies such as 'Score: 1' or 'Answer: B', got none about "
            f"{self._counts['unclear']:,} of {counted(asked, 'answer')}, first to {self._unreadable}; {advice}"
        )

    async def _ask(self, question: Question, request: Ask, replies: list[str]) -> str | int | None:
        """Return what the judge's reply says, or None if none can be read. Unreadable replies are requested again."""
        for warmer in WARMER:
            collect = self._collect
            if collect.temperature is not None:
                collect = replace(collect, temperature=collect.temperature + warmer)
            body = request_body(collect, self._model, json.dumps(request.messages).encode(), n=1, seed=None)
            # Without a temperature, the bodies of all attempts are equal.
            key = hashlib.blake2b(b"%d " % WARMER.index(warmer) + body, digest_size=16).hexdigest()
            # The same answer to two versions of a problem is the same request.
            async with self._locks[key]:
                if key not in self._replies.texts:
                    reply = await self._send(question, body)
                    self._replies.add(key, *reply, id=question.id, kind=request.kind, model=self._model)
            text, finish_reason = self._replies.texts[key]
            replies.append(text)
            if (reading := read_reply(request.kind, text)) is not None:
                return reading
            self._counts["length"] += finish_reason == "length"
        return None

    async def _send(self, question: Question, body: bytes) -> tuple[str, str | None]:
        try:
            reply = await self._client.send(lambda: body)
        except Refused as error:
            advice = f"change the {SECTION} setting that the server names, or serve more context"
            raise JudgeError(
                f"{SECTION}: expected a verdict about question {question.id!r}, got {error.reason}: {error}; {advice}"
            ) from error
        except GaveUp as error:
            raise JudgeError(
                f"{SECTION}.endpoint: expected a verdict about question {question.id!r}, got nothing: {error}; check "
                "the server"
            ) from error
        return reply.answers[0]
