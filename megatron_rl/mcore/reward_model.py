"""A reward model: a model with one output that scores responses, or their steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.losses import binary_loss, pairwise_loss
from megatron_rl.batching.batch import filler, given_batch
from megatron_rl.batching.reward_model import share_out
from megatron_rl.config.schema import RunConfig
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.critic import reads_values
from megatron_rl.mcore.model.gpt_model import ValueModel, check_weights
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.models import read_model_spec
from megatron_rl.models.table import VALUE_HEAD
from megatron_rl.types import MicroBatch, ParallelContext, TrainSequence

LOSS = "reward_model/loss"
Reader = Callable[[ValueModel, MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Reduction]]]


class RewardModel(ShardedModel):
    """Scores sequences; with a ``Learner`` beside it, it learns to."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        """
        Args:
            config: with the folder that it begins with as model.path; without score.weight there all scores are 0.
        """
        super().__init__(config, parallel, config.model.path, head="value")

    def micro_batches(self, examples: Sequence[Sequence[TrainSequence]]) -> list[list[TrainSequence]]:
        """This rank's share of examples whose sequences stay together, the same on every rank."""
        return [
            [sequence for place in places for sequence in examples[place]] or [filler(examples[0][0])]
            for places in self._shared_out(examples)
        ]

    def scores(self, sequences: Sequence[TrainSequence]) -> list[Tensor]:
        """What it thinks of sequences, the same on every rank; collective.

        Args:
            sequences: by ``judged_sequence``, the same on every rank.

        Returns:
            [judged tokens] float32 of each.
        """
        if not sequences:
            return []
        places = self._shared_out([[sequence] for sequence in sequences])
        mine: list[TrainSequence] = []
        index: list[int] = []
        batches = []
        for batch in places:
            begun = len(mine)
            mine += [sequences[place] for place in batch] or [filler(sequences[0])]
            index += list(batch) or [-1]
            batches.append(list(range(begun, len(mine))))
        rows = self.score(given_batch(mine, batches), reads_values)
        found = {place: row[sequences[place].loss_mask] for place, row in zip(index, rows, strict=True) if place >= 0}
        told = gather_objects(found if self.parallel.is_model_parallel_main else {}, self.parallel)
        known = {place: row for part in told for place, row in part.items()}
        return [known[place] for place in range(len(sequences))]

    def _shared_out(self, examples: Sequence[Sequence[TrainSequence]]) -> list[list[int]]:
        parallel, batching = self.parallel, self.config.batching
        # the context-parallel ranks share a micro-batch
        tokens = batching.max_tokens_per_micro_batch * parallel.cp_size
        return share_out(
            [[sequence.token_ids.numel() for sequence in example] for example in examples],
            replace(batching, max_tokens_per_micro_batch=tokens),
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            multiple_of=parallel.pp_size if parallel.vp_size > 1 else 1,
        )


def check_scores(path: str) -> None:
    """Refuse a folder whose scores would all be 0.

    Raises:
        ConfigError: it has no value head.
    """
    if VALUE_HEAD not in check_weights(read_model_spec(path), path, "value").names():
        raise ConfigError(
            f"{path} has no {VALUE_HEAD}: it is no reward model. Train one with "
            "python -m megatron_rl.train_reward_model, or give the folder hf/ of one of its checkpoints."
        )


def reads_binary_loss(
    model: ValueModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
    """The sum over judged tokens, each of weight 1: a mean over them in the end."""
    mask = batch.loss_mask
    scores, labels = model.values(hidden, mask), batch.returns[mask]
    loss, count = binary_loss(scores, labels).sum(), mask.sum().int()
    right = ((scores > 0) == (labels > 0.5)).sum()
    return loss + 0.0 * scores.sum(), count, _metrics(int(count), loss, right, scores.sum())


def reads_pairwise_loss(context_group: Any = None) -> Reader:
    """The sum over pairs, of which the chosen one stands before the rejected one in a micro-batch.

    Args:
        context_group: the ranks that share out a sequence's tokens; None: this one has all of them.
    """

    def read(model: ValueModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        mask = batch.loss_mask
        values, places = model.values(hidden, mask), batch.sequence[mask]
        num_pairs = len(batch.lengths) // 2
        zeros = values.new_zeros(2 * num_pairs)
        mine = zeros.index_add(0, places, values)  # each sequence is judged once
        known = torch.stack([mine.detach(), zeros.index_add(0, places, batch.returns[mask])])
        if context_group is not None:
            dist.all_reduce(known, group=context_group)
        # values from every rank, gradients to this one's own: over the ranks each score gets its gradient once
        scores = (mine + (known[0] - mine.detach())).unflatten(0, (num_pairs, 2))
        margins = known[1].unflatten(0, (num_pairs, 2))[:, 0]
        losses = pairwise_loss(scores[:, 0], scores[:, 1], margins)
        counted = torch.zeros(num_pairs, dtype=torch.bool, device=losses.device)
        counted[places[places % 2 == 0] // 2] = True  # where the chosen one's end is, the pair counts
        right = (scores[:, 0] > scores[:, 1])[counted].sum()
        metrics = _metrics(int(counted.sum()), losses[counted].sum(), right, scores[counted].sum() / 2)
        return losses.sum() + 0.0 * values.sum(), counted.sum().int(), metrics

    return read


def _metrics(count: int, loss: Tensor, right: Tensor, scores: Tensor) -> dict[str, Reduction]:
    values = torch.stack(
        [value.detach().float() for value in (loss, right, scores)]
    ).tolist()  # one wait for the device
    names = (LOSS, "reward_model/accuracy", "reward_model/score")
    return {name: Mean(value, count) for name, value in zip(names, values, strict=True)}
