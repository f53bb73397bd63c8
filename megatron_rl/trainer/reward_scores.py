"""Add the scores of a reward model to the rewards of a step."""

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
    """Finds the tokens at which the reasoning steps of a response end."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._before = tokenizer.encode("a", add_special_tokens=False)

    def scored_positions(self, rollout: Rollout, separator: str | None) -> list[int]:
        """Indices of the tokens to score: the end of each step, or the last sampled token without a separator."""
        sampled = (rollout.policy_versions >= 0).nonzero().flatten().tolist()
        if separator is None:
            return sampled[-1:]
        texts = [self._text(int(rollout.token_ids[position])) for position in sampled]
        return [sampled[end] for end in step_ends(texts, separator)]

    def _text(self, token_id: int) -> str:
        """Text of a token after another one: some tokenizers drop the space before the first token of a text."""
        if token_id not in self._texts:
            pair, prefix = (
                self._tokenizer.decode(ids, skip_special_tokens=True)
                for ids in ([*self._before, token_id], self._before)
            )
            self._texts[token_id] = pair[len(prefix) :]
        return self._texts[token_id]


class RewardModelScorer:
    """Adds a reward model's scores to the rewards of the reward functions."""

    def __init__(self, model: RewardModel, config: RewardModelSection, finder: StepFinder) -> None:
        self._model = model
        self._config = config
        self._finder = finder

    def add_scores(self, rollouts: RolloutBatch) -> tuple[RolloutBatch, dict[str, Reduction]]:
        """Add the scores to the rewards; return the rollouts and ``reward_model/…`` metrics; collective.

        Rollouts whose reward failed, and empty ones, stay unchanged.

        Raises:
            RewardError: on every rank, if a score is not finite.
        """
        positions = [[self._positions(rollout) for rollout in group.rollouts] for group in rollouts.groups]
        rows = list(zip(rollouts.groups, positions, strict=True))
        to_score = [
            (rollout, indices)
            for group, row in rows
            for rollout, indices in zip(group.rollouts, row, strict=True)
            if indices
        ]
        scores = iter(self.scores(to_score))
        groups = [
            replace(
                group,
                rollouts=[
                    self._with_scores(rollout, indices, next(scores)) if indices else rollout
                    for rollout, indices in zip(group.rollouts, row, strict=True)
                ],
            )
            for group, row in rows
        ]
        parts = [
            rollout.reward_parts[PART] for group in groups for rollout in group.rollouts if PART in rollout.reward_parts
        ]
        metrics: dict[str, Reduction] = {}
        if self._model.parallel.is_main and parts:
            metrics |= mean_max_min("reward_model/score", parts)
            metrics |= mean_max_min("reward_model/num_scored", [float(len(indices)) for _, indices in to_score])
        return replace(rollouts, groups=groups), metrics

    def scores(self, to_score: Sequence[tuple[Rollout, Sequence[int]]]) -> list[list[float]]:
        """Scores of each rollout at the given tokens, after the activation; collective.

        Args:
            to_score: rollouts, each with the indices of the tokens to score.

        Raises:
            RewardError: a score is not finite.
        """
        sequences = [labelled_sequence(rollout.token_ids.tolist(), indices) for rollout, indices in to_score]
        activation: Callable[[Tensor], Tensor] = (
            torch.sigmoid if self._config.activation == "sigmoid" else torch.Tensor.float
        )
        scores = [activation(row).tolist() for row in self._model.scores(sequences)]
        if not all(math.isfinite(score) for score in _flat(scores)):
            raise RewardError(
                f"the reward model {self._config.path} gave a score that is not finite. Fix or replace it."
            )
        return scores

    def _positions(self, rollout: Rollout) -> list[int]:
        """Indices of the tokens to score; none if the rollout's reward failed."""
        is_ok = rollout.status == "ok"
        return self._finder.scored_positions(rollout, self._config.step_separator) if is_ok else []

    def _with_scores(self, rollout: Rollout, positions: Sequence[int], scores: Sequence[float]) -> Rollout:
        weight, steps = self._config.weight, dict(rollout.step_rewards)
        if self._config.aggregation == "each":
            total = sum(scores)
            for position, score in zip(positions, scores, strict=True):
                steps[position] = steps.get(position, 0.0) + weight * score
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
