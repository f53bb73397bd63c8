"""Ranks that outlive a test, because joining a world takes longer than most tests."""

import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests import forked
from tests.limits import LIMIT_S

GRACE_S = 10.0
"""How long the other ranks may take to answer after one has failed, in seconds."""


class Gang:
    """``world_size`` processes joined by gloo; each call runs one function on all of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes: list[forked.Forked] = []
        for rank in range(world_size):
            parent_end, child_end = socket.socketpair()
            self._processes.append(forked.call(_work, rank, world_size, fds=[child_end.fileno()]))
            child_end.close()
            self._pipes.append(Connection(parent_end.detach()))
        port = self._pipes[0].recv()
        for pipe in self._pipes[1:]:
            pipe.send(port)
        self.is_open = True

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Return the results of ``function(**arguments)`` by rank; an exception on any rank fails the test."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            # after a failure the other ranks may wait for the failed one
            ready = wait(list(waiting), LIMIT_S if not failures else GRACE_S)
            if not ready:
                failures += [f"rank {rank} did not answer" for rank in waiting.values()]
                self.is_open = False  # the next call would otherwise receive the late answer to this one
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    status, value = pipe.recv()
                except EOFError:
                    status, value = "error", "the process has ended"
                    self.is_open = False
                if status == "ok":
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}:\n{value}")
        assert not failures, "\n".join(failures)
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.end(grace_s=GRACE_S if self.is_open else 0.0)


def _work(rank: int, world_size: int, fd: int) -> None:
    import torch.distributed as dist

    pipe = Connection(fd)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        pipe.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", function(**arguments)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
