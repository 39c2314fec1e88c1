"""Run programs of the package in forks of a process that has already imported it.

A short training run is mostly imports, its own and those of the processes that decode its media. A fork runs
`python -m MODULE` with the imports done: its arguments, folder and output are its own, and it ends like any other
process. Forks have the hash seed of their parent, so code that depends on the order of a set shows it only in runs with
interpreters of their own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

# What a training run imports. Nothing here may start a thread, because a fork would not have the threads.
IMPORTS = (
    *("torch", "deepspeed", "torchcodec.decoders", "transformers.models.qwen3_vl.modeling_qwen3_vl"),
    *("rmsd_fast.train_run", "rmsd_fast.stages.distill", "rmsd_fast.stages.sft", "rmsd_fast.stages.evaluation"),
    *("rmsd_fast.rollout.hf", "rmsd_fast.runtime.engine", "rmsd_fast.runtime.checkpoint", "rmsd_fast.report"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "networkx"),
    *("deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "rmsd_fast.data.decode_worker"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin"),
    *("rmsd_fast.program", "setuptools", "multiprocessing.synchronize"),
)
# Time that the other processes of a group have to end after one has failed.
GRACE_S = 30.0
POLL_S = 0.02
# Variables that pytest changes with each test.
_OF_PYTEST = "PYTEST_"
# A training run starts a fork server of the decoder for its media and one for its report.
DECODERS = 2


def serve() -> None:
    """Answer requests, one line of stdin each: start processes, or tell how processes have ended."""
    for name in IMPORTS:
        __import__(name)
    settings = sys.modules["rmsd_fast.settings"]
    # These fill caches with the defaults and the documentation of the settings.
    settings.load_settings("quickstart")
    settings.describe_settings()
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()
    if threads > 1:
        raise RuntimeError(f"expected one thread before the first fork, got {threads}; see IMPORTS")
    codes: dict[int, int] = {}
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
            print(json.dumps([codes.get(pid) for pid in request["poll"]]), flush=True)
            continue
        children = []
        for variables in request["variables"]:
            child = os.fork()
            if not child:
                _become(request, variables)
                return
            # The system gives the ids of ended processes to new ones.
            codes.pop(child, None)
            children.append(child)
        print(json.dumps(children), flush=True)


def _become(request: dict, variables: dict[str, str]) -> None:
    """Run the program of a request in this fork."""
    if request["new_session"]:
        os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, path in enumerate(request["outputs"], start=1):
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    # As with `python -m` or `python FILE.py`, in place of the folder of this file.
    is_file = request["module"].endswith(".py")
    sys.path[0] = os.path.dirname(request["module"]) if is_file else request["folder"]
    os.environ.update(variables)
    _prepare_decoders()
    for path in request["before"]:
        runpy.run_path(path)
    sys.argv = [request["module"], *request["arguments"]]
    if is_file:
        runpy.run_path(request["module"], run_name="__main__")
    else:
        # runpy warns about a module that was imported before.
        sys.modules.pop(request["module"], None)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _prepare_decoders() -> None:
    """Fork the processes that become the decoder's fork servers, while this process has one thread."""
    from rmsd_fast.data import decode_worker

    waiting: list[tuple[int, socket.socket]] = []
    for _ in range(DECODERS):
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            for connection in (ours, *(connection for _, connection in waiting)):
                connection.close()
            try:
                _decode(theirs)
            finally:
                os._exit(0)
        theirs.close()
        waiting.append((child, ours))

    def start(command: list[str], **options: Any) -> _Decoder | subprocess.Popen:
        return _Decoder(*waiting.pop(0), options) if waiting else subprocess.Popen(command, **options)

    decode_worker.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def _decode(connection: socket.socket) -> None:
    """Wait for a descriptor and an environment, and become a fork server of the decoder.

    End without them if the other side closes.
    """
    from rmsd_fast.data import decode_worker

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    variables, descriptors, _, _ = socket.recv_fds(connection, 2**20, 1)
    if variables:
        connection.close()
        os.environ.clear()
        os.environ.update(json.loads(variables))
        decode_worker.main(descriptors[0])


class _Decoder:
    """A fork server of the decoder in a waiting fork, with the methods of subprocess.Popen that its parent uses."""

    def __init__(self, pid: int, connection: socket.socket, options: dict[str, Any]) -> None:
        self.pid = pid
        self._lock = threading.Lock()
        self._code: int | None = None
        # The process may have been killed.
        with suppress(OSError):
            socket.send_fds(connection, [json.dumps(options["env"]).encode()], options["pass_fds"])
        connection.close()

    def poll(self) -> int | None:
        with self._lock:
            if self._code is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
                self._code = os.waitstatus_to_exitcode(status[1])
            return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.001)
        return code


class _Server:
    """The process that forks, and its session, in which all its forks are."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.forks: list[Fork] = []
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

    def ask(self, request: dict) -> list[Any]:
        """Return the answer to a request."""
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
        # A request may not have been written completely.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


_server: _Server | None = None


class Fork:
    """A program in a fork, with the methods of subprocess.Popen. It reads nothing and writes to files."""

    def __init__(self, server: _Server, pid: int, arguments: list[str], stderr: Path | str) -> None:
        self.pid = pid
        self.args = arguments
        self._stderr = Path(stderr)
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """Return the exit code, or None if the program is running."""
        if self.returncode is None:
            (self.returncode,) = self._server.ask({"poll": [self.pid]})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when the program has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended within the time.
        """
        deadline = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_S)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Return the text in the file for stderr when the program has ended, and remove the file. Raises as `wait`."""
        self.wait(timeout)
        text = self._stderr.read_text(errors="replace")
        self._stderr.unlink()
        return None, text

    def send_signal(self, number: int) -> None:
        """Send a signal, if the program has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if the program has not ended."""
        self.send_signal(signal.SIGKILL)


def start_programs(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    variables: list[dict[str, str]],
    *,
    stdout: Path | str = os.devnull,
    stderr: Path | str = os.devnull,
    before: tuple[str, ...] = (),
    new_session: bool = False,
) -> list[Fork]:
    """Start `python -m MODULE` or `python FILE.py` in forks.

    Another environment needs another process with the imports, because modules may read variables when they are
    imported.

    Args:
        module: name of the module, or path of the file.
        arguments: arguments of the program.
        environment: environment of the process with the imports.
        variables: additional variables of each fork.
        stdout, stderr: files that the forks append to; they are created if they do not exist.
        before: Python files to run before the program.
        new_session: whether each fork has a session of its own, as subprocess.Popen's `start_new_session`.
    Raises:
        RuntimeError: a program with another environment was running. It is killed.
    """
    global _server
    environment = {name: value for name, value in environment.items() if not name.startswith(_OF_PYTEST)}
    for path in (stdout, stderr):
        Path(path).open("a").close()
    request = {"module": module, "arguments": arguments, "folder": os.getcwd(), "outputs": [str(stdout), str(stderr)]}
    request |= {"variables": variables, "before": before, "new_session": new_session}
    if _server is not None and _server.environment != environment:
        running = [fork.args for fork in _server.forks if fork.poll() is None]
        _server.end()
        _server = None
        if running:
            raise RuntimeError(
                f"expected the programs with another environment to have ended, got {running}; wait first"
            )
    _server = _server or _Server(environment)
    forks = [Fork(_server, pid, [module, *arguments], stderr) for pid in _server.ask(request)]
    _server.forks = [fork for fork in _server.forks if fork.returncode is None] + forks
    return forks


def run_program(
    module: str, arguments: list[str], environment: dict[str, str], *, processes: int = 1, timeout_s: float
) -> subprocess.CompletedProcess:
    """Run `python -m MODULE` or `python FILE.py` to its end in forks, like subprocess.run with captured text.

    Several processes form a group with the variables and the store of torchrun. If one of them fails, the others are
    ended, as torchrun does.
    """
    global _server
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
        stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
        try:
            forks = start_programs(module, arguments, environment, variables, stdout=stdout, stderr=stderr)
            codes = _wait(forks, timeout_s)
        except BaseException:
            # Programs may still be running.
            if _server is not None:
                _server.end()
                _server = None
            raise
        if not any(codes) and None in codes:
            raise subprocess.TimeoutExpired([module, *arguments], timeout_s)
        # torchrun ends with 1 whatever the code of its process was.
        code = codes[0] if processes == 1 else int(any(codes))
        return subprocess.CompletedProcess([module, *arguments], code, stdout.read_text(), stderr.read_text())


def _wait(forks: list[Fork], timeout_s: float) -> list[int | None]:
    """Return the exit codes of forks. None: it was killed at the end of the time."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while running := [fork for fork in forks if fork.poll() is None]:
        if not failed and any(fork.returncode for fork in forks):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
            for fork in running:
                fork.send_signal(signal.SIGTERM)
        elif time.monotonic() > deadline:
            for fork in running:
                fork.kill()
                fork.wait()
            return [None if fork in running else fork.returncode for fork in forks]
        else:
            time.sleep(POLL_S)
    return [fork.returncode for fork in forks]


if __name__ == "__main__":
    serve()
