"""Compute the advantage of every token from the rewards of a step."""

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
        batch: has ``values`` if there is a critic, and old and reference log-probabilities if the reward has a KL
            penalty or the advantage is ``distillation``.
        state: holds the current coefficient of the KL penalty if it is adaptive.

    Returns:
        The batch, and metrics over its tokens with loss; they are equal on ranks that share the same sequences.
    """
    kl_coef = kl_reward_coef(state, config)
    metrics: dict[str, Reduction] = {}
    if config.advantage == "distillation":
        rows = [distillation_advantages(s.old_logprobs, s.ref_logprobs, s.loss_mask).float() for s in batch.sequences]
    elif config.uses_critic:
        rows, returns = _critic_advantages(batch.sequences, config, kl_coef)
        batch = with_rows(batch, returns=returns)
        metrics |= _value_metrics(batch.sequences)
    else:
        rows = _response_advantages(batch, config, kl_coef)
    if kl_coef or config.advantage == "distillation":
        masks = [sequence.loss_mask for sequence in batch.sequences]
        kls = [k1(s.old_logprobs, s.ref_logprobs)[mask] for s, mask in zip(batch.sequences, masks, strict=True)]
        metrics["critic/kl"] = mean_of(torch.cat(kls))
    if kl_coef:
        metrics["critic/kl_coef"] = Mean(kl_coef)
    if config.whiten_advantages:
        rows = _whiten_over_ranks(rows, batch.sequences, parallel)
    batch = with_rows(batch, advantages=rows)
    return batch, metrics | mean_max_min("critic/advantages", _values_with_loss(batch.sequences, "advantages"))


def kl_of_responses(sequences: Sequence[TrainSequence], parallel: ParallelContext) -> tuple[float, int]:
    """Mean KL divergence (k1) to the reference per response, in nats, and the number of responses; collective."""
    counted = [s for s in sequences if s.loss_mask.any()] if parallel.is_model_parallel_main else []
    total = sum(float(k1(s.old_logprobs, s.ref_logprobs)[s.loss_mask].sum()) for s in counted)
    kl, count = (sum(column) for column in zip(*gather_objects((total, len(counted)), parallel), strict=True))
    return kl / count, int(count)


def _critic_advantages(
    sequences: Sequence[TrainSequence], config: AlgorithmSection, kl_coef: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of every token from the critic's values."""
    settings = GaeSettings(
        gamma=config.gamma, lam=config.gae_lambda, turn_gamma=config.turn_gamma, turn_lam=config.turn_gae_lambda
    )
    estimate = TOKEN_ADVANTAGES[config.advantage]
    advantages, returns = [], []
    for sequence in sequences:
        rewards = sequence.rewards - kl_coef * k1(sequence.old_logprobs, sequence.ref_logprobs)
        token_advantages, token_returns = estimate(rewards, sequence.values, sequence.loss_mask, settings)
        advantages.append(token_advantages)
        returns.append(token_returns)
    return advantages, returns


def _response_advantages(batch: TrainBatch, config: AlgorithmSection, kl_coef: float) -> list[Tensor]:
    """For every token, the advantage of its response minus the KL penalties from this token on."""
    settings = AdvantageSettings(
        normalize_by_std=config.normalize_by_std, epsilon=config.std_epsilon, pass_k=config.pass_k
    )
    # siblings may be on other ranks, so this uses the rewards of the whole step
    if config.advantage == "process":
        rows = _reasoning_step_advantages(batch, settings)
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


def _reasoning_step_advantages(batch: TrainBatch, settings: AdvantageSettings) -> list[Tensor]:
    """For every token, the sum of the advantages of the reasoning steps that end at it or later."""
    advantages_of: dict[int, dict[int, float]] = {}
    for group in batch.groups.unique().tolist():
        siblings = (batch.groups == group).nonzero().flatten().tolist()
        step_advantages = process_advantages([batch.step_rewards[index] for index in siblings], settings)
        advantages_of |= dict(zip(siblings, step_advantages, strict=True))
    return [
        rewards_to_go(advantages_of.get(index, {}), sequence.loss_mask)
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
    ]


def _value_metrics(sequences: Sequence[TrainSequence]) -> dict[str, Reduction]:
    values, returns = _values_with_loss(sequences, "values").double(), _values_with_loss(sequences, "returns").double()
    return {
        **mean_max_min("critic/values", values),
        **mean_max_min("critic/returns", returns),
        "critic/vf_explained_var": explained_variance(values, returns),
    }


def _values_with_loss(sequences: Sequence[TrainSequence], name: str) -> Tensor:
    """[K] values of the field ``name`` at all tokens with loss."""
    return torch.cat([getattr(sequence, name)[sequence.loss_mask] for sequence in sequences])


def _whiten_over_ranks(
    rows: Sequence[Tensor], sequences: Sequence[TrainSequence], parallel: ParallelContext
) -> list[Tensor]:
    """Whiten advantages over the tokens with loss of all ranks; all 0 if there are fewer than two such tokens."""
    values = torch.cat([row[sequence.loss_mask] for row, sequence in zip(rows, sequences, strict=True)]).double()
    sums = (values.numel(), float(values.sum()), float(values.square().sum()))
    own_sums = sums if parallel.is_model_parallel_main else (0, 0.0, 0.0)
    count, total, squares = (sum(column) for column in zip(*gather_objects(own_sums, parallel), strict=True))
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
    """Adapt the coefficient of the KL penalty for the next step; collective if ``algorithm.kl_reward_target`` is set.

    Without a target the state stays unchanged.

    Source: Ziegler et al., arXiv 1909.08593 section 2.2.
    """
    if config.kl_reward_target is None:
        return state
    kl, count = kl_of_responses(batch.sequences, parallel)
    coef = kl_reward_coef(state, config)
    return replace(
        state, kl_reward_coef=adapted_coef(coef, kl, config.kl_reward_target, count, config.kl_reward_horizon)
    )
