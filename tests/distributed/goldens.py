"""Responses whose losses and advantages are published to six digits, and their computation on the ranks of a gang."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import build_correction
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.batching.align import align
from megatron_rl.batching.batch import make_batch
from megatron_rl.batching.context_parallel import context_share
from megatron_rl.config import RunConfig
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.mcore.policy_loss import PolicyLoss
from megatron_rl.trainer.advantages import compute_advantages
from megatron_rl.types import Prompt, Rollout, RolloutGroup, TrainSequence, TrainState
from tests.distributed.cases import world

REWARDS = (1.0, 0.0, 0.1, 1.0)
OLD = ((-0.5, -1, -0.2), (-0.7,), (-0.3, -0.9), (-1.2, -0.1, -0.4, -0.6))
NEW = ((-0.2, -1.1, -0.2), (-0.4,), (-0.6, -0.9), (-1, -0.1, -0.9, -0.5))
REF = ((-0.6, -1, -0.3), (-0.7,), (-0.3, -1), (-1.2, -0.2, -0.4, -0.6))
PROMPT = 2


def row(values: Sequence[float]) -> Tensor:
    """Return values of a sequence, [L]: zeros for the prompt, then ``values``."""
    return torch.tensor([0.0] * PROMPT + list(values))


def rollout(index: int) -> Rollout:
    """Return response ``index``; ``rollout_logprobs`` holds the current log-probabilities, not those of an engine."""
    length = PROMPT + len(OLD[index])
    return Rollout(
        token_ids=torch.arange(length),
        loss_mask=torch.arange(length) >= PROMPT,
        rollout_logprobs=row(NEW[index]),
        text="",
        finish_reason="stop",
        policy_versions=torch.zeros(length, dtype=torch.int32),
        seed=0,
        reward=REWARDS[index],
        reward_parts={},
        status="ok",
        failure="",
    )


def estimates(configs: Sequence[RunConfig]) -> list[list[float]]:
    """Return the token advantages of a response by each configuration; its three siblings failed and have no loss."""
    return [advantages_of(config) for config in configs]


def advantages_of(config: RunConfig) -> list[float]:
    """Return the advantages of one turn of four tokens, or of two turns of five if the estimator uses turns."""
    parallel = world(config)
    two_turns = config.algorithm.advantage != "gae"
    mask = [False] * PROMPT + ([True] * 5 + [False] + [True] * 5 if two_turns else [True] * 4)
    length = len(mask)
    valued = replace(
        rollout(0),
        token_ids=torch.arange(length),
        loss_mask=torch.tensor(mask),
        rollout_logprobs=torch.zeros(length),
        policy_versions=torch.zeros(length, dtype=torch.int32),
        reward=2.0 if two_turns else 1.0,
        step_rewards={PROMPT + 4: 1.0} if two_turns else {},
    )
    failed = [replace(rollout(i), status="reward_error", reward=float("nan")) for i in range(3)]
    prompt = Prompt(prompt_id="0", token_ids=torch.arange(PROMPT), text="", answer=None)
    batch = make_batch([RolloutGroup(index=0, prompt=prompt, rollouts=[*failed, valued])], config, parallel)
    values, kls = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    values[valued.loss_mask] = torch.arange(1, sum(mask) + 1, dtype=torch.float64) / 10
    if config.algorithm.kl_reward_coef:
        kls[valued.loss_mask] = torch.tensor([0.1, -0.05, 0, 0.2], dtype=torch.float64)
    sequences = [
        replace(sequence, values=values, rewards=sequence.rewards.double(), old_logprobs=kls, ref_logprobs=0 * kls)
        if index == 3
        else sequence
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
    ]
    batch, _ = compute_advantages(replace(batch, sequences=sequences), config.algorithm, parallel, TrainState())
    own_rows = [
        sequence.advantages[sequence.loss_mask].tolist()
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
        if index == 3
    ]
    all_rows = [row for part in gather_objects(own_rows, parallel) for row in part]
    assert len({tuple(row) for row in all_rows}) == 1
    return all_rows[0]


def losses(configs: Sequence[RunConfig]) -> list[float]:
    """Return the loss by each configuration; they differ only in their algorithms."""
    return [loss_of(config) for config in configs]


def loss_of(config: RunConfig) -> float:
    """Return the policy loss over all ranks, in float64 from the micro-batch on."""
    parallel = world(config)
    prompt = Prompt(prompt_id="0", token_ids=torch.arange(PROMPT), text="", answer=None)
    group = RolloutGroup(index=0, prompt=prompt, rollouts=[rollout(i) for i in range(4)])
    batch = make_batch([group], config, parallel)
    sequences = [
        with_logprobs(sequence, index) if index >= 0 else sequence
        for sequence, index in zip(batch.sequences, batch.global_index, strict=True)
    ]
    batch, _ = compute_advantages(
        replace(batch, sequences=sequences, rewards=batch.rewards.double()), config.algorithm, parallel, TrainState()
    )
    loss = PolicyLoss(
        build_objective(config.algorithm),
        build_correction(config.algorithm),
        has_rollout_logprobs=True,
        has_old_logprobs=True,
        context_group=parallel.groups.cp if parallel.cp_size > 1 else None,
    )
    total, count = 0.0, 0
    multiple = 2 * parallel.cp_size if parallel.cp_size > 1 else 1
    (update,) = batch.updates
    for indices in update.micro_batches:
        aligned = align(
            [batch.sequences[i] for i in indices],
            packed=config.batching.packed,
            multiple_of=multiple,
            sequence_multiple_of=multiple,
        ).map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        share = context_share(aligned, parallel.cp_rank, parallel.cp_size)
        logprobs = share.rollout_logprobs[share.loss_mask]
        token_loss, num_tokens, _ = loss(share, logprobs, torch.zeros_like(logprobs))
        total, count = total + float(token_loss), count + int(num_tokens)
    # the loss is computed on the last stage, and the tensor-parallel ranks have the same tokens
    counts = parallel.is_last_stage and parallel.tp_rank == 0
    sums = gather_objects((total, count) if counts else (0.0, 0), parallel)
    assert sum(num_tokens for _, num_tokens in sums) == update.num_tokens == 10
    return sum(token_loss for token_loss, _ in sums) / update.num_tokens


def with_logprobs(sequence: TrainSequence, index: int) -> TrainSequence:
    """Return the sequence with the log-probabilities of the trainer and of the reference."""
    return replace(sequence, old_logprobs=row(OLD[index]), ref_logprobs=row(REF[index]))
