"""Validation on held-out prompts during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_rl.metrics.metric import Reduction, mean_max_min, mean_of
from megatron_rl.rollout.collector import Collector, Job
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.rollout.partial import begin_group
from megatron_rl.types import Prompt, SamplingParams

VALIDATION = 1_000_000_007  # index that separates the seeds of validation from those of training


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One validation response for samples.jsonl."""

    step: int
    prompt: str
    response: str
    answer: str | None
    reward: float


class Validator:
    """Generates and grades one response to each held-out prompt."""

    headline = ("val/score", "val/response_length/mean")
    """Metrics that are printed after each validation."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        multi_turn: MultiTurn | None,
        seed: int,
        num_samples: int,
    ) -> None:
        self._collector = collector
        self._prompts = prompts
        self._params = params
        self._multi_turn = multi_turn
        self._seed = seed
        self._num_samples = num_samples

    def validate(self, step: int) -> tuple[dict[str, Reduction], list[Sample]]:
        """Return ``val/…`` metrics, equal on every rank, and the first ``num_samples`` responses; collective.

        A response whose reward failed counts as 0 in the score and as 1 in ``val/failures``.
        """
        job = Job(
            name=f"evaluation/{step}",
            groups=[
                begin_group(prompt, (sample_seed(self._seed, VALIDATION, step, index),))
                for index, prompt in enumerate(self._prompts)
            ],
            params=self._params,
            schedule="static",
            functions="validation",
            version=step,
            multi_turn=self._multi_turn,
        )
        partial_groups = self._collector.collect(job)
        self._collector.check_rewards(partial_groups)
        groups = [group.as_group(index) for index, group in enumerate(partial_groups)]
        rollouts = [group.rollouts[0] for group in groups]
        names = sorted({name for rollout in rollouts for name in rollout.reward_parts})
        metrics: dict[str, Reduction] = {
            "val/score": mean_of([rollout.reward if rollout.status == "ok" else 0.0 for rollout in rollouts]),
            "val/failures": mean_of([rollout.status != "ok" for rollout in rollouts]),
            **{f"val/{name}": mean_of([r.reward_parts.get(name, 0.0) for r in rollouts]) for name in names},
            **mean_max_min("val/response_length", [float(rollout.loss_mask.sum()) for rollout in rollouts]),
        }
        samples = [
            Sample(
                step=step,
                prompt=group.prompt.text,
                response=group.rollouts[0].text,
                answer=group.prompt.answer,
                reward=group.rollouts[0].reward,
            )
            for group in islice(groups, self._num_samples)
        ]
        return metrics, samples
