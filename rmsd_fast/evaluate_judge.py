"""Ask the judge of an evaluation about answers that rules cannot score, and keep each of its replies in a file.

The requests are sent by the client of `rmsd_fast.collect`. A reply is appended to the file as it arrives, with a hash
of its request, so that no answered request is sent again, whatever ends the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rmsd_fast.collect_run.client import Client, GaveUp, NotSent
from rmsd_fast.collect_run.config import CollectConfig, Teacher, check_url, teachers
from rmsd_fast.collect_run.replies import REFUSALS, Fatal, Refused, tokens_of
from rmsd_fast.collect_run.requests import request_body
from rmsd_fast.config import JudgeConfig, UserError
from rmsd_fast.data.errors import counted
from rmsd_fast.data.records import Question
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import World, broadcast_object
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.judge import JudgeRequest, judging, needs_judge, read_reply

log = logging.getLogger("rmsd_fast")
SECTION = "evaluate.judge"
# What is added to the temperature for each attempt to get a reply that can be read, as VLMEvalKit does, and the highest
# temperature that servers accept.
ADDED_TEMPERATURES, MAX_TEMPERATURE = (0.0, 0.5, 1.0), 2.0
# Stop if the first verdicts are all unclear, or more than this share of all.
FIRST_UNCLEAR, MOST_UNCLEAR = 10, 0.05
# Interval of looking for a signal, and of telling the waiting processes that the judge is still at work, in seconds.
WATCH_S, HEARTBEAT_S = 0.5, 60.0
# Time for the requests in flight after a signal, in seconds. Launchers kill a process after 30 s.
DRAIN_S = 20.0
_SHARED = ("temperature", "max_tokens", "token_limit", "extra_body", "max_concurrency", "timeout_s", "attempts")
_SHARED += ("outage_s",)
# Causes of an unclear verdict besides the keys of REFUSALS, and what to do about each of them.
_CUT, _TEXT, _FAILED = "cut", "text", "failed"
_ASKED_AGAIN = "the same command asks about these answers again"
_ADVICE = {
    **{reason: f"{advice}; {_ASKED_AGAIN}" for reason, advice in REFUSALS.items()},
    "context_too_long": f"lower {SECTION}.max_tokens, or serve more context; {_ASKED_AGAIN}",
    "filtered": f"the provider's filter rejected the prompts; choose another provider; {_ASKED_AGAIN}",
    _CUT: f"raise {SECTION}.max_tokens, which has cut off these replies; only they are then requested again",
    _TEXT: "choose another model, because the same command would read the same replies again",
    _FAILED: f"check the server; {_ASKED_AGAIN}",
}


class JudgeError(UserError, RuntimeError):
    """A judge that does not answer, or whose replies cannot be read. What it has replied is kept."""


class StoredReply(NamedTuple):
    """A reply of the judge, or the outcome of a request that got none.

    Attributes:
        text: the reply, or what the server or the client said in its place.
        finish_reason: its finish reason.
        max_tokens: `max_tokens` of the request.
        model: the judge's model.
        failure: why there is no reply; None = this is a reply.
    """

    text: str
    finish_reason: str | None
    max_tokens: int
    model: str
    failure: str | None = None


class NoReply(Exception):
    """A request about one answer that got no reply. `cause` is a key of _ADVICE."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def client_settings(judge: JudgeConfig, section: str = SECTION) -> tuple[CollectConfig, Teacher]:
    """Return the settings of the client of a judge. `section` names them in messages.

    Raises:
        SettingsError: the URL is malformed, or the key is missing. No message contains a key.
    """
    check_url(judge.endpoint, section)
    shared = {name: getattr(judge, name) for name in _SHARED}
    keys = [judge.api_key_env] if judge.api_key_env else []
    collect = CollectConfig(endpoint=[judge.endpoint], model=[judge.model], api_key_env=keys, several="never", **shared)
    (teacher,) = teachers(collect, section)
    return collect, teacher


def judge_answers(
    records: Sequence[dict],
    questions: Sequence[Question],
    judge: JudgeConfig,
    path: Path,
    world: World,
    stop: StopSignal | None = None,
    *,
    client: tuple[CollectConfig, Teacher] | None = None,
) -> list[dict]:
    """Ask the judge, and return the predictions with its verdicts. All processes call it; only the main one asks.

    The other processes wait, and return the predictions without verdicts.

    Each prediction gets `judged`, its score as the field would score it, which is also its `score`. Those about which
    the judge was asked get `judge`: its model, the verdict (see `stages.judge.judging`) and its raw replies. If no
    reply can be read, or the request gets none, it has `unclear` with the `reason`, and score 0.

    After a signal, the requests in flight have 20 s to finish. A second signal cancels them.

    Args:
        records: predictions, read leniently.
        questions: their questions, in the same order.
        judge: the settings.
        path: file of the replies so far, which is continued.
        world: this process in the run.
        stop: stop signal.
        client: result of `client_settings`, if it was already called, since it may warn.
    Raises:
        JudgeError: the judge cannot be reached, rejects all requests, or gives too few readable replies.
        CheckpointError: the file of replies is damaged.
        Stopped, KeyboardInterrupt: the program was asked to end.
    """
    if not world.is_main:
        # Collectives time out, so the main process sends a sign of life.
        while (outcome := broadcast_object(None, world)) is None:
            pass
        if isinstance(outcome, Exception):
            raise outcome
        return list(records)
    beat_s = time.monotonic()

    def watch() -> int:
        nonlocal beat_s
        if stop is not None and stop.requests:
            # Other processes may have ended, so they are not told anything.
            return stop.requests
        if time.monotonic() - beat_s >= HEARTBEAT_S:
            broadcast_object(None, world)
            beat_s = time.monotonic()
        return 0

    try:
        asked = [(q, r) for q, r in zip(questions, records, strict=True) if needs_judge(q, r)]
        verdicts: dict[str, dict] = {}
        with Replies(path) as replies:
            if asked:
                with stop.draining() if stop is not None else contextlib.nullcontext():
                    verdicts = asyncio.run(_judge(asked, client or client_settings(judge), replies, watch))
                if stop is not None:
                    stop.check()
    except Exception as error:
        if stop is not None:
            stop.check()
        broadcast_object(error, world)
        raise
    broadcast_object("done", world)
    return [_with_verdict(record, verdicts.get(record["id"])) for record in records]


def _with_verdict(record: dict, verdict: dict | None) -> dict:
    score = record["lenient"] if verdict is None else verdict["score"]
    return {**record, "score": score, "judged": score, **({"judge": verdict} if verdict else {})}


class Replies:
    """The judge's replies by the hash of their request, in a file that is continued. Use it as a context manager.

    If a hash occurs several times, the last reply counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path, keep=None)
        self._replies: dict[str, StoredReply] = {}
        self.added = self.tokens = 0
        for number, line in enumerate(self._lines.records(), 1):
            key, text, limit = line.get("key"), line.get("reply"), line.get("max_tokens")
            if not isinstance(key, str) or not isinstance(text, str) or not isinstance(limit, int):
                raise JudgeError(
                    f"{path}:{number}: expected 'key', 'max_tokens' and 'reply', got {', '.join(line) or 'nothing'}; "
                    "this is another file, or of an earlier version: move or delete it"
                )
            model, failure = line.get("model", ""), line.get("failure")
            self._replies[key] = StoredReply(text, line.get("finish_reason"), limit, model, failure)

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()

    def __len__(self) -> int:
        return len(self._replies)

    def values(self) -> Iterable[StoredReply]:
        """Return the replies of all requests."""
        return self._replies.values()

    def get(self, key: str, max_tokens: int) -> StoredReply | None:
        """Return the reply to a request.

        None = there is none, a smaller limit has cut it off, or the request failed with another limit.
        """
        stored = self._replies.get(key)
        if stored is None:
            return None
        cut = stored.finish_reason == "length" and stored.max_tokens < max_tokens
        return None if cut or (stored.failure is not None and stored.max_tokens != max_tokens) else stored

    def add(self, key: str, reply: StoredReply, tokens: int, **request: Any) -> None:
        """Append a reply to the file, or keep it in memory while the disk is full.

        Args:
            key: hash of its request.
            reply: the reply.
            tokens: number of tokens of prompt and reply; 0 = the server does not count them.
            request: further fields of the line.
        """
        line = {"key": key, **request, "model": reply.model, "max_tokens": reply.max_tokens}
        line |= {} if reply.failure is None else {"failure": reply.failure}
        self._lines.append({**line, "finish_reason": reply.finish_reason, "reply": reply.text})
        self._replies[key] = reply
        self.added, self.tokens = self.added + 1, self.tokens + tokens


async def _judge(
    asked: Sequence[tuple[Question, dict]],
    settings: tuple[CollectConfig, Teacher],
    replies: Replies,
    watch: Callable[[], int],
) -> dict[str, dict]:
    """Return the verdicts by question id, or {} if the program was asked to end.

    Requests in flight are awaited, because they have a price, also if one fails.

    Args:
        asked: questions with their predictions.
        settings: result of `client_settings`.
        replies: the replies so far.
        watch: called about twice a second; returns how often the program was asked to end.
    """
    collect, teacher = settings
    stop = asyncio.Event()
    live = sys.stderr.isatty()
    stops, deadline_s = 0, 0.0
    async with Client(collect, teacher, stop) as client:
        judging_all = Judging(collect, client, replies)
        tasks = [asyncio.create_task(judging_all.verdict(question, record)) for question, record in asked]
        open_tasks, fault = set(tasks), None
        bar = tqdm(total=len(tasks), desc=f"judge {teacher.model}", unit="answer", mininterval=0.1 if live else 10)
        try:
            while open_tasks:
                ended, open_tasks = await asyncio.wait(open_tasks, timeout=WATCH_S, return_when=asyncio.FIRST_EXCEPTION)
                bar.update(len(ended))
                faults = [error for task in ended if (error := task.exception())]
                fault = fault or next((error for error in faults if not isinstance(error, NotSent)), None)
                stops = watch()
                if (fault or stops) and not stop.is_set():
                    stop.set()
                    client.end_pauses()
                deadline_s = deadline_s or (time.monotonic() + DRAIN_S if stops else 0.0)
                if stops > 1 or (stops and time.monotonic() > deadline_s):
                    log.warning("the judge's requests in flight were cancelled")
                    break
        finally:
            bar.close()
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    log.info(
        "judge %s: %s, %d of them new%s, in %s",
        teacher.model,
        counted(len(replies), "reply", "replies"),
        replies.added,
        f" ({counted(replies.tokens, 'token')})" if replies.tokens else "",
        replies.path,
    )
    if stops:
        return {}
    stored = f"the answers and the replies in {replies.path} are kept"
    if isinstance(fault, JudgeError):
        raise JudgeError(f"{fault}; {stored}") from fault
    if isinstance(fault, Fatal):
        raise JudgeError(f"{fault}; {stored}, and the same command continues") from fault
    if fault is not None:
        raise fault
    verdicts = {question.id: task.result() for (question, _), task in zip(asked, tasks, strict=True)}
    unclear = sum("unclear" in verdict for verdict in verdicts.values())
    if unclear > max(1, MOST_UNCLEAR * len(asked)) or (unclear and not len(replies)):
        raise JudgeError(f"{judging_all.complaint(len(asked))}; {stored}")
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
        self._clear = 0
        # Number of unclear verdicts by their cause, and an example of each.
        self._unclear: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    async def verdict(self, question: Question, record: dict) -> dict[str, Any]:
        """Return the verdict about an answer, with the raw replies.

        Raises:
            JudgeError: the first verdicts are all unclear.
            Fatal: no request can succeed.
            NotSent: another verdict has failed, or the program was asked to end.
        """
        steps = judging(question, record["response"])
        replies: list[StoredReply] = []
        request = next(steps)
        while True:
            try:
                reading = await self._ask(question, request, replies)
            except NoReply as error:
                return self._no_verdict(question, error.cause, str(error), replies)
            if reading is None:
                tried = replies[-len(ADDED_TEMPERATURES) :]
                cut = sum(reply.finish_reason == "length" for reply in tried)
                cause = _CUT if 2 * cut > len(tried) else _TEXT
                example = next(reply for reply in tried if (reply.finish_reason == "length") == (cause == _CUT))
                return self._no_verdict(question, cause, f"{example.text!r:.200}", replies)
            try:
                request = steps.send(reading)
            except StopIteration as end:
                self._clear += 1
                return {"model": self._model, **end.value, "replies": [reply.text for reply in replies]}

    def _no_verdict(self, question: Question, cause: str, reason: str, replies: list[StoredReply]) -> dict[str, Any]:
        self._unclear[cause] += 1
        self._examples.setdefault(cause, f"{reason} about question {question.id!r}")
        # If a request was answered, the server may reject only some prompts.
        unread = self._unclear.total() if not len(self._replies) else self._unclear[_TEXT] + self._unclear[_CUT]
        if unread >= FIRST_UNCLEAR and not self._clear:
            raise JudgeError(self.complaint(self._unclear.total()))
        texts = [reply.text for reply in replies]
        return {"model": self._model, "score": 0.0, "unclear": True, "reason": reason, "replies": texts}

    def complaint(self, answers: int) -> str:
        """Return a message about the unclear verdicts, with advice about their most frequent cause.

        Args:
            answers: number of answers that the judge was asked about.
        """
        ((cause, _),) = self._unclear.most_common(1)
        return (
            f"{SECTION}.model {self._model}: expected replies such as 'Score: 1' or 'Answer: B', got no readable reply "
            f"about {self._unclear.total():,} of {counted(answers, 'answer')}, for instance {self._examples[cause]}; "
            f"{_ADVICE[cause]}"
        )

    async def _ask(self, question: Question, request: JudgeRequest, replies: list[StoredReply]) -> str | int | None:
        """Return what the judge's reply says, or None if none can be read. Unreadable replies are requested again.

        Args:
            question: the question.
            request: the request.
            replies: gets the replies.
        Raises:
            NoReply: the server rejects the request, or all attempts have failed.
        """
        messages = json.dumps(request.messages).encode()
        for attempt, added in enumerate(ADDED_TEMPERATURES):
            collect = self._collect
            if collect.temperature is not None:
                # A higher setting of the user stays.
                highest = max(collect.temperature, MAX_TEMPERATURE)
                collect = replace(collect, temperature=min(collect.temperature + added, highest))
            body = request_body(collect, self._model, messages, n=1, seed=None)
            key = reply_key(collect, self._model, messages, attempt)
            # The same answer to two versions of a problem is the same request.
            async with self._locks[key]:
                reply = self._replies.get(key, collect.max_tokens)
                if reply is None:
                    reply, tokens = await self._send(body)
                    self._replies.add(key, reply, tokens, id=question.id, kind=request.kind)
            replies.append(reply)
            # A reasoning that was cut off may contain any score.
            if reply.finish_reason != "length" and (reading := read_reply(request.kind, reply.text)) is not None:
                return reading
        return None

    async def _send(self, body: bytes) -> tuple[StoredReply, int]:
        try:
            reply = await self._client.send(lambda: body)
        except Refused as error:
            raise NoReply(error.reason, f"{error.reason}: {error}") from error
        except GaveUp as error:
            raise NoReply(_FAILED, str(error)) from error
        text, finish_reason = reply.answers[0]
        stored = StoredReply(text, finish_reason, self._collect.max_tokens, self._model)
        return stored, sum(tokens_of(reply.usage) or ())


def reply_key(collect: CollectConfig, model: str, messages: bytes, attempt: int = 0) -> str:
    """Return the hash of a request without its limit of tokens, which does not change a reply that it does not cut."""
    body = request_body(replace(collect, max_tokens=0, token_limit="max_tokens"), model, messages, n=1, seed=None)
    # Without a temperature, the bodies of all attempts are equal.
    return hashlib.blake2b(b"%d " % attempt + body, digest_size=16).hexdigest()
