"""Heartbeats: every rank publishes its progress, and a run that hangs reports it and ends.

A thread of every rank writes the rank's progress to the world's store, also while the main thread is blocked. The first
rank's thread reads the progress of all ranks from the store, so a rank that died or hangs cannot block it.
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
"""Exit status of a run that hangs (EX_SOFTWARE of sysexits.h)."""
BEAT_S = 5.0
"""Longest time between two beats of a rank."""
SILENT_S = 300.0
"""A run ends if a rank publishes no beat for this long, or for ``run.hang_timeout_s`` if that is shorter."""
MISSED_BEATS = 3
"""Missed beats after which a rank is reported dead."""
HALTED = "halted"
"""Key in the world's store; set once a rank has found that the run hangs."""
REPORTED = "reported"
"""Key in the world's store; set once all live ranks have printed their stacks."""
STACK_S = 60.0
"""Timeout of py-spy."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Progress of a rank, timed by its own clock."""

    rank: int
    host: str
    pid: int
    number: int
    """Index of this beat among the beats of the rank."""
    phase: str
    num_phases: int
    """Number of phases that the rank has entered so far; all ranks enter the same ones."""
    step: int
    idle_s: float
    """Seconds since its last progress."""
    is_over: bool = False
    """Whether the rank has finished and publishes no more beats."""


@dataclass(frozen=True)
class ObservedBeat:
    """A beat, and the time at which it was first read, by the reader's clock."""

    beat: Beat
    at_s: float

    def idle_s(self, now: float) -> float:
        """Seconds since the last progress of the rank."""
        return self.beat.idle_s + self.silent_s(now)

    def silent_s(self, now: float) -> float:
        """Seconds without a new beat of the rank; 0 if it has finished."""
        return 0.0 if self.beat.is_over else now - self.at_s

    def is_missing(self, now: float, stuck_s: float | None) -> bool:
        """Whether the rank has missed more than MISSED_BEATS beats."""
        return self.silent_s(now) > MISSED_BEATS * beat_s(stuck_s)


class Heartbeat:
    """This rank's progress, and the thread that publishes it and checks that of other ranks."""

    def __init__(
        self, parallel: ParallelContext, *, stuck_s: float | None, end: Callable[[int], None] = os._exit
    ) -> None:
        """
        Args:
            stuck_s: the run ends after this many seconds without progress on any rank; None: never.
            end: ends the process with an exit status.
        """
        self._parallel, self._stuck_s, self._end = parallel, stuck_s, end
        self._store = parallel.store.clone()  # a separate connection: a wait on the other one blocks it
        self._phase, self._num_phases, self._step = "start", 0, 0
        self._progress, self._number = time.monotonic(), 0
        self._observed: dict[int, ObservedBeat] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Begin a phase; counts as progress."""
        self._phase = phase
        self._num_phases += 1
        self.progress()

    def begin_step(self, step: int) -> None:
        """Begin a step; counts as progress."""
        self._step = step
        self.progress()

    def progress(self) -> None:
        """Note that this rank is making progress."""
        self._progress = time.monotonic()

    def close(self) -> None:
        """Publish a last beat that says that this rank has finished, and stop the thread."""
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
                    self._report_stack()
                    self._end(STUCK)
                    return
            self._publish()
        except RuntimeError:  # the first rank, which hosts the store, is gone; collectives with it fail anyway
            return

    def _report_stack(self) -> None:
        """Print this rank's stack and wait for the other ranks, which a launcher kills once one rank has exited."""
        now, parallel = time.monotonic(), self._parallel
        # only the first rank observes all others
        alive = [
            rank
            for rank, observed in self._observed.items()
            if not observed.is_missing(now, self._stuck_s) and not observed.beat.is_over
        ]
        print(f"rank {parallel.rank}: {stack()}", file=sys.stderr, flush=True)
        self._store.set(f"{REPORTED}/{parallel.rank}", "1")
        awaited = [f"{REPORTED}/{rank}" for rank in alive] if parallel.is_main else [REPORTED]
        end = now + STACK_S + (2 if parallel.is_main else 6) * BEAT_S
        while not self._store.check(awaited) and time.monotonic() < end:
            time.sleep(1.0)
        if parallel.is_main:
            self._store.set(REPORTED, "1")
            time.sleep(BEAT_S)  # this process hosts the store that the others still read

    def _check_progress(self, stuck_s: float) -> None:
        """Mark the run as hanging if a rank is silent, or if no rank makes progress.

        One rank without progress is no hang: it may wait for others that still work. The first rank checks all ranks,
        the others check the first.
        """
        ranks = range(self._parallel.world_size) if self._parallel.is_main else range(1)
        beats, now = self._collect(ranks), time.monotonic()
        is_stuck = self._parallel.is_main and all(beat.idle_s(now) > stuck_s for beat in beats)
        is_silent = any(beat.silent_s(now) > min(SILENT_S, stuck_s) for beat in beats)
        if (is_stuck or is_silent) and not self._over.is_set() and not self._store.check([HALTED]):
            all_beats = self._collect(range(self._parallel.world_size))
            print(describe(all_beats, self._parallel.world_size, now, stuck_s), file=sys.stderr, flush=True)
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
                if rank not in self._observed or self._observed[rank].beat.number != beat.number:
                    self._observed[rank] = ObservedBeat(beat, time.monotonic())
        return [self._observed[rank] for rank in ranks if rank in self._observed]


def seconds_until_stuck(config: RunConfig) -> float | None:
    """``run.hang_timeout_s``, by default 5/6 of ``parallel.timeout_minutes``; None: never."""
    configured = config.run.hang_timeout_s
    return (config.parallel.timeout_minutes * 50 if configured is None else configured) or None


def beat_s(stuck_s: float | None) -> float:
    """Seconds between the beats of a rank, short enough for missed beats to show within ``stuck_s``."""
    return BEAT_S if stuck_s is None else min(BEAT_S, stuck_s / 8)


def describe(beats: Sequence[ObservedBeat], world_size: int, now: float, stuck_s: float) -> str:
    """Report of the progress of all ranks; those that others wait for come first.

    Args:
        now: current time by the clock of the process that read the beats.
    """
    # missing ranks first, then those that have entered the fewest phases
    lines = ["this run hangs. The ranks that the others wait for come first:"]
    missing = [str(rank) for rank in range(world_size) if rank not in {observed.beat.rank for observed in beats}]
    if missing:
        lines.append(f"  no heartbeat ever: ranks {', '.join(missing)}")
    for seen in sorted(beats, key=lambda b: (not b.is_missing(now, stuck_s), b.beat.num_phases, -b.idle_s(now))):
        beat = seen.beat
        process = f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"
        is_missing = seen.is_missing(now, stuck_s)
        silence = f", silent for {seen.silent_s(now):.0f} s: dead or unreachable" if is_missing else ""
        lines.append(f"  {process}: step {beat.step}, {beat.phase}, no progress for {seen.idle_s(now):.0f} s{silence}")
    return "\n".join(lines)


def stack() -> str:
    """Stacks of this process: from py-spy with native frames, or else printed to stderr by Python's faulthandler."""
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
