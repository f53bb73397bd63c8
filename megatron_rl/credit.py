"""The rewards of a step, shared out over the tokens of a batch as advantages."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import ADVANTAGES, AdvantageSettings, kl_penalty_to_go, whiten
from megatron_rl.algorithms.kl import k1
from megatron_rl.collective import gather_objects
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.plugins import load_symbol
from megatron_rl.types import ParallelContext, TrainBatch, TrainSequence


def add_advantages(
    batch: TrainBatch, config: AlgorithmSection, parallel: ParallelContext
) -> tuple[TrainBatch, dict[str, Reduction]]:
    """Give every token its sequence's advantage, less the KL penalties to come; collective if they are whitened.

    Args:
        batch: with the log-probabilities of trainer and reference if the reward has a KL penalty.

    Returns:
        the batch, and the mean KL in the reward, the same on the ranks that share its tokens.
    """
    function = load_symbol(config.advantage, ADVANTAGES, "algorithm.advantage")
    settings = AdvantageSettings(
        normalize_by_std=config.normalize_by_std, epsilon=config.std_epsilon, pass_k=config.pass_k
    )
    # siblings may sit on other ranks, so the rewards of the whole step are used
    outcomes = function(batch.rewards, batch.groups, settings)
    rows = [
        torch.full(sequence.token_ids.shape, float(outcomes[index]) if index >= 0 else 0.0)
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
    ]
    metrics: dict[str, Reduction] = {}
    if config.kl_reward_coef:
        rows = [
            row - kl_penalty_to_go(s.old_logprobs, s.ref_logprobs, s.loss_mask, config.kl_reward_coef)
            for row, s in zip(rows, batch.sequences, strict=True)
        ]
        metrics = _kl_in_reward(batch.sequences)
    if config.whiten_advantages:
        rows = _whitened(rows, batch.sequences, parallel)
    sequences = [replace(sequence, advantages=row) for sequence, row in zip(batch.sequences, rows, strict=True)]
    return replace(batch, advantages=outcomes, sequences=sequences), metrics


def _whitened(rows: Sequence[Tensor], sequences: Sequence[TrainSequence], parallel: ParallelContext) -> list[Tensor]:
    """Whitened over the tokens with loss of all ranks; 0 where there are fewer than two."""
    values = torch.cat([row[sequence.loss_mask] for row, sequence in zip(rows, sequences, strict=True)]).double()
    # of the ranks that share the same sequences one speaks for all
    speaks = parallel.tp_rank == parallel.pp_rank == parallel.cp_rank == 0
    mine = (values.numel(), float(values.sum()), float(values.square().sum())) if speaks else (0, 0.0, 0.0)
    count, total, squares = (sum(column) for column in zip(*gather_objects(mine, parallel), strict=True))
    if count < 2:
        return [torch.zeros_like(row) for row in rows]
    mean = total / count
    variance = max(0.0, (squares - count * mean**2) / (count - 1))
    return [whiten(row.double(), mean, variance).float() for row in rows]


def _kl_in_reward(sequences: Sequence[TrainSequence]) -> dict[str, Reduction]:
    masks = [sequence.loss_mask for sequence in sequences]
    values = [k1(s.old_logprobs, s.ref_logprobs)[mask] for s, mask in zip(sequences, masks, strict=True)]
    return {"critic/kl": Mean(float(torch.cat(values).sum()), sum(int(mask.sum()) for mask in masks))}
