"""Collect what a pool lacks: a task for each question, which sends requests and stores each reply as it arrives."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rmsd_fast.collect_run.budget import Budget, BudgetReached
from rmsd_fast.collect_run.client import Client, GaveUp, NotSent
from rmsd_fast.collect_run.config import CollectionConfig, Teacher
from rmsd_fast.collect_run.plan import missing
from rmsd_fast.collect_run.replies import REFUSALS, Fatal, Refused, Reply, tokens_of
from rmsd_fast.collect_run.requests import Messages, RequestBuilder, request_body, sample_seed, sampling_of
from rmsd_fast.collect_run.store import PoolStore
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.pool import ADAPTIVE, HINT_K, HINTED, TeacherResponse, media_digest
from rmsd_fast.teacher.scores import repaired
from rmsd_fast.teacher.usage import WITH

log = logging.getLogger("rmsd_fast")
# Stop if the first questions are all rejected, because the cause is then probably the same for all.
FIRST_REFUSALS = 5
# Interval in seconds at which a full disk is tried again.
DISK_RETRY_S = 2.0


class Collection:
    """One collection. It is used within one event loop.

    Args:
        questions: all questions.
        settings: settings of the collection.
        store: the pool.
        builder: builds the messages of questions.
        teachers: models with their endpoints.
        family: family of the student's preprocessing.
    Attributes:
        added: number of answers added to the pool.
        gave_up: number of answers whose requests have failed for now.
        refused: number of answers whose requests can never succeed, by reason.
        stopped: why the collection stopped before its end; "" = it did not.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        settings: CollectionConfig,
        store: PoolStore,
        builder: RequestBuilder,
        teachers: Sequence[Teacher],
        family: str,
    ) -> None:
        self._questions, self._settings, self._store, self._builder = questions, settings, store, builder
        self._family = family
        self._stop = asyncio.Event()
        self.clients = [Client(settings.collect, teacher, self._stop) for teacher in teachers]
        self.budget = Budget(settings.collect, tuple(store.spent))
        self.added = self.gave_up = 0
        self.refused: Counter[str] = Counter()
        self.stopped = ""
        self._fault: BaseException | None = None
        # Rejections by a model that has no answer in the pool yet. Their cause may be the same for all requests.
        self._held: dict[Client, list[tuple[Question, Sequence[int], str, Refused]]] = defaultdict(list)
        self._threads = ThreadPoolExecutor(settings.data.decode_threads, thread_name_prefix="media")

    def stop(self, reason: str) -> None:
        """Send nothing more. Requests in flight are awaited, because their answers have a price."""
        self.stopped = self.stopped or reason
        self._stop.set()
        for client in self.clients:
            client.end_pauses()

    async def run(self) -> None:
        """Collect the missing answers of all questions, or until the collection is stopped.

        Raises:
            Fatal, UserError: nothing can be collected. What was collected before is in the pool.
        """
        most = self._settings.collect.max_concurrency * sum(len(client.pacers) for client in self.clients)
        places = asyncio.Semaphore(most)
        tasks: set[asyncio.Task] = set()
        for client in self.clients:
            await client.__aenter__()
        try:
            for question in self._questions:
                if self._stop.is_set():
                    break
                if missing(question, self._store, self._settings):
                    await self._until_disk_has_room()
                    await places.acquire()
                    task = asyncio.create_task(self._question(question))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    task.add_done_callback(lambda _: places.release())
            while tasks:
                await asyncio.wait(tasks)
            await self._until_disk_has_room()
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for client in self.clients:
                await client.__aexit__()
        if not self.stopped:
            self._judge_refusals(*self._held)
        if self._fault is not None:
            raise self._fault

    async def _until_disk_has_room(self) -> None:
        while self._store.waiting and not self._stop.is_set():
            await asyncio.sleep(DISK_RETRY_S)
            self._store.sync()

    async def _question(self, question: Question) -> None:
        """Collect the missing answers of a question. An error that concerns all questions stops the collection."""
        loop = asyncio.get_running_loop()
        try:
            prepared: dict[bool, tuple[Messages, str]] = {}
            tried: set[int] = set()
            while ks := [k for k in missing(question, self._store, self._settings) if k not in tried]:
                tried.update(ks)
                hinted = ks == [HINT_K]
                if hinted not in prepared:
                    prepare = functools.partial(self._prepare, question, hinted=hinted)
                    prepared = {hinted: await loop.run_in_executor(self._threads, prepare)}
                messages, digest = prepared[hinted]
                await _all(
                    *(self._ask(client, question, messages, digest, ours) for client, ours in self._by_client(ks))
                )
        except MediaError as error:
            for client, ours in self._by_client(missing(question, self._store, self._settings)):
                self._note_refusal(client, question, ours, "", Refused("media", str(error)))
        except BudgetReached:
            self.stop("the budget is reached")
        except NotSent:
            pass
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fault = self._fault or error
            self.stop("an error")

    def _by_client(self, ks: Sequence[int]) -> list[tuple[Client, list[int]]]:
        """Return the numbers of the answers that each teacher gives, for teachers that give any."""
        count = len(self.clients)
        shares = [(client, [k for k in ks if k % count == index]) for index, client in enumerate(self.clients)]
        return [(client, ours) for client, ours in shares if ours]

    def _prepare(self, question: Question, *, hinted: bool) -> tuple[Messages, str]:
        return self._builder.messages(question, hinted=hinted), media_digest(question)

    async def _ask(
        self, client: Client, question: Question, messages: Messages, digest: str, ks: Sequence[int]
    ) -> None:
        """Request answers with these numbers until each is stored, rejected or given up."""
        while ks:
            if len(ks) > 1 and client.single:
                await _all(*(self._ask(client, question, messages, digest, [k]) for k in ks))
                return
            try:
                reply = await self._request(client, question, messages, ks)
            except GaveUp as error:
                self.gave_up += len(ks)
                log.warning("question %r: %s; the next collection asks again", question.id, error)
                return
            except Refused as error:
                self._refuse(question, ks, client, digest, error)
                return
            client.learn(len(ks), len(reply.answers))
            self._keep(client, question, digest, ks, reply)
            ks = ks[len(reply.answers) :]

    async def _request(self, client: Client, question: Question, messages: Messages, ks: Sequence[int]) -> Reply:
        """Request answers together, or only the first one if the server rejects `n`."""
        try:
            return await self._send(client, question, messages, ks)
        except Refused as error:
            if len(ks) == 1 or error.reason != "refused" or client.gives_several:
                raise
        reply = await self._send(client, question, messages, ks[:1])
        client.single = True
        return reply

    async def _send(self, client: Client, question: Question, messages: Messages, ks: Sequence[int]) -> Reply:
        collect = self._settings.collect
        seed = sample_seed(collect.seed, question.id, ks[0])
        # The body is a copy of the messages, which hold megabytes, so only requests in flight have one.
        body = functools.partial(request_body, collect, client.teacher.model, messages.json, n=len(ks), seed=seed)
        reserved = await self.budget.reserve(messages.tokens, len(ks) * collect.max_tokens)
        used = (0, 0)
        try:
            reply = await client.send(body)
            counts = tokens_of(reply.usage)
            used = counts or (0, 0)
        finally:
            await self.budget.settle(reserved, used)
        if counts is None and self.budget.is_limited and self._fault is None:
            self._fault = Fatal(
                f"{client.teacher.model}: expected token counts (`usage`) in each reply, got none, so the budget "
                "cannot be kept; leave collect.max_cost and collect.max_total_tokens out"
            )
            self.stop("an error")
        return reply

    def _keep(self, client: Client, question: Question, digest: str, ks: Sequence[int], reply: Reply) -> None:
        """Store the answers of a reply. Its token counts belong to the first one."""
        sampling, collect = sampling_of(self._settings, question, self._family), self._settings.collect
        # The answers of a reply come from one model, and a hinted answer has a request of its own.
        key = self._store.expected_key(question, ks[0], digest=digest)
        for k, (text, finish_reason) in zip(ks, reply.answers, strict=False):
            marks = {HINTED: True} if k == HINT_K else {ADAPTIVE: True} if collect.adaptive and k >= collect.k0 else {}
            response = TeacherResponse(
                id=question.id,
                k=k,
                key=key,
                text=text,
                finish_reason=finish_reason,
                usage=reply.usage if k == ks[0] or not reply.usage else {WITH: ks[0]},
                model=client.teacher.model,
                sampling=sampling | marks,
            )
            self._store.add(repaired(response, question, self._settings.teacher))
            self.added += 1
        for held in self._held.pop(client, ()):
            self._note_refusal(client, *held)

    def _refuse(self, question: Question, ks: Sequence[int], client: Client, digest: str, error: Refused) -> None:
        if client.teacher.model in self._store.models:
            self._note_refusal(client, question, ks, digest, error)
        else:
            self._held[client].append((question, ks, digest, error))
            if len(self._held[client]) >= FIRST_REFUSALS:
                self._judge_refusals(client)

    def _note_refusal(self, client: Client, question: Question, ks: Sequence[int], digest: str, error: Refused) -> None:
        self.refused[error.reason] += len(ks)
        log.warning("question %r: %s: %s", question.id, error.reason, error)
        self._store.fail(question, ks, client.teacher.model, digest, error.reason, str(error))

    def _judge_refusals(self, *clients: Client) -> None:
        """Stop because these servers have rejected all requests so far, which are then not noted as rejected."""
        for client in clients:
            held = self._held[client]
            *_, error = held[0]
            fault = Fatal(
                f"{client.teacher.model}: expected answers, got {counted(len(held), 'rejection')} and no answer, first "
                f"{error}; {REFUSALS[error.reason]}"
            )
            self._fault = self._fault or fault
            self.stop("an error")


async def _all(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Await all of them, even if one fails, so that no reply is lost. Then raise the first error."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
