"""Rollout servers for tests: one that samples with transformers, in a thread, and the real program as a process."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from train_runs import environment

from rmsd_fast.config import RunConfig
from rmsd_fast.data.packing import media_places
from rmsd_fast.data.prompts import banned_ids
from rmsd_fast.models.students import MediaFeatures, embed, load_student
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.protocol import most_bytes
from rmsd_fast.rollout.samples import Completion, Request
from rmsd_fast.rollout.server import RolloutServer
from rmsd_fast.rollout.service import EngineLoop, Service
from rmsd_fast.rollout.weights import VISION, group_sums, to_host
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import model_path_of
from rmsd_fast.stages.rollout_servers import facts_of

# A server with vLLM starts in half a minute on an idle machine.
START_S = 300.0


class HfSampler:
    """Sample with transformers' own attention, and complete one request in each step."""

    def __init__(self, folder: str | Path) -> None:
        student = load_student(folder, dtype="float32")
        self.model, self.eos_id, self.dtype = student.model.eval(), student.eos_id, torch.float32
        self._banned = banned_ids(student.tokenizer, self.model.config.text_config.vocab_size)
        self._params = {n: p for n, p in self.model.named_parameters() if not n.startswith(VISION)}
        self._numbers, self._waiting = itertools.count(), {}
        # Tests stop the work here.
        self.ready = threading.Event()
        self.ready.set()
        self.error: Exception | None = None

    @torch.no_grad()
    def load(self, weights, names: list[str]) -> None:
        for name, value in weights:
            self._params[name].copy_(value)

    def commit(self) -> dict[str, int]:
        return to_host(group_sums(self._params.items()))

    def add(self, request: Request, sampling: Sampling) -> int:
        if request.question_id == "refused":
            raise RolloutError("question 'refused': expected another one")
        number = next(self._numbers)
        self._waiting[number] = request, sampling
        return number

    def step(self) -> dict[int, list[Completion]]:
        self.ready.wait(60)
        if self.error is not None:
            raise self.error
        number, (request, sampling) = next(iter(self._waiting.items()))
        del self._waiting[number]
        return {number: [self._complete(request, sampling, index) for index in range(sampling.n)]}

    def abort(self) -> None:
        self._waiting.clear()

    @torch.no_grad()
    def _complete(self, request: Request, sampling: Sampling, index: int) -> Completion:
        generator = torch.Generator().manual_seed(request.seed + index)
        count = 1 + len(self.model.model.visual.deepstack_merger_list)
        layers = [medium.layers[0].chunk(count, -1) for medium in request.media]
        features = MediaFeatures(
            [of_medium[0] for of_medium in layers],
            [[of_medium[d] for of_medium in layers] for d in range(1, count)],
            [medium.kind for medium in request.media],
            [len(request.media)],
        )
        ids, positions, logps, masses = request.input_ids, request.position_ids, [], []
        while len(logps) < sampling.max_new_tokens:
            hidden = self.model.model.language_model(
                **embed(self.model, ids[None], features, [0], media_places([request], [0])),
                position_ids=positions[:, None],
                use_cache=False,
            ).last_hidden_state
            logp = (self.model.lm_head(hidden[0, -1:])[0].float() / (sampling.temperature or 1.0)).log_softmax(-1)
            allowed = logp.clone()
            allowed[self._banned] = -torch.inf
            drawn = torch.multinomial(allowed.softmax(-1), 1, generator=generator)
            chosen = drawn if sampling.temperature else allowed.argmax(keepdim=True)
            masses.append(float(logp[self._banned].exp().sum()))
            logps.append(logp[chosen])
            ids = torch.cat([ids, chosen])
            positions = torch.cat([positions, (positions.max() + 1).expand(3, 1)], 1)
            if int(chosen) == self.eos_id:
                break
        return Completion(ids[len(request.input_ids) :], torch.cat(logps), sum(masses) / len(masses))


@contextlib.contextmanager
def serving(settings: RunConfig, folder: str, *, token: str = "", port: int = 0, **facts) -> Iterator[SimpleNamespace]:
    """Serve the model in a folder from this process.

    Args:
        settings: settings of the run.
        folder: the model.
        token: secret of the server.
        port: port to listen on; 0 = a free one.
        facts: facts that differ from those of the model.
    Returns:
        The server with its `url`, `engine` and `service`, `stop`, which ends it as a signal does, and `ended`, the
        error that has ended it.
    """

    class Ended(BaseException):
        """What a signal raises."""

    def check() -> None:
        if ended.is_set():
            raise Ended

    def work() -> None:
        try:
            loop.run(check)
        except BaseException as error:
            found.ended = error

    engine, ended = HfSampler(folder), threading.Event()
    known = {**facts_of(Path(folder), settings), **facts}
    loop = EngineLoop(engine)
    service = Service(loop, known, {"vLLM": "none", "on": "CPU"})
    limit = most_bytes(engine.model.config, dtype=torch.float32, max_tokens=known["max_tokens"])
    server = RolloutServer("127.0.0.1", port, token=token, most_bytes=limit)
    server.service = service
    server.start()
    thread = threading.Thread(target=work, daemon=True)
    found = SimpleNamespace(url=server.url, engine=engine, service=service, server=server, ended=None)
    found.stop = ended.set
    thread.start()
    try:
        yield found
    finally:
        engine.ready.set()
        ended.set()
        thread.join(60)
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ServerProcess:
    """Run a rollout server on a loopback port in its own process, as a context manager.

    Args:
        command: program and arguments, without the port.
        log: file for its output.
        port: port to listen on; None = a free one.
    """

    def __init__(self, command: list[str], log: Path, *, port: int | None = None) -> None:
        self.port, self._log = port or free_port(), log
        self._command = [*command, "--port", str(self.port)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ServerProcess:
        # vLLM compiles parts of its sampler, which takes half a minute on a CPU.
        own = {**environment(), "TORCHDYNAMO_DISABLE": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + START_S
        while "serving rollouts at" not in self.log():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no rollout server: {' '.join(self._command)}\n{self.log()[-6000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *exception) -> None:
        self.kill()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(60)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


if __name__ == "__main__":
    # Serve a model folder with the settings of a run: recipe, settings, --port, a free port.
    *arguments, _, number = sys.argv[1:]
    loaded = load_settings(arguments[0], [*arguments[1:], "rollout.server_urls=[http://127.0.0.1:1]"])
    with serving(loaded, model_path_of(loaded), port=int(number)) as running:
        print(f"serving rollouts at {running.url}", flush=True)
        threading.Event().wait()
