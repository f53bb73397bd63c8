"""Rewards of a step to advantages of every token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    ADVANTAGES,
    TOKEN_ADVANTAGES,
    AdvantageSettings,
    GaeSettings,
    distillation_advantages,
    kl_penalty_to_go,
    process_advantages,
    rewards_to_go,
    whiten,
)
from megatron_rl.algorithms.kl import adapted_coef, k1
from megatron_rl.batching.sequences import with_rows
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.plugins import load_symbol
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.metrics.metric import Mean, Reduction, explained_variance, mean_max_min, mean_of
from megatron_rl.types import ParallelContext, TrainBatch, TrainSequence, TrainState


def compute_advantages(
    batch: TrainBatch, config: AlgorithmSection, parallel: ParallelContext, state: TrainState
) -> tuple[TrainBatch, dict[str, Reduction]]:
    """Add ``advantages``, and with a critic ``returns``; collective if advantages are whitened.

    Args:
        batch: with values if there is a critic, and with old and reference log-probabilities if the reward has a KL
            penalty.
        state: has the current coefficient of that penalty, where it is adaptive.

    Returns:
        the batch, and metrics over tokens, the same on the ranks that share them.
    """
    kl_coef = kl_reward_coef(state, config)
    metrics: dict[str, Reduction] = {}
    if config.advantage == "distillation":
        rows = [distillation_advantages(s.old_logprobs, s.ref_logprobs, s.loss_mask).float() for s in batch.sequences]
    elif config.uses_critic:
        rows, returns = _of_tokens(batch.sequences, config, kl_coef)
        batch = with_rows(batch, returns=returns)
        metrics |= _values_in_metrics(batch.sequences)
    else:
        rows = _of_responses(batch, config, kl_coef)
    if kl_coef or config.advantage == "distillation":
        masks = [sequence.loss_mask for sequence in batch.sequences]
        kls = [k1(s.old_logprobs, s.ref_logprobs)[mask] for s, mask in zip(batch.sequences, masks, strict=True)]
        metrics["critic/kl"] = mean_of(torch.cat(kls))
    if kl_coef:
        metrics["critic/kl_coef"] = Mean(kl_coef)
    if config.whiten_advantages:
        rows = _whitened(rows, batch.sequences, parallel)
    batch = with_rows(batch, advantages=rows)
    return batch, metrics | mean_max_min("critic/advantages", _taught(batch.sequences, "advantages"))


def kl_of_responses(sequences: Sequence[TrainSequence], parallel: ParallelContext) -> tuple[float, int]:
    """Mean KL divergence (k1) of a response of the step to the reference, in nats, and their number; collective."""
    counted = [s for s in sequences if s.loss_mask.any()] if parallel.is_model_parallel_main else []
    total = sum(float(k1(s.old_logprobs, s.ref_logprobs)[s.loss_mask].sum()) for s in counted)
    kl, count = (sum(column) for column in zip(*gather_objects((total, len(counted)), parallel), strict=True))
    return kl / count, int(count)


def _of_tokens(
    sequences: Sequence[TrainSequence], config: AlgorithmSection, kl_coef: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns by the critic's values."""
    settings = GaeSettings(
        gamma=config.gamma, lam=config.gae_lambda, turn_gamma=config.turn_gamma, turn_lam=config.turn_gae_lambda
    )
    estimate = TOKEN_ADVANTAGES[config.advantage]
    advantages, returns = [], []
    for sequence in sequences:
        rewards = sequence.rewards - kl_coef * k1(sequence.old_logprobs, sequence.ref_logprobs)
        found, expected = estimate(rewards, sequence.values, sequence.loss_mask, settings)
        advantages.append(found)
        returns.append(expected)
    return advantages, returns


def _of_responses(batch: TrainBatch, config: AlgorithmSection, kl_coef: float) -> list[Tensor]:
    """For every token its sequence's advantage among all of the step, less the KL penalties to come."""
    settings = AdvantageSettings(
        normalize_by_std=config.normalize_by_std, epsilon=config.std_epsilon, pass_k=config.pass_k
    )
    # siblings may sit on other ranks, so the rewards of the whole step are used
    if config.advantage == "process":
        rows = _of_steps(batch, settings)
    else:
        function = load_symbol(config.advantage, ADVANTAGES, "algorithm.advantage")
        outcomes = function(batch.rewards - batch.baselines, batch.groups, settings)
        rows = [
            torch.full(sequence.token_ids.shape, float(outcomes[index]) if index >= 0 else 0.0)
            for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
        ]
    if not kl_coef:
        return rows
    return [
        row - kl_penalty_to_go(s.old_logprobs, s.ref_logprobs, s.loss_mask, kl_coef)
        for row, s in zip(rows, batch.sequences, strict=True)
    ]


def _of_steps(batch: TrainBatch, settings: AdvantageSettings) -> list[Tensor]:
    """For every token the advantages of the steps of its sequence that end with it or later."""
    compared: dict[int, dict[int, float]] = {}
    for group in batch.groups.unique().tolist():
        siblings = (batch.groups == group).nonzero().flatten().tolist()
        found = process_advantages([batch.step_rewards[index] for index in siblings], settings)
        compared |= dict(zip(siblings, found, strict=True))
    return [
        rewards_to_go(compared.get(index, {}), sequence.loss_mask)
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
    ]


def _values_in_metrics(sequences: Sequence[TrainSequence]) -> dict[str, Reduction]:
    values, returns = _taught(sequences, "values").double(), _taught(sequences, "returns").double()
    return {
        **mean_max_min("critic/values", values),
        **mean_max_min("critic/returns", returns),
        "critic/vf_explained_var": explained_variance(values, returns),
    }


def _taught(sequences: Sequence[TrainSequence], name: str) -> Tensor:
    """[K] of all tokens with loss."""
    return torch.cat([getattr(sequence, name)[sequence.loss_mask] for sequence in sequences])


def _whitened(rows: Sequence[Tensor], sequences: Sequence[TrainSequence], parallel: ParallelContext) -> list[Tensor]:
    """Whitened over the tokens with loss of all ranks; 0 where there are fewer than two."""
    values = torch.cat([row[sequence.loss_mask] for row, sequence in zip(rows, sequences, strict=True)]).double()
    found = (values.numel(), float(values.sum()), float(values.square().sum()))
    mine = found if parallel.is_model_parallel_main else (0, 0.0, 0.0)
    count, total, squares = (sum(column) for column in zip(*gather_objects(mine, parallel), strict=True))
    if count < 2:
        return [torch.zeros_like(row) for row in rows]
    mean = total / count
    variance = max(0.0, (squares - count * mean**2) / (count - 1))
    return [whiten(row.double(), mean, variance).float() for row in rows]


def kl_reward_coef(state: TrainState, config: AlgorithmSection) -> float:
    """Current coefficient of the KL penalty in the reward."""
    return config.kl_reward_coef if state.kl_reward_coef is None else state.kl_reward_coef


def update_kl_coef(
    state: TrainState, batch: TrainBatch, config: AlgorithmSection, parallel: ParallelContext
) -> TrainState:
    """Adapt that coefficient for the next step, if ``algorithm.kl_reward_target`` is set; collective then.

    Source: Ziegler et al., arXiv 1909.08593 section 2.2.
    """
    if config.kl_reward_target is None:
        return state
    kl, count = kl_of_responses(batch.sequences, parallel)
    coef = kl_reward_coef(state, config)
    return replace(
        state, kl_reward_coef=adapted_coef(coef, kl, config.kl_reward_target, count, config.kl_reward_horizon)
    )
