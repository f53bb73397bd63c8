"""The objects that take part in every step, and the record of one step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.config import RunConfig
from megatron_rl.distributed.heartbeat import Heartbeat
from megatron_rl.distributed.signals import StopRequest
from megatron_rl.evaluation.in_training import BenchmarkEvaluator
from megatron_rl.evaluation.validation import Validator
from megatron_rl.metrics.metric import Metrics, Reduction, merge
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.trainer.logger import RunLogger
from megatron_rl.trainer.memory_tracker import MemoryTracker
from megatron_rl.trainer.models import RunModels
from megatron_rl.trainer.profiler import profiled
from megatron_rl.trainer.reward_scores import RewardModelScorer
from megatron_rl.types import ParallelContext


class Step:
    """Timers and metrics of one step on this rank.

    ``TrainState.step`` is the last step that is done: ``number - 1`` before the end of a step, ``number`` after it.
    """

    def __init__(self, number: int, on_phase: Callable[[str], None], metrics: Metrics | None = None) -> None:
        """
        Args:
            number: 1 for the first step; 0 before it.
            on_phase: called with the name of every timer as it starts.
            metrics: metrics of this step that a process has measured before it was stopped.
        """
        self.number = number
        self.metrics: dict[str, Reduction] = dict(metrics or {})
        self._stopwatch = Stopwatch(on_phase)

    def timer(self, name: str) -> AbstractContextManager[None]:
        """Time the body under ``timing_s/<name>``."""
        return self._stopwatch.span(name)

    def log(self, metrics: Metrics) -> None:
        """Add metrics; an existing metric of the same name is replaced."""
        self.metrics |= metrics

    def merge(self, metrics: Metrics) -> None:
        """Add metrics; an existing metric of the same name is reduced together with the new one."""
        self.metrics = merge([self.metrics, metrics])

    def metrics_with_timings(self) -> dict[str, Reduction]:
        """All metrics so far, with the seconds of every timer."""
        return merge([self.metrics, self._stopwatch.metrics()])


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The objects that take part in every step."""

    config: RunConfig
    models: RunModels
    supervisor: EngineSupervisor
    """Of this rank's engine."""
    rollout_source: RolloutSource
    reward_model: RewardModelScorer | None
    """None without ``reward.model``."""
    validator: Validator | None
    """None without ``data.validation``."""
    benchmarks: BenchmarkEvaluator | None
    """None without ``benchmarks.suite``."""
    checkpoints: CheckpointManager
    log: RunLogger
    memory: MemoryTracker
    heartbeat: Heartbeat
    stop: StopRequest

    @property
    def parallel(self) -> ParallelContext:
        """The policy's layout."""
        return self.models.policy.parallel

    def new_step(self, number: int, metrics: Metrics | None = None) -> Step:
        """A step whose timers report to the heartbeat."""
        return Step(number, self.heartbeat.enter, metrics)

    @contextmanager
    def begin_step(self, number: int) -> Iterator[Step]:
        """A new step, which outlives the body; the body is profiled if ``profiling`` selects step and rank."""
        self.heartbeat.begin_step(number)
        with profiled(self.config.profiling, self.log.profile_folder, number, self.parallel):
            yield self.new_step(number)
