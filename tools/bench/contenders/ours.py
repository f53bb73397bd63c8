"""The contender megatron_rl: the parts of its training loop, on one rank.

A step does the work of ``megatron_rl.trainer.loop.train_step``, without evaluation, checkpoints and files.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from contenders.worker import Clock, serve
from contenders.workload import BETAS, CLIP_GRAD, STD_EPSILON, Workload
from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.batching.batch import make_batch
from megatron_rl.config import RunConfig
from megatron_rl.config.load import load_config
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.runtime.parallel import init_parallel
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.trainer.advantages import compute_advantages
from megatron_rl.trainer.build import build_collector, build_engine, build_rollout_source, build_supervisor
from megatron_rl.trainer.experience import compute_old_logprobs
from megatron_rl.trainer.inputs import read_inputs
from megatron_rl.trainer.metrics import batch_metrics, rollout_metrics
from megatron_rl.types import TrainBatch, TrainState


def configuration(workload: Workload) -> RunConfig:
    """Configuration of the workload, everything else at its default."""
    fields = {
        "run": {"name": "bench", "output_dir": workload.folder + "/run", "num_steps": 1_000_000, "seed": workload.seed},
        "model": {"path": workload.folder, "dtype": "fp32"},
        "data": {"train": {"kind": "jsonl", "path": str(workload.prompts_file), "answer_field": None}},
        "rollout": {
            "num_prompts_per_step": workload.num_prompts,
            "group_size": workload.group_size,
            "max_new_tokens": workload.new_tokens,
        },
        "reward": {"functions": [{"name": "coin_flip"}]},
        "algorithm": {"std_epsilon": STD_EPSILON},
        "optimizer": {
            "lr": workload.lr,
            "weight_decay": 0.0,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "clip_grad": CLIP_GRAD,
        },
    }
    path = Path(workload.folder) / "ours.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_config(path)


class OurLoop:
    """The objects that a run builds, and one step of its loop."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(workload.threads)
        self.config = configuration(workload)
        self.parallel = init_parallel(self.config.parallel)
        inputs = read_inputs(self.config, self.parallel)
        self.policy = Policy(self.config, self.parallel)
        engine = build_engine(self.config, self.policy)
        self._supervisor = build_supervisor(self.config, engine, self.policy)
        collector = build_collector(self.config, inputs, self._supervisor, self.policy)
        self._source = build_rollout_source(self.config, inputs, collector, self.parallel)
        self._steps = 0
        self._prompts = 0

    def rollouts(self, clock: Clock) -> tuple[RolloutBatch, TrainBatch]:
        """Generate, grade and compute advantages: everything before the update."""
        with clock.phase("push"):
            self._supervisor.push(version=self._steps)
        with clock.phase("generation"):
            rollout_batch = self._source.collect(self._steps + 1, self._prompts)
        batch = make_batch(rollout_batch.groups, self.config, self.parallel)
        correction = build_correction(self.config.algorithm)
        needs_old = needs_old_logprobs(self.config.algorithm, correction, num_updates=len(batch.updates))
        if needs_old:
            batch = compute_old_logprobs(batch, self.policy)
        batch, _ = compute_advantages(batch, self.config.algorithm, self.parallel, TrainState())
        self._steps += 1
        self._prompts += rollout_batch.num_prompts
        return rollout_batch, batch

    def step(self, clock: Clock) -> dict[str, Any]:
        """Make one step; return the work that it did."""
        rollout_batch, batch = self.rollouts(clock)
        with clock.outside("logprobs"):  # needed only with several updates per batch, or a reference
            self.policy.logprobs(batch)
        with clock.phase("update"):
            metrics = self.policy.update(batch)
        metrics |= rollout_metrics(rollout_batch, version=self._steps, has_rewards=True, parallel=self.parallel)
        metrics |= batch_metrics(batch, self.policy.spec, self.parallel)
        rollouts = [rollout for group in rollout_batch.groups for rollout in group.rollouts]
        return {
            "sequences": len(rollouts),
            "new_tokens": sum(int(rollout.loss_mask.sum()) for rollout in rollouts),
            "tokens": sum(rollout.token_ids.numel() for rollout in rollouts),
            "updates": len(batch.updates),
        }

    def weights(self) -> float:
        """Sum of all weights."""
        return sum(float(tensor.double().sum()) for _, tensor in self.policy.export())

    def num_parameters(self) -> int:
        """Number of parameters, as a checkpoint holds them."""
        return sum(tensor.numel() for _, tensor in self.policy.export())


def main() -> None:
    """Entry point of the process."""
    loop = OurLoop(Workload.from_json(sys.argv[1]))
    serve({"parameters": loop.num_parameters()}, loop.step, loop.weights)


if __name__ == "__main__":
    main()
