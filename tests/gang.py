"""A world of worker processes that outlives a test: importing Megatron takes longer than most cases."""

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIMIT_S = 400  # eight processes that import Megatron, or start an engine each, on two cores


class Gang:
    """``world_size`` processes joined by gloo; each call runs one function on all of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world_size, port, theirs))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What ``function(**arguments)`` returns on every rank; an exception of any rank fails the test."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT_S if not failures else 10):
                failures.append(f"rank {rank} gave no answer")
                continue
            status, value = pipe.recv()
            if status == "ok":
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _work(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    import torch.distributed as dist

    import megatron_rl.mcore  # noqa: F401  prepares Megatron-Core for the CPU

    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
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
