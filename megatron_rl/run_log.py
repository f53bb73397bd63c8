"""One step's metrics from every rank to console, files and wandb."""

from collections.abc import Sequence

from megatron_rl.collective import gather_objects, raise_together
from megatron_rl.metrics.console import Console
from megatron_rl.metrics.metric import Metrics, merge, results
from megatron_rl.metrics.sinks import Sink
from megatron_rl.rollout.evaluator import Sample
from megatron_rl.rollout.record import step_file, write_groups
from megatron_rl.rollout.sampler import Collected
from megatron_rl.run_folder import RunFolder
from megatron_rl.types import ParallelContext, RolloutGroup


class RunLog:
    """Reduces over ranks; the first rank writes."""

    def __init__(
        self,
        console: Console,
        sinks: Sequence[Sink],
        folder: RunFolder,
        parallel: ParallelContext,
        peak_tflops: float | None,
        *,
        keep_rollouts_every: int,
    ) -> None:
        """
        Args:
            keep_rollouts_every: steps of which one has its rollouts written; 0: none has.
        """
        self._console = console
        self._sinks = sinks
        self._folder = folder
        self._parallel = parallel
        self._peak_tflops = peak_tflops
        self._keep_rollouts_every = keep_rollouts_every
        self.profile_folder = folder.path / "profile"

    def note(self, text: str) -> None:
        """A line for the person who watches."""
        self._console.note(text)

    def step(self, step: int, metrics: Metrics) -> None:
        """Reduce the metrics of a step and write them; collective."""
        values = results(merge(gather_objects(dict(metrics), self._parallel)))
        if "perf/total_num_tokens" in values:
            per_rank = values["perf/total_num_tokens"] / self._parallel.world_size
            values["perf/throughput"] = per_rank / values["timing_s/step"]
        if "timing_s/update_actor" in values and "perf/actor_tflop" in values:
            achieved = values["perf/actor_tflop"] / self._parallel.world_size / values["timing_s/update_actor"]
            values["perf/tflops_per_rank/actor"] = achieved
            if self._peak_tflops is not None:
                values["perf/mfu/actor"] = achieved / self._peak_tflops
        for sink in self._sinks:
            sink.write(step, values)
        self._console.step(step, values)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Keep evaluated samples and show the first."""
        if not self._parallel.is_main or not samples:
            return
        self._folder.append_samples(samples)
        first = samples[0]
        self._console.sample(first.step, first.prompt, first.response, first.reward)

    def collected(self, step: int, collected: Collected) -> None:
        """Keep the rollouts of a step, when it is their turn, and tell what happened to them; collective.

        Raises:
            DataError: on every rank, when they cannot be written.
        """
        for note in collected.notes:
            self.note(f"step {step}: {note}")
        if self._keep_rollouts_every == 0 or step % self._keep_rollouts_every:
            return
        with raise_together(self._parallel):
            if self._parallel.is_main:
                write_groups(step_file(self._folder.rollouts, step), step, collected.groups)

    def show(self, step: int, group: RolloutGroup) -> None:
        """Show a training rollout, for runs that have no held-out ones to show."""
        rollout = group.rollouts[0]
        self._console.sample(step, group.prompt.text, rollout.text, rollout.reward)

    def close(self) -> None:
        """Finish the console and flush every sink."""
        self._console.close()
        for sink in self._sinks:
            sink.close()
