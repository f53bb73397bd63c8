"""Reward worker processes with hard time limits.

A worker that exceeds the time limit on a sample is killed and replaced; the sample's status is reward_timeout, and the
remaining samples go to the new worker. Workers are forked from a server that has already imported the reward modules,
so that a replacement starts fast and no thread or lock of the trainer is copied.
"""

import atexit
import multiprocessing
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from megatron_rl.config.reward import RewardSection
from megatron_rl.errors import RewardError
from megatron_rl.rewards.types import RewardInput, RewardResult
from megatron_rl.rewards.worker import FunctionSets, work

START_LIMIT_S = 600.0
_Request = tuple[str, Sequence[RewardInput], "Future[list[RewardResult]]"]


class RewardPool:
    """A pool of worker processes that grade lists of samples; results are returned as futures."""

    def __init__(self, config: RewardSection, functions: FunctionSets) -> None:
        """Start the workers.

        Args:
            functions: named sets of reward functions, for instance "train" and "validation".

        Raises:
            RewardError: a worker does not start.
        """
        self._config = config
        self._functions = functions
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["megatron_rl.rewards.server"])
        self._workers = [_Worker(self._context, config, functions) for _ in range(config.num_workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # the workers ignore SIGTERM, so close() must end them

    def submit(self, functions: str, samples: Sequence[RewardInput]) -> "Future[list[RewardResult]]":
        """Grade samples with a named set of functions; the results are in the order of the samples."""
        future: Future[list[RewardResult]] = Future()
        self._requests.put((functions, samples, future))
        return future

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        atexit.unregister(self.close)
        for _ in self._threads:
            self._requests.put(None)
        for thread, worker in zip(self._threads, self._workers, strict=True):
            thread.join(timeout=self._config.timeout_s)
            worker.kill()
        self._threads, self._workers = [], []

    def _serve(self, worker: "_Worker") -> None:
        while (request := self._requests.get()) is not None:
            functions, samples, future = request
            try:
                future.set_result(worker.grade(functions, samples))
            except BaseException as error:
                future.set_exception(error)


class _Worker:
    """A worker process and the trainer's end of its pipe."""

    def __init__(self, context: Any, config: RewardSection, functions: FunctionSets) -> None:
        self._context = context
        self._config = config
        self._functions = functions
        self._start()

    def grade(self, functions: str, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """Return one result per sample, even if the process crashes or hangs."""
        results: list[RewardResult] = []
        while len(results) < len(samples):
            try:
                self._connection.send((functions, samples[len(results) :]))
                while len(results) < len(samples):
                    results.append(self._receive())
                continue
            except TimeoutError:
                message = f"no result within reward.timeout_s={self._config.timeout_s}"
                results.append(_failed("reward_timeout", message))
            except (EOFError, OSError) as error:
                results.append(_failed("reward_error", f"the reward worker exited ({error!r}), perhaps out of memory"))
            self.kill()
            self._start()
        return results

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> RewardResult:
        if not self._connection.poll(self._config.timeout_s):
            raise TimeoutError
        result = self._connection.recv()
        assert isinstance(result, RewardResult)
        return result

    def _start(self) -> None:
        self._connection: Connection
        self._connection, worker_end = self._context.Pipe()
        limit = int(self._config.memory_limit_gb * 2**30)
        self._process = self._context.Process(target=work, args=(worker_end, self._functions, limit), daemon=True)
        self._process.start()
        worker_end.close()
        deadline = time.monotonic() + START_LIMIT_S
        try:
            if self._connection.poll(max(0.0, deadline - time.monotonic())) and self._connection.recv() == "ready":
                return
        except EOFError:
            pass
        self._process.kill()
        raise RewardError(
            f"a reward worker did not start within {START_LIMIT_S:.0f} s. Its error is printed above. "
            f"If it ran out of memory, raise reward.memory_limit_gb={self._config.memory_limit_gb}."
        )


def _failed(status: Any, message: str) -> RewardResult:
    return RewardResult(status=status, total=float("nan"), parts={}, message=message)
