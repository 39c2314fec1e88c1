"""What a rollout server does: it serves one run at a time, takes its weights, and samples with them.

HTTP threads call `Service`, whose work runs in the thread of the engine, between two decoding steps.
"""

from __future__ import annotations

import logging
import queue
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

from rmsd_fast.config import UserError, first_line
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.protocol import MessageError, digest, unpack_request, unpack_update
from rmsd_fast.rollout.samples import Completion, Request, Sampler

log = logging.getLogger("rmsd_fast")
Result = TypeVar("Result")
# Seconds between two looks for a signal while there is nothing to do.
IDLE_S = 0.2


class SteppedSampler(Sampler, Protocol):
    """A sampler whose requests can be added while others are in progress."""

    def add(self, request: Request, sampling: Sampling) -> int: ...

    def step(self) -> dict[int, list[Completion]]: ...

    def abort(self) -> None: ...


class Refusal(Exception):
    """A call that the server refuses, with its HTTP status. The message says what the run should do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineLoop:
    """Run an engine in the calling thread, and the calls of other threads between its steps.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: SteppedSampler) -> None:
        self.engine = engine
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self._sampling: dict[int, Future[list[Completion]]] = {}
        self._end: Refusal | None = None

    @property
    def in_progress(self) -> int:
        """Return the number of requests in progress."""
        return len(self._sampling)

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread of the engine, and return its result or raise its error."""
        future: Future[Result] = Future()
        self._jobs.put((work, future))
        if self._end is not None:
            self._fail_jobs(self._end)
        return future.result()

    def sample(self, add: Callable[[], int]) -> list[Completion]:
        """Begin a request with `add`, which returns its number, and return its completions."""
        done: Future[list[Completion]] = Future()

        def begin() -> None:
            self._sampling[add()] = done

        self.call(begin)
        return done.result()

    def abort(self, reason: Refusal) -> None:
        """End all requests in progress. Call this in the thread of the engine."""
        self.engine.abort()
        self._fail_requests(reason)

    def run(self, check: Callable[[], None]) -> None:
        """Work until `check`, which is called between steps, or the engine raises. Calls that are waiting then fail.

        The state of an engine is unknown after an error that is not about one request, so the server ends.
        """
        try:
            while True:
                check()
                self._run_jobs()
                if self._sampling:
                    for number, completions in self.engine.step().items():
                        self._sampling.pop(number).set_result(completions)
        except BaseException as error:
            self._end = _end_of(error)
            raise
        finally:
            self._fail_jobs(self._end)
            self._fail_requests(self._end)

    def _fail_jobs(self, reason: Refusal) -> None:
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()[1].set_exception(reason)

    def _fail_requests(self, reason: Refusal) -> None:
        waiting, self._sampling = self._sampling, {}
        for future in waiting.values():
            future.set_exception(reason)

    def _run_jobs(self) -> None:
        wait = not self._sampling
        while True:
            try:
                work, future = self._jobs.get(block=wait, timeout=IDLE_S if wait else None)
            except queue.Empty:
                return
            wait = False
            try:
                future.set_result(work())
            except torch.AcceleratorError as error:
                # No later call of the GPU can succeed.
                future.set_exception(_end_of(error))
                raise
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(_end_of(error))
                raise


def _end_of(error: BaseException) -> Refusal:
    """Return what the runs are told about an error that ends the server."""
    if isinstance(error, torch.OutOfMemoryError):
        return Refusal(503, f"{out_of_memory(error)}; the server has ended")
    if isinstance(error, UserError):
        return Refusal(503, f"{first_line(error)}; the server has ended: start it again")
    if isinstance(error, Exception):
        what = f"{type(error).__name__}: {first_line(error)}"
        return Refusal(503, f"the server has ended ({what}); look at its output, and start it again")
    return Refusal(503, "the server was stopped while the run used it; start it again")


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """Return what to do if the GPU of a server has too little memory."""
    return (
        f"out of memory on the server ({first_line(error)}); start it again with a lower rollout.vllm_kv_cache_gib or "
        "fewer --sequences"
    )


class Service:
    """The state of a server: which run it serves, and which weights it holds.

    Args:
        loop: loop of the engine.
        facts: what a run must agree on, see `protocol.model_facts`, and `max_tokens`.
        shown: further facts that are only shown: versions and device.
    """

    def __init__(self, loop: EngineLoop, facts: Mapping[str, Any], shown: Mapping[str, str]) -> None:
        self.loop, self.facts, self.shown = loop, facts, shown
        self.instance = uuid.uuid4().hex
        # What requests must fit.
        self._sizes = {
            "vocabulary": facts["text_config.vocab_size"],
            "width": facts["features per vision token"],
            "patches": facts["patches per vision token"],
        }
        self._session, self._owner = "", ""
        # The version of the weights: None while they are being replaced.
        self._version: int | None = None
        self._taken: tuple[int, list[str]] = (0, [])

    def status(self) -> dict[str, Any]:
        """Return what the server is, and which run it serves."""
        return {
            "instance": self.instance,
            "facts": dict(self.facts),
            "shown": dict(self.shown),
            "owner": self._owner,
            "in_progress": self.loop.in_progress,
        }

    def open(self, owner: str) -> str:
        """Begin to serve a run, and return the name of the session.

        Raises:
            Refusal: another run is being served.
        """

        def begin() -> str:
            if self._session:
                raise Refusal(
                    409,
                    f"expected a server without a run, got one that serves {self._owner}; wait for that run to end, or "
                    "start another server on another port",
                )
            self._session, self._owner, self._version, self._taken = uuid.uuid4().hex, owner, None, (0, [])
            log.info("serving %s", owner)
            return self._session

        return self.loop.call(begin)

    def close(self, session: str) -> None:
        """Stop serving a run, and end its requests."""

        def end() -> None:
            if session == self._session:
                log.info("the connection of %s has ended", self._owner)
                self._session = self._owner = ""
                self._version = None
                self.loop.abort(Refusal(410, "expected the connection of the run to stay open, but the run has ended"))

        self.loop.call(end)

    def load(self, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Take a bucket of weights, and return their digests. The first bucket of a version begins an update.

        Raises:
            MessageError: the message has another form.
            Refusal: the session has ended, or rollouts are being sampled.
            RolloutError: the engine did not take exactly these weights.
        """
        version, names = unpack_update(description)

        def take() -> None:
            self._check_session(description)
            if self.loop.in_progress:
                raise Refusal(409, "expected weights after all rollouts, got some while rollouts are being sampled")
            begun, taken = self._taken
            self._version = None
            if begun != version:
                taken = []
            self.loop.engine.load(((name, tensors[name]) for name in names), names)
            self._taken = version, taken + names

        if set(names) != tensors.keys():
            raise MessageError(f"expected {len(names)} weights, got {len(tensors)}")
        digests = {name: digest(tensors[name]) for name in names}
        self.loop.call(take)
        return digests

    def commit(self, description: Mapping[str, Any]) -> dict[str, int]:
        """End an update, and return the sums of the engine's weights.

        Raises:
            MessageError: the message has another form.
            Refusal: the session has ended, or the weights that arrived are not those that the run has sent.
        """
        version, names = unpack_update(description)

        def finish() -> dict[str, int]:
            self._check_session(description)
            begun, taken = self._taken
            taken = taken if begun == version else []
            if taken != names:
                missing = [name for name in names if name not in set(taken)]
                raise Refusal(
                    409,
                    f"expected {len(names)} weights in update {version}, got {len(taken)}; first missing: "
                    f"{(missing or ['none, but they came in another order'])[0]}",
                )
            sums = self.loop.engine.commit()
            self._version = version
            return sums

        return self.loop.call(finish)

    def generate(self, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Completion]:
        """Return the completions of one request.

        Raises:
            MessageError: the request has another form.
            Refusal: the session has ended, or the server holds other weights than the run expects.
            RolloutError: the engine cannot answer the request.
        """
        request, sampling = unpack_request(description, tensors, **self._sizes)

        def add() -> int:
            self._check_session(description)
            if self._version is None or description.get("version") != self._version:
                held = "those of no complete update" if self._version is None else f"those of update {self._version}"
                raise Refusal(
                    409, f"expected the weights of update {description.get('version')} of the run, it holds {held}"
                )
            return self.loop.engine.add(request, sampling)

        return self.loop.sample(add)

    def _check_session(self, description: Mapping[str, Any]) -> None:
        if description.get("instance") != self.instance:
            raise Refusal(
                410,
                "expected the server that the run had connected to, got one that was started again and has lost the "
                "weights of the run",
            )
        if not self._session or description.get("session") != self._session:
            now = f"that now serves {self._owner}" if self._owner else "without a run"
            raise Refusal(410, f"expected the connection of the run to stay open, got a server {now}")
