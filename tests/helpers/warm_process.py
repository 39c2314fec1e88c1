"""Run programs of the package in forks of a process that has already imported it.

Half of the time of a short training run is spent on imports. A fork runs `python -m MODULE` with the imports done: its
arguments, folder and output are its own, and it ends like any other process. Forks have the hash seed of their parent,
so code that depends on the order of a set shows it only in runs with interpreters of their own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

# What a training run imports. Nothing here may start a thread or compute, because a fork would not have the threads.
IMPORTS = (
    *("torch", "deepspeed", "torchcodec.decoders", "transformers.models.qwen3_vl.modeling_qwen3_vl"),
    *("rmsd_fast.train_run", "rmsd_fast.stages.distill", "rmsd_fast.stages.sft", "rmsd_fast.stages.evaluation"),
    *("rmsd_fast.rollout.hf", "rmsd_fast.runtime.engine", "rmsd_fast.runtime.checkpoint", "rmsd_fast.report"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "networkx"),
)
# Time that the other processes of a group have to end after one has failed.
GRACE_S = 30.0
# Variables that pytest changes with each test.
_OF_PYTEST = "PYTEST_"


def serve() -> None:
    """Start the processes of each request, a line of stdin, and answer with their exit codes when all have ended.

    If one of them fails, the others are ended, as torchrun does.
    """
    for name in IMPORTS:
        __import__(name)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        children = {}
        for rank, variables in enumerate(request["variables"]):
            child = os.fork()
            if not child:
                _become(request, variables)
                return
            children[child] = rank
        print(json.dumps(_wait(children, request["timeout_s"])), flush=True)


def _wait(children: dict[int, int], timeout_s: float) -> list[int | None]:
    """Return the exit code of each rank. None: it was killed at the end of the time.

    Args:
        children: ranks by process id.
        timeout_s: time that they have.
    """
    codes: list[int | None] = [None] * len(children)
    deadline = time.monotonic() + timeout_s
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            code = codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if code:
                deadline = min(deadline, time.monotonic() + GRACE_S)
                for other in children:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            break
        else:
            time.sleep(0.02)
    return codes


def _become(request: dict, variables: dict[str, str]) -> None:
    """Run the program of a request in this fork."""
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, path in enumerate(request["outputs"], start=1):
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    # As with `python -m`, in place of the folder of this file.
    sys.path[0] = request["folder"]
    os.environ.update(variables)
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


class _Server:
    """The process that forks, and its session, in which all its forks are."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        atexit.register(self.end)

    def ask(self, request: dict) -> list[int | None]:
        """Return the exit codes of the processes of a request."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process with the imports has ended with code {self._process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Kill the process and its forks. Idempotent."""
        atexit.unregister(self.end)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


_server: _Server | None = None


def run_program(
    module: str, arguments: list[str], environment: dict[str, str], *, processes: int = 1, timeout_s: float
) -> subprocess.CompletedProcess:
    """Run `python -m MODULE` to its end in forks, like subprocess.run with captured text.

    Several processes form a group with the variables and the store of torchrun. Another environment needs another
    process with the imports, because modules may read variables when they are imported.
    """
    global _server
    environment = {name: value for name, value in environment.items() if not name.startswith(_OF_PYTEST)}
    variables: list[dict[str, str]] = [{}]
    if processes > 1:
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        variables = [
            {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for rank in range(processes)
        ]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        request = {"module": module, "arguments": arguments, "folder": os.getcwd(), "outputs": [*map(str, outputs)]}
        request |= {"variables": variables, "timeout_s": timeout_s}
        if _server is not None and _server.environment != environment:
            _server.end()
            _server = None
        _server = _server or _Server(environment)
        try:
            codes = _server.ask(request)
        except BaseException:
            # Its next answer would be that to this request.
            _server.end()
            _server = None
            raise
        if not any(codes) and None in codes:
            raise subprocess.TimeoutExpired([module, *arguments], timeout_s)
        # torchrun ends with 1 whatever the code of its process was.
        code = codes[0] if processes == 1 else int(any(codes))
        return subprocess.CompletedProcess([module, *arguments], code, *(path.read_text() for path in outputs))


if __name__ == "__main__":
    serve()
