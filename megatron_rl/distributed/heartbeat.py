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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from megatron_rl.config import RunConfig
from megatron_rl.types import ParallelContext

STUCK = 70
"""Exit status of a run that has come to a halt (EX_SOFTWARE of sysexits.h)."""
BEAT_S = 5.0
SILENT_S = 300.0
"""A run ends when a rank's thread has said no word for so long, or for its limit if that is shorter."""
MISSED_BEATS = 3
"""So many make a rank count as dead once the run ends, for whatever reason."""
HALTED = "halted"
"""In the world's store, once a rank has found that the run has come to a halt."""
TOLD = "told"
"""In the world's store, once all ranks that live have said where they stand."""
STACK_S = 60.0
"""Longest time that py-spy may take."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a rank is, by its own clock."""

    rank: int
    host: str
    pid: int
    number: int
    """Counts the beats of a rank."""
    phase: str
    num_phases: int
    """Phases that it has entered; all ranks enter the same ones."""
    step: int
    idle_s: float
    """Seconds since its last progress."""
    is_over: bool = False
    """The rank has done its part and says nothing any more."""


@dataclass(frozen=True)
class ObservedBeat:
    """A beat, and when it was heard for the first time, by the clock of who heard it."""

    beat: Beat
    at_s: float

    def idle_s(self, now: float) -> float:
        return self.beat.idle_s + self.silent_s(now)

    def silent_s(self, now: float) -> float:
        return 0.0 if self.beat.is_over else now - self.at_s

    def is_unheard(self, now: float, stuck_s: float | None) -> bool:
        return self.silent_s(now) > MISSED_BEATS * beat_s(stuck_s)


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
        self._store = parallel.store.clone()  # a connection of its own: the other is held while something is awaited
        self._phase, self._num_phases, self._step = "start", 0, 0
        self._progress, self._number = time.monotonic(), 0
        self._heard: dict[int, ObservedBeat] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """A phase begins; progress."""
        self._phase = phase
        self._num_phases += 1
        self.progress()

    def begin_step(self, step: int) -> None:
        """A step begins; progress."""
        self._step = step
        self.progress()

    def progress(self) -> None:
        """Something was done."""
        self._progress = time.monotonic()

    def close(self) -> None:
        """Say nothing any more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            self._publish()
            while not self._over.wait(beat_s(self._stuck_s)):
                self._publish()
                if self._stuck_s is not None:
                    self._check_progress(self._stuck_s)
                if self._store.check([HALTED]):
                    self._tell_where()
                    self._end(STUCK)
                    return
            self._publish()
        except RuntimeError:  # the store went with the first rank; collectives with it fail by themselves
            return

    def _tell_where(self) -> None:
        """Print the stack, and wait until the others have: a launcher kills them once one has ended."""
        now, parallel = time.monotonic(), self._parallel
        # of the others the first rank alone hears
        alive = [
            rank for rank, one in self._heard.items() if not one.is_unheard(now, self._stuck_s) and not one.beat.is_over
        ]
        print(f"rank {parallel.rank}: {stack()}", file=sys.stderr, flush=True)
        self._store.set(f"{TOLD}/{parallel.rank}", "1")
        awaited = [f"{TOLD}/{rank}" for rank in alive] if parallel.is_main else [TOLD]
        end = now + STACK_S + (2 if parallel.is_main else 6) * BEAT_S
        while not self._store.check(awaited) and time.monotonic() < end:
            time.sleep(1.0)
        if parallel.is_main:
            self._store.set(TOLD, "1")
            time.sleep(BEAT_S)  # it has the store, by which the others hear

    def _check_progress(self, stuck_s: float) -> None:
        """Whether a rank is silent, or none comes any further: one alone may wait for others that still work.

        The first rank looks at all of them, the others at the first.
        """
        ranks = range(self._parallel.world_size) if self._parallel.is_main else range(1)
        heard, now = self._collect(ranks), time.monotonic()
        is_stuck = self._parallel.is_main and all(one.idle_s(now) > stuck_s for one in heard)
        is_silent = any(one.silent_s(now) > min(SILENT_S, stuck_s) for one in heard)
        if (is_stuck or is_silent) and not self._over.is_set() and not self._store.check([HALTED]):
            everyone = self._collect(range(self._parallel.world_size))
            print(describe(everyone, self._parallel.world_size, now, stuck_s), file=sys.stderr, flush=True)
            self._store.set(HALTED, "1")

    def _publish(self) -> None:
        self._number += 1
        beat = Beat(
            rank=self._parallel.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._number,
            phase=self._phase,
            num_phases=self._num_phases,
            step=self._step,
            idle_s=time.monotonic() - self._progress,
            is_over=self._over.is_set(),
        )
        self._store.set(f"heartbeat/{beat.rank}", json.dumps(asdict(beat)))

    def _collect(self, ranks: Iterable[int]) -> list[ObservedBeat]:
        for rank in ranks:
            key = f"heartbeat/{rank}"
            if self._store.check([key]):
                beat = Beat(**json.loads(self._store.get(key)))
                if rank not in self._heard or self._heard[rank].beat.number != beat.number:
                    self._heard[rank] = ObservedBeat(beat, time.monotonic())
        return [self._heard[rank] for rank in ranks if rank in self._heard]


def seconds_until_stuck(config: RunConfig) -> float | None:
    """run.hang_timeout_s with its default filled in; None: never."""
    asked = config.run.hang_timeout_s
    return (config.parallel.timeout_minutes * 50 if asked is None else asked) or None


def beat_s(stuck_s: float | None) -> float:
    """Seconds between a rank's words: so many within a limit that those who said none stand out when it is over."""
    return BEAT_S if stuck_s is None else min(BEAT_S, stuck_s / 8)


def describe(heard: Sequence[ObservedBeat], world_size: int, now: float, stuck_s: float) -> str:
    """Who is where, those that others wait for first.

    Args:
        now: by the clock of who heard them.
    """
    lines = ["this run has come to a halt. Those that others wait for first:"]
    missing = [str(rank) for rank in range(world_size) if rank not in {one.beat.rank for one in heard}]
    if missing:
        lines.append(f"  never heard of: ranks {', '.join(missing)}")
    for one in sorted(heard, key=lambda one: (not one.is_unheard(now, stuck_s), one.beat.num_phases, -one.idle_s(now))):
        beat = one.beat
        place = f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"
        is_unheard = one.is_unheard(now, stuck_s)
        said = f", silent for {one.silent_s(now):.0f} s: dead or unreachable" if is_unheard else ""
        lines.append(f"  {place}: step {beat.step}, {beat.phase}, no progress for {one.idle_s(now):.0f} s{said}")
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
