"""Units of work shared out over processes and threads, with a progress bar."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise

import torch
from tqdm import tqdm

from megatron_rl.conversion.ranks import Ranks

# Bytes of a tensor that one thread holds at a time: so few stay in the processor's cache from read to write.
PIECE_BYTES = 2**20


class Progress:
    """Bytes that all ranks have converted; shown by the main one on a terminal."""

    def __init__(self, title: str, total_bytes: int, ranks: Ranks) -> None:
        self._ranks = ranks
        self._title = title
        self._lock = threading.Lock()
        # None: only where somebody watches
        hidden = None if ranks.is_main else True
        self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, unit_divisor=1000, disable=hidden)

    def add(self, num_bytes: int) -> None:
        """So many more are done."""
        with self._lock:
            if self._ranks.size == 1:
                self._bar.update(num_bytes)
            else:
                self._bar.update(self._ranks.add_up(self._title, num_bytes) - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def default_workers() -> int:
    """Threads of a process: reading and writing wait more than they compute."""
    return min(4, 1 + len(os.sched_getaffinity(0)))


def run_units(units: Sequence[int], do: Callable[[int], None], *, workers: int, ranks: Ranks) -> None:
    """Do this rank's share of the units; the first failure stops what has not begun, and is raised on every rank."""

    def mine() -> None:
        # each copies with one thread of torch: more would spin while they wait for each other
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(do, unit) for unit in units[ranks.rank :: ranks.size]]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    ranks.together(mine)


def group_by_bytes(sizes: Sequence[int], most: int) -> list[range]:
    """Consecutive places whose sizes sum to at most so much; what is larger stands alone."""
    starts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > most:
            starts.append(place)
            held = 0
        held += size
    return [range(first, stop) for first, stop in pairwise([*starts, len(sizes)])]


def row_pieces(num_rows: int, row_bytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Rows in runs of about so many bytes, as (first, stop)."""
    step = max(1, piece_bytes // max(1, row_bytes))
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)
