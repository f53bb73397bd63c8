"""Restarts of engines that died, and pushes of the policy's weights."""

from collections.abc import Callable, Mapping, Sequence

from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.errors import EngineDied
from megatron_rl.metrics.metric import Reduction
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.types import ParallelContext


class EngineSupervisor:
    """Restarts the engines of all ranks that died, up to ``max_failures`` times, and pushes the policy's weights."""

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
            engine: engine of this rank.
            parallel: layout of this rank.
            max_failures: maximum number of engine restarts in the run.
            push: sends the policy's weights to every engine that does not have the given version; collective.
        """
        self.engine = engine
        self._parallel = parallel
        self._max_failures = max_failures
        self._push = push
        self._notes: list[str] = []
        self.num_failures = 0
        """Number of engine failures of the run so far."""

    def push(self, version: int) -> dict[str, Reduction]:
        """Push the policy's weights to the engines, again if an engine dies meanwhile; collective.

        Args:
            version: policy version of the weights.

        Returns:
            Metrics of the push; empty if all engines already had the version.

        Raises:
            EngineDied: engines died too often.
            WeightSyncError: the push failed.
        """
        while True:
            try:
                return dict(self._push(version))
            except EngineDied as error:  # raised on all ranks, also on those whose engine is alive
                if not self.restart_dead():
                    raise EngineDied(
                        f"{error} It cannot be restarted, because no engine reports that it died."
                    ) from error

    def restart_dead(self) -> bool:
        """Restart the engines that died since their last use, without weights; collective.

        Returns:
            Whether any engine had died.

        Raises:
            EngineDied: engines died too often.
        """
        deaths = gather_objects((self.engine.place.index, self.engine.death), self._parallel)
        self.restart(deaths)
        return any(death for _, death in deaths)

    def restart(self, deaths: Sequence[tuple[int, str]]) -> None:
        """Restart the engines that died, without weights; collective.

        Args:
            deaths: (engine index, why it died; empty if it is alive) of every rank.

        Raises:
            EngineDied: on every rank, if engines died more often than ``max_failures``.
        """
        dead = {engine: death for engine, death in deaths if death}
        if not dead:
            return
        self.num_failures += len(dead)
        which = "; ".join(f"engine {index}: {death}" for index, death in sorted(dead.items()))
        if self.num_failures > self._max_failures:
            raise EngineDied(
                f"engines died {self.num_failures} times in this run, more than rollout.max_engine_failures="
                f"{self._max_failures}. Last: {which}. Find out why it died (out of memory?)."
            )
        self._notes.append(f"{which}; restarting, failure {self.num_failures} of at most {self._max_failures}")
        with raise_together(self._parallel):
            if self.engine.place.index in dead or self.engine.starts_together:
                self.engine.restart()

    def take_notes(self) -> list[str]:
        """Return the new messages for the user, each once."""
        notes, self._notes = self._notes, []
        return notes
