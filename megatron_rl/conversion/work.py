"""Distribute units of work over processes and threads, with a progress bar."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise

import torch
from tqdm import tqdm

from megatron_rl.conversion.ranks import Ranks

# Bytes of a tensor that one thread processes at a time; few enough to stay in the CPU's cache from read to write.
PIECE_BYTES = 2**20


class Progress:
    """Progress bar of the bytes that all ranks have converted; the main rank shows it, only on a terminal."""

    def __init__(self, title: str, total_bytes: int, ranks: Ranks) -> None:
        self._ranks = ranks
        self._title = title
        self._lock = threading.Lock()
        # None lets tqdm hide the bar unless the output is a terminal
        hidden = None if ranks.is_main else True
        self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, unit_divisor=1000, disable=hidden)

    def add(self, num_bytes: int) -> None:
        """Add converted bytes."""
        with self._lock:
            if self._ranks.size == 1:
                self._bar.update(num_bytes)
            else:
                self._bar.update(self._ranks.add_up(self._title, num_bytes) - self._bar.n)

    def close(self) -> None:
        """Stop updating the bar and leave it in the terminal."""
        self._bar.close()


def default_workers() -> int:
    """Default number of threads of a process: cores + 1, at most 4, as they wait for I/O more than they compute."""
    return min(4, 1 + len(os.sched_getaffinity(0)))


def run_units(units: Sequence[int], do: Callable[[int], None], *, workers: int, ranks: Ranks) -> None:
    """Call ``do`` for this rank's share of the units; collective.

    The first failure cancels the units of this rank that have not started, and is raised on every rank.
    """

    def run_own() -> None:
        # one torch thread per worker: more would spin while they wait for each other
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(do, unit) for unit in units[ranks.rank :: ranks.size]]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    ranks.together(run_own)


def group_by_bytes(sizes: Sequence[int], max_bytes: int) -> list[range]:
    """Split indices into consecutive groups of at most ``max_bytes``; a larger item is a group of its own."""
    starts, group_bytes = [0], 0
    for index, size in enumerate(sizes):
        if group_bytes and group_bytes + size > max_bytes:
            starts.append(index)
            group_bytes = 0
        group_bytes += size
    return [range(first, stop) for first, stop in pairwise([*starts, len(sizes)])]


def row_pieces(num_rows: int, row_bytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of consecutive rows of at most ``piece_bytes``, and of at least one row."""
    step = max(1, piece_bytes // max(1, row_bytes))
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)
