"""Keeps the engines of all ranks alive and at the policy's version."""

from collections.abc import Callable, Mapping, Sequence

from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.errors import EngineDied
from megatron_rl.metrics.metric import Reduction
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.types import ParallelContext


class EngineSupervisor:
    """Starts engines again that died, as often as a run allows."""

    def __init__(
        self,
        engine: Engine,
        parallel: ParallelContext,
        *,
        max_failures: int,
        push: Callable[[int], Mapping[str, Reduction]],
    ) -> None:
        """
        Args:
            max_failures: restarts of engines in the whole run.
            push: brings the policy's weights to every engine that has not the version given; collective.
        """
        self.engine = engine
        self._parallel = parallel
        self._max_failures = max_failures
        self._push = push
        self._notes: list[str] = []
        self.num_failures = 0
        """Of the run so far."""

    def push(self, version: int) -> dict[str, Reduction]:
        """Give the engines the policy's weights; again, when one dies meanwhile. Collective.

        Returns:
            Metrics of the push; empty when all had the version already.

        Raises:
            EngineDied: engines died too often.
            WeightSyncError: as of the push.
        """
        while True:
            try:
                return dict(self._push(version))
            except EngineDied as error:  # all ranks raise it together, also those whose engine lives
                if not self.restart_dead():
                    raise EngineDied(
                        f"{error} It cannot be started again: none of the engines says that it died."
                    ) from error

    def restart_dead(self) -> bool:
        """Start engines again that died since they were last used; they have no weights then. Collective.

        Returns:
            whether there were any.

        Raises:
            EngineDied: engines died too often.
        """
        told = gather_objects((self.engine.place.index, self.engine.death), self._parallel)
        self.restart(told)
        return any(death for _, death in told)

    def restart(self, told: Sequence[tuple[int, str]]) -> None:
        """Start the engines again that died; collective.

        Args:
            told: (engine, how it ended or nothing) of every rank.

        Raises:
            EngineDied: on every rank, when that has happened too often.
        """
        dead = {engine: death for engine, death in told if death}
        if not dead:
            return
        self.num_failures += len(dead)
        which = "; ".join(f"engine {index}: {death}" for index, death in sorted(dead.items()))
        if self.num_failures > self._max_failures:
            raise EngineDied(
                f"engines died {self.num_failures} times in this run, more than rollout.max_engine_failures="
                f"{self._max_failures}. Last: {which}. Look for what ended it (out of memory?)."
            )
        self._notes.append(f"{which}; starting again, {self.num_failures} of at most {self._max_failures} times")
        with raise_together(self._parallel):
            if self.engine.place.index in dead or self.engine.starts_together:
                self.engine.restart()

    def take_notes(self) -> list[str]:
        """What the user should know, once."""
        notes, self._notes = self._notes, []
        return notes
