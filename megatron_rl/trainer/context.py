"""The objects that take part in every step."""

from dataclasses import dataclass

from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.config import RunConfig
from megatron_rl.distributed.heartbeat import Heartbeat
from megatron_rl.evaluation.in_training import BenchmarkEvaluator
from megatron_rl.evaluation.validation import Validator
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.trainer.logger import RunLogger
from megatron_rl.trainer.models import RunModels
from megatron_rl.trainer.reward_scores import RewardModelScorer
from megatron_rl.trainer.state import is_due


@dataclass(frozen=True)
class Trainer:
    """What takes part in every step."""

    config: RunConfig
    models: RunModels
    sampler: RolloutSource
    judge: RewardModelScorer | None
    evaluator: Validator | None
    examiner: BenchmarkEvaluator | None
    keeper: EngineSupervisor
    checkpoints: CheckpointManager
    log: RunLogger
    heartbeat: Heartbeat

    def evaluator_after(self, step: int) -> Validator | None:
        """Who has questions after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.validation.every, step, self.config.run.num_steps)
        return self.evaluator if is_asked else None

    def examiner_after(self, step: int) -> BenchmarkEvaluator | None:
        """Who has benchmarks after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.benchmarks.every, step, self.config.run.num_steps)
        return self.examiner if is_asked else None
