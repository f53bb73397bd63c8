"""Balancing over ranks, packing, and the one shift between tokens and labels."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rl.batching.align import align, unalign
from megatron_rl.batching.batch import plan_batch
from megatron_rl.batching.context_parallel import context_indices, restore_order
from megatron_rl.batching.pack import balance, micro_batches
from megatron_rl.batching.selection import accepted, num_trained_rollouts, without_truncated
from megatron_rl.config.batching import BatchingSection
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt, Rollout, RolloutGroup
from tests.toys import sequences


def group(index: int, lengths: list[int], status: str = "ok") -> RolloutGroup:
    prompt = Prompt(prompt_id=str(index), token_ids=torch.tensor([1, 2]), text="ab", answer=None)
    rollouts = [
        Rollout(
            token_ids=torch.arange(length + 2),
            loss_mask=torch.arange(length + 2) >= 2,
            rollout_logprobs=torch.zeros(length + 2),
            text="",
            finish_reason="stop",
            policy_versions=torch.zeros(length + 2, dtype=torch.int32),
            seed=0,
            reward=float(length),
            reward_parts={},
            status=status,
            failure="",  # type: ignore[arg-type]
        )
        for length in lengths
    ]
    return RolloutGroup(index=index, prompt=prompt, rollouts=rollouts)


def test_balance_assigns_every_index_once_and_evenly() -> None:
    lengths = torch.randint(1, 1000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = balance(lengths, 4)
    assert sorted(i for members in bins for i in members) == list(range(64))
    assert {len(members) for members in bins} == {16}
    sums = [sum(lengths[i] for i in members) for members in bins]
    assert max(sums) < 1.02 * sum(sums) / 4


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_respect_both_limits(packed: bool) -> None:
    lengths = [5, 9, 3, 3, 8, 1, 1, 1, 10]
    (batches,) = micro_batches([range(9)], lengths, max_sequences=3, max_tokens=12, packed=packed)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    for batch in batches:
        rows = [lengths[i] for i in batch]
        assert len(batch) <= 3
        assert (sum(rows) if packed else max(rows) * len(rows)) <= 12


@pytest.mark.parametrize("packed", [True, False])
def test_every_rank_gets_the_same_number_of_micro_batches(packed: bool) -> None:
    lengths = [1, 1, 1, 1, 9, 9, 9]
    by_rank = micro_batches([[0, 1, 2, 3], [4, 5, 6], []], lengths, max_sequences=None, max_tokens=9, packed=packed)
    assert [len(batches) for batches in by_rank] == [3, 3, 3]
    assert sorted(i for batch in by_rank[0] for i in batch) == [0, 1, 2, 3]
    assert by_rank[2] == [[], [], []]


def test_packed_micro_batches_are_few_and_balanced() -> None:
    lengths = [8, 7, 6, 5, 4, 3, 2, 1]
    (batches,) = micro_batches([range(8)], lengths, max_sequences=None, max_tokens=12, packed=True)
    assert [sum(lengths[i] for i in batch) for batch in batches] == [9, 9, 9, 9]


def test_a_plan_gives_every_sequence_to_one_rank() -> None:
    groups = [group(0, [3, 9, 1]), group(1, [2, 2, 30]), group(2, [5, 5, 5]), group(3, [1, 1, 1])]
    config = BatchingSection(num_mini_batches=2, max_tokens_per_micro_batch=40, micro_batch_size=2)
    seen: Counter[int] = Counter()
    counts = []
    for rank in range(4):
        batch = plan_batch(groups, config, dp_rank=rank, dp_size=4, aggregation="token_mean", constant_length=1)
        seen.update(i for i in batch.global_index if i >= 0)
        counts.append([len(update.micro_batches) for update in batch.updates])
        assert [update.num_tokens for update in batch.updates] == [47, 18]
        for position, index in enumerate(batch.global_index):
            if index < 0:
                assert not batch.sequences[position].loss_mask.any()
    assert seen == Counter(range(12))
    assert all(count == counts[0] for count in counts)


def test_truncated_responses_have_no_loss_and_keep_their_reward() -> None:
    whole = group(0, [3, 4, 5])
    truncated = replace(whole, rollouts=[replace(whole.rollouts[0], finish_reason="length"), *whole.rollouts[1:]])
    (masked,) = without_truncated([truncated])
    assert [int(rollout.loss_mask.sum()) for rollout in masked.rollouts] == [0, 4, 5]
    assert [rollout.reward for rollout in masked.rollouts] == [3, 4, 5]
    assert int(truncated.rollouts[0].loss_mask.sum()) == 3


def accepted_indices(texts: list[str], rewards: list[float], **options: Any) -> list[int]:
    """Return the indices of the responses that have loss."""
    original = group(0, [3] * len(texts))
    rollouts = [replace(r, text=t, reward=w) for r, t, w in zip(original.rollouts, texts, rewards, strict=True)]
    rollouts[-1] = replace(rollouts[-1], status="reward_error", reward=math.nan)
    settings: dict[str, Any] = {"min_reward": 1.0, "max_per_prompt": None, "unique": False, **options}
    groups = accepted([replace(original, rollouts=rollouts)], **settings)
    indices = [index for index, rollout in enumerate(groups[0].rollouts) if rollout.loss_mask.any()]
    assert num_trained_rollouts(groups) == len(indices)
    assert all(rollouts[index].reward >= settings["min_reward"] for index in indices)
    return indices


def test_only_responses_that_meet_the_settings_are_accepted() -> None:
    texts, rewards = ["a", "b", "a", "c", "d", "e"], [1.0, 0.0, 1.0, 1.5, 1.0, 1.0]  # the last reward failed
    assert accepted_indices(texts, rewards) == [0, 2, 3, 4]
    assert accepted_indices(texts, rewards, unique=True) == [0, 3, 4]
    assert accepted_indices(texts, rewards, max_per_prompt=2) == [0, 3]
    assert accepted_indices(texts, rewards, unique=True, max_per_prompt=3, min_reward=0.0) == [0, 3, 4]
    assert accepted_indices(texts, rewards, min_reward=2.0) == []


def test_a_truncated_response_does_not_count_towards_max_per_prompt() -> None:
    original = group(0, [3, 3])
    first, second = (replace(rollout, text="same", reward=1.0) for rollout in original.rollouts)
    truncated = replace(original, rollouts=[replace(first, finish_reason="length"), second])
    (accepted_group,) = accepted(without_truncated([truncated]), min_reward=1.0, max_per_prompt=1, unique=True)
    assert [bool(rollout.loss_mask.any()) for rollout in accepted_group.rollouts] == [False, True]


def test_responses_with_failed_rewards_stay_in_the_batch_without_loss() -> None:
    groups = [group(0, [3, 3]), group(1, [4, 4], status="reward_error")]
    batch = plan_batch(groups, BatchingSection(), dp_rank=0, dp_size=1, aggregation="sequence_mean", constant_length=1)
    assert [bool(sequence.loss_mask.any()) for sequence in batch.sequences] == [True, True, False, False]
    assert batch.updates[0].num_tokens == 6
    with pytest.raises(DataError, match="no token with loss"):
        plan_batch(groups[1:], BatchingSection(), dp_rank=0, dp_size=1, aggregation="token_mean", constant_length=1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_align_shifts_by_one_token_and_unalign_reverses_it(packed: bool, multiple_of: int) -> None:
    originals = [replace(s, old_logprobs=s.token_ids.float()) for s in sequences()]
    batch = align(originals, packed=packed, multiple_of=multiple_of)
    assert batch.tokens.size(1) % multiple_of == 0
    # position t holds the values of token t + 1
    row, length = (batch.tokens[0], originals[0].token_ids.numel())
    assert batch.labels[0, : length - 1].tolist() == row[1:length].tolist()
    assert batch.old_logprobs[0, : length - 1].tolist() == row[1:length].float().tolist()
    assert not batch.loss_mask[0, length - 1]
    assert int(batch.loss_mask.sum()) == sum(int(s.loss_mask.sum()) for s in originals)
    for values, sequence in zip(unalign(batch.old_logprobs, batch), originals, strict=True):
        assert values[0] == 0
        assert values[1:].tolist() == sequence.token_ids[1:].float().tolist()


def test_balance_of_heavy_tailed_lengths() -> None:
    """The slowest of 8 ranks has at most 3% more tokens than the mean, for 1000 log-normal lengths."""
    for seed in range(20):
        log_lengths = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        lengths = (6 + log_lengths).exp().clamp(1, 32768).long().tolist()
        sums = [sum(lengths[i] for i in members) for members in balance(lengths, 8)]
        assert max(sums) <= 1.03 * sum(sums) / 8


@pytest.mark.parametrize("size", [2, 4])
def test_context_shares_hold_every_position_once(size: int) -> None:
    cu_seqlens = (0, 4 * size, 6 * size, 12 * size)
    shares = [context_indices(cu_seqlens, rank, size) for rank in range(size)]
    assert len({share.numel() for share in shares}) == 1
    positions = torch.cat(shares)
    assert torch.equal(positions[restore_order(cu_seqlens, size)], torch.arange(12 * size))
    # one rank holds the first chunk of a sequence, the cheapest, and the last, the most expensive
    assert {0, 4 * size - 1} <= set(shares[0].tolist())


def test_micro_batch_counts_are_equal_multiples_for_interleaved_pipelines() -> None:
    by_rank = micro_batches([[0, 1], [2]], [5, 5, 5], max_sequences=1, max_tokens=9, packed=True, multiple_of=4)
    assert [len(batches) for batches in by_rank] == [4, 4]
