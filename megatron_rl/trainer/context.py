"""The objects that take part in every step."""

from dataclasses import dataclass

from megatron_rl.checkpointing.manager import Checkpoints
from megatron_rl.config import RunConfig
from megatron_rl.distributed.heartbeat import Heartbeat
from megatron_rl.evaluation.in_training import Examiner
from megatron_rl.evaluation.validation import Evaluator
from megatron_rl.rollout.engines.supervisor import EngineKeeper
from megatron_rl.rollout.source import Sampler
from megatron_rl.trainer.logger import RunLog
from megatron_rl.trainer.models import RunModels
from megatron_rl.trainer.reward_scores import Judge
from megatron_rl.trainer.state import is_due


@dataclass(frozen=True)
class Course:
    """What takes part in every step."""

    config: RunConfig
    models: RunModels
    sampler: Sampler
    judge: Judge | None
    evaluator: Evaluator | None
    examiner: Examiner | None
    keeper: EngineKeeper
    checkpoints: Checkpoints
    log: RunLog
    heartbeat: Heartbeat

    def evaluator_after(self, step: int) -> Evaluator | None:
        """Who has questions after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.evaluation.every, step, self.config.run.num_steps)
        return self.evaluator if is_asked else None

    def examiner_after(self, step: int) -> Examiner | None:
        """Who has benchmarks after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.evaluation.suite_every, step, self.config.run.num_steps)
        return self.examiner if is_asked else None
