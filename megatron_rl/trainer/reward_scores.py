"""What a reward model adds to the rewards of a step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.reasoning_steps import aggregated, step_ends
from megatron_rl.batching.reward_model import labelled_sequence
from megatron_rl.config.reward import RewardModelSection
from megatron_rl.errors import RewardError
from megatron_rl.mcore.reward_model import RewardModel
from megatron_rl.metrics.metric import Reduction, mean_max_min
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import Rollout

PART = "reward_model"


class StepFinder:
    """Finds where the steps of a response end among its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._before = tokenizer.encode("a", add_special_tokens=False)

    def judged_places(self, rollout: Rollout, separator: str | None) -> list[int]:
        """Tokens of the sequence at which a reward model is asked; without a separator only the last one sampled."""
        sampled = (rollout.policy_versions >= 0).nonzero().flatten().tolist()
        if separator is None:
            return sampled[-1:]
        texts = [self._text(int(rollout.token_ids[place])) for place in sampled]
        return [sampled[end] for end in step_ends(texts, separator)]

    def _text(self, token_id: int) -> str:
        """Behind another token: some tokenizers drop the space before the first one of a text."""
        if token_id not in self._texts:
            both, first = (
                self._tokenizer.decode(ids, skip_special_tokens=True)
                for ids in ([*self._before, token_id], self._before)
            )
            self._texts[token_id] = both[len(first) :]
        return self._texts[token_id]


class RewardModelScorer:
    """Adds a reward model's scores to what rules have found."""

    def __init__(self, model: RewardModel, config: RewardModelSection, finder: StepFinder) -> None:
        self._model = model
        self._config = config
        self._finder = finder

    def add_scores(self, rollouts: RolloutBatch) -> tuple[RolloutBatch, dict[str, Reduction]]:
        """The step with scores in its rewards, and ``reward_model/…`` metrics; collective.

        Rollouts whose reward failed, and empty ones, stay as they are.

        Raises:
            RewardError: on every rank, when a score is not finite.
        """
        places = [[self._places(rollout) for rollout in group.rollouts] for group in rollouts.groups]
        both = list(zip(rollouts.groups, places, strict=True))
        asked = [(one, at) for group, row in both for one, at in zip(group.rollouts, row, strict=True) if at]
        scores = iter(self.scores(asked))
        groups = [
            replace(
                group,
                rollouts=[
                    self._with_scores(one, at, next(scores)) if at else one
                    for one, at in zip(group.rollouts, row, strict=True)
                ],
            )
            for group, row in both
        ]
        parts = [one.reward_parts[PART] for group in groups for one in group.rollouts if PART in one.reward_parts]
        metrics: dict[str, Reduction] = {}
        if self._model.parallel.is_main and parts:
            metrics |= mean_max_min("reward_model/score", parts)
            metrics |= mean_max_min("reward_model/num_judged", [float(len(places)) for _, places in asked])
        return replace(rollouts, groups=groups), metrics

    def scores(self, asked: Sequence[tuple[Rollout, Sequence[int]]]) -> list[list[float]]:
        """Of each rollout its scores at some tokens, after the activation; collective.

        Raises:
            RewardError: one is not finite.
        """
        sequences = [labelled_sequence(rollout.token_ids.tolist(), places) for rollout, places in asked]
        activation: Callable[[Tensor], Tensor] = (
            torch.sigmoid if self._config.activation == "sigmoid" else torch.Tensor.float
        )
        found = [activation(row).tolist() for row in self._model.scores(sequences)]
        if not all(math.isfinite(score) for score in _flat(found)):
            raise RewardError(
                f"the reward model {self._config.path} gave a score that is not finite. Mend or replace it."
            )
        return found

    def _places(self, rollout: Rollout) -> list[int]:
        """Where the model is asked; nowhere when the rollout's reward failed."""
        is_ok = rollout.status == "ok"
        return self._finder.judged_places(rollout, self._config.step_separator) if is_ok else []

    def _with_scores(self, rollout: Rollout, places: Sequence[int], scores: Sequence[float]) -> Rollout:
        weight, steps = self._config.weight, dict(rollout.step_rewards)
        if self._config.aggregation == "each":
            total = sum(scores)
            for place, score in zip(places, scores, strict=True):
                steps[place] = steps.get(place, 0.0) + weight * score
        else:
            total = aggregated(scores, self._config.aggregation)
        return replace(
            rollout,
            reward=rollout.reward + weight * total,
            reward_parts={**rollout.reward_parts, PART: total},
            step_rewards=steps,
        )


def _flat(rows: Sequence[Sequence[float]]) -> Iterable[float]:
    return (score for row in rows for score in row)
