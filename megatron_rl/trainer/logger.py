"""Reduce the metrics of a step over ranks and write them to console, files and wandb."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.config import RunConfig
from megatron_rl.config.load import flatten
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.evaluation.validation import Sample
from megatron_rl.metrics.console import Console, SilentConsole, build_console
from megatron_rl.metrics.metric import Metrics, merge, results
from megatron_rl.metrics.sinks import JsonlSink, Sink, TensorboardSink, WandbSink
from megatron_rl.models.flops import peak_tflops
from megatron_rl.rollout.serialization import step_file, write_groups
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.run_folder import RunFolder
from megatron_rl.types import ParallelContext, TrainState


class RunLogger:
    """Reduces metrics over ranks; the first rank writes them."""

    def __init__(
        self,
        console: Console,
        sinks: Sequence[Sink],
        folder: RunFolder,
        parallel: ParallelContext,
        peak_tflops: float | None,
        *,
        keep_rollouts_every: int = 0,
        show_rollout_every: int = 0,
    ) -> None:
        """
        Args:
            peak_tflops: peak TFLOP/s of one rank's device, for ``perf/mfu/actor``; None: unknown.
            keep_rollouts_every: write the rollouts of every N-th step to a file; 0: never.
            show_rollout_every: show one rollout of every N-th step on the console; 0: never.
        """
        self._console = console
        self._sinks = sinks
        self._folder = folder
        self._parallel = parallel
        self._peak_tflops = peak_tflops
        self._keep_rollouts_every = keep_rollouts_every
        self._show_rollout_every = show_rollout_every
        self.profile_folder = folder.path / "profile"

    def note(self, text: str) -> None:
        """Print a line on the console."""
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
        """Append evaluated samples to the run folder and show the first on the console."""
        if not self._parallel.is_main or not samples:
            return
        self._folder.append_samples(samples)
        first = samples[0]
        self._console.sample(first.step, first.prompt, first.response, first.reward)

    def rollouts(self, step: int, rollouts: RolloutBatch) -> None:
        """Print the notes of a step's rollouts; write and show the rollouts if they are due; collective.

        Raises:
            DataError: on every rank, if the rollouts cannot be written.
        """
        for note in rollouts.notes:
            self.note(f"step {step}: {note}")
        if self._keep_rollouts_every and step % self._keep_rollouts_every == 0:
            with raise_together(self._parallel):
                if self._parallel.is_main:
                    write_groups(step_file(self._folder.rollouts, step), step, rollouts.groups)
        if self._show_rollout_every and step % self._show_rollout_every == 0:
            group = rollouts.groups[0]
            rollout = group.rollouts[0]
            self._console.sample(step, group.prompt.text, rollout.text, rollout.reward)

    def close(self) -> None:
        """Close the console and every sink."""
        self._console.close()
        for sink in self._sinks:
            sink.close()


def device_peak(config: RunConfig, parallel: ParallelContext) -> float | None:
    """Peak TFLOP/s of one rank's device; None if unknown."""
    if config.profiling.peak_tflops is not None or parallel.device.type != "cuda":
        return config.profiling.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(parallel.device))


def build_log(
    config: RunConfig | RewardTrainingConfig,
    folder: RunFolder,
    state: TrainState,
    parallel: ParallelContext,
    *,
    unlogged: bool = False,
) -> tuple[Console, list[Sink]]:
    """Console and metric sinks; silent and empty on every rank but the first.

    Args:
        unlogged: whether the metrics of the state's step are still to be written.
    """
    if not parallel.is_main:
        return SilentConsole(), []
    # a new run writes step 0 itself and discards what an earlier attempt has written
    kept = state.step - unlogged if state.step else -1
    sinks: list[Sink] = [JsonlSink(folder.metrics, kept)]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(folder.tensorboard, kept))
    if config.metrics.wandb != "disabled":
        assert state.wandb_id is not None
        plain: dict[str, Any] = flatten(config)
        sinks.append(
            WandbSink(
                folder.path,
                mode=config.metrics.wandb,
                project=config.metrics.wandb_project,
                name=config.run.name,
                run_id=state.wandb_id,
                config=plain,
            )
        )
    console = build_console(
        config.metrics.console, name=config.run.name, num_steps=config.run.num_steps, every=config.metrics.log_every
    )
    return console, sinks
