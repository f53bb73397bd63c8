"""Who is where: each rank says what it is doing, and a run that has come to a halt says so and ends.

A thread of every rank writes its place into the world's store, which does not need the rank's main thread. The first
rank's thread reads all of them, for which a rank that died or hangs cannot make it wait.
"""

import faulthandler
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from megatron_rl.types import ParallelContext

STUCK = 70
"""Exit status of a run that has come to a halt (EX_SOFTWARE of sysexits.h)."""
BEAT_S = 5.0
SILENT_S = 300.0
"""The same for every limit above it: a rank that lives says a word every BEAT_S."""
HALTED = "halted"
"""In the world's store, once the first rank has found that the run has come to a halt."""
STACK_S = 60.0
"""Longest time that py-spy may take."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    progress_s: float
    """Seconds since 1970 of its last progress."""
    said_s: float
    """Seconds since 1970 when its thread said so."""


class Heartbeat:
    """This rank's place, and the thread that says it."""

    def __init__(
        self, parallel: ParallelContext, *, stuck_s: float | None, end: Callable[[int], None] = os._exit
    ) -> None:
        """
        Args:
            stuck_s: seconds without progress of any rank after which the run ends; None: never.
            end: what ends the process.
        """
        self._parallel, self._stuck_s, self._end = parallel, stuck_s, end
        self._phase, self._step, self._progress = "start", 0, time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """A phase begins; progress."""
        self._phase = phase
        self.progress()

    def begin_step(self, step: int) -> None:
        """A step begins; progress."""
        self._step = step
        self.progress()

    def progress(self) -> None:
        """Something was done."""
        self._progress = time.time()

    def close(self) -> None:
        """Say nothing any more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(BEAT_S, (self._stuck_s or BEAT_S) / 4)):
            try:
                self._say()
                if self._parallel.is_main and self._stuck_s is not None:
                    self._judge(self._stuck_s)
                is_halted = self._parallel.store.check([HALTED])
            except RuntimeError:  # the store went with the first rank; collectives with it fail by themselves
                return
            if is_halted:
                print(f"rank {self._parallel.rank}: {stack()}", file=sys.stderr, flush=True)
                if self._parallel.is_main:
                    time.sleep(2 * BEAT_S)  # it has the store, by which the others hear
                self._end(STUCK)
                return

    def _judge(self, stuck_s: float) -> None:
        """Whether a rank is silent, or none comes any further: one alone may wait for others that still work."""
        beats, now = self._read(), time.time()
        is_stuck = all(now - beat.progress_s > stuck_s for beat in beats.values())
        if not self._over.is_set() and (
            is_stuck or any(now - beat.said_s > silent_s(stuck_s) for beat in beats.values())
        ):
            print(describe(beats, self._parallel.world_size, now, stuck_s), file=sys.stderr, flush=True)
            self._parallel.store.set(HALTED, "1")

    def _say(self) -> None:
        beat = Beat(
            rank=self._parallel.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=self._phase,
            step=self._step,
            progress_s=self._progress,
            said_s=time.time(),
        )
        self._parallel.store.set(f"heartbeat/{beat.rank}", json.dumps(asdict(beat)))

    def _read(self) -> Mapping[int, Beat]:
        found = {}
        for rank in range(self._parallel.world_size):
            key = f"heartbeat/{rank}"
            if self._parallel.store.check([key]):
                found[rank] = Beat(**json.loads(self._parallel.store.get(key)))
        return found


def silent_s(stuck_s: float) -> float:
    """Seconds without a word from a rank's thread after which the rank counts as dead."""
    return min(SILENT_S, stuck_s)


def describe(beats: Mapping[int, Beat], world_size: int, now: float, stuck_s: float) -> str:
    """Who is where, those that others wait for first.

    Args:
        now: seconds since 1970.
    """
    limit = silent_s(stuck_s)
    lines = ["this run has come to a halt. Longest without progress first:"]
    for beat in sorted(beats.values(), key=lambda beat: (beat.said_s > now - limit, beat.progress_s)):
        place = f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"
        said = "" if now - beat.said_s <= limit else f", silent for {now - beat.said_s:.0f} s: dead or unreachable"
        lines.append(f"  {place}: step {beat.step}, {beat.phase}, no progress for {now - beat.progress_s:.0f} s{said}")
    missing = [str(rank) for rank in range(world_size) if rank not in beats]
    if missing:
        lines.append(f"  never heard of: ranks {', '.join(missing)}")
    return "\n".join(lines)


def stack() -> str:
    """Where this process stands: by py-spy, with native frames, or by Python's own faulthandler on stderr."""
    spy = shutil.which("py-spy")
    if spy is not None:
        command = [spy, "dump", "--native", "--pid", str(os.getpid())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STACK_S)
        except subprocess.TimeoutExpired:
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout
    faulthandler.dump_traceback(all_threads=True)
    return "its stack is above"
