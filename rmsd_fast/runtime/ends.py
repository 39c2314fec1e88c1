"""Exchange exit notes between the processes of a job through torchrun's store, which outlives the processes."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from rmsd_fast.runtime.process_group import World, broadcast_object

# Seconds that another process waits for the main process to print the same message.
MAIN_S = 2.0
STORE_S = 10.0


class Ends:
    """Record why processes end. Without torchrun, or with a single process, every message is printed. All processes
    create this object together and agree on a name for this start, because torchrun's store outlives restarts.

    Args:
        world: this process in the run.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._store: dist.PrefixStore | None = None
        if world.size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        name = broadcast_object(uuid.uuid4().hex, world)
        with suppress(RuntimeError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, timeout=timedelta(seconds=STORE_S), wait_for_workers=False)
            self._store = dist.PrefixStore(f"rmsd_fast/{name}", store)

    def note(self, kind: str) -> None:
        """Record that this process is ending and reports the reason: a `fault`, or a signal to `stop`."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.add(kind, 1)

    def noted(self, *kinds: str) -> bool:
        """Return whether any process has recorded that it is ending for one of these reasons."""
        if self._store is None:
            return False
        try:
            return any(self._store.add(kind, 0) for kind in kinds)
        except RuntimeError:
            return False

    def is_mine_to_tell(self, message: str) -> bool:
        """Return whether this process should print a message that other processes may also want to print.

        The main process prints it. Any other process waits for up to MAIN_S seconds and prints it if the main process
        has not.
        """
        if self._store is None:
            return True
        key = hashlib.blake2b(message.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        try:
            if self._world.is_main:
                self._store.add(f"main/{key}", 1)
                return not self._store.check([f"others/{key}"])
            end = time.monotonic() + MAIN_S
            while not self._store.check([f"main/{key}"]):
                if time.monotonic() > end:
                    return self._store.add(f"others/{key}", 1) == 1
                time.sleep(0.05)
            return False
        except RuntimeError:
            return True


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because a process of the group has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
