"""A reward model: one output per token, which scores responses or their reasoning steps."""

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
from megatron_rl.mcore.critic import read_values
from megatron_rl.mcore.model.gpt_model import ValueModel, check_weights
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.models import read_model_spec
from megatron_rl.models.table import VALUE_HEAD
from megatron_rl.types import MicroBatch, ParallelContext, TrainSequence

LOSS = "reward_model/loss"
Reader = Callable[[ValueModel, MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Reduction]]]


class RewardModel(ShardedModel):
    """A model that scores sequences; a ``Learner`` trains it."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        """
        Args:
            config: configuration whose ``model.path`` is the folder of the initial weights; if that folder has no
                score.weight, all scores are 0.
            parallel: layout of this rank.
        """
        super().__init__(config, parallel, config.model.path, head="value")

    def micro_batches(self, examples: Sequence[Sequence[TrainSequence]]) -> list[list[TrainSequence]]:
        """Return this rank's micro-batches of the examples; the sequences of one example stay together.

        Args:
            examples: the sequences of each example, the same on every rank.
        """
        return [
            [sequence for index in members for sequence in examples[index]] or [filler(examples[0][0])]
            for members in self._assign(examples)
        ]

    def scores(self, sequences: Sequence[TrainSequence]) -> list[Tensor]:
        """Score sequences; collective, with the same result on every rank.

        Args:
            sequences: made by ``labelled_sequence``, the same on every rank.

        Returns:
            [number of tokens with loss] float32 for each sequence.
        """
        if not sequences:
            return []
        local: list[TrainSequence] = []
        indices: list[int] = []  # index of each local sequence in `sequences`; -1 for a filler
        batches = []
        for members in self._assign([[sequence] for sequence in sequences]):
            start = len(local)
            local += [sequences[index] for index in members] or [filler(sequences[0])]
            indices += list(members) or [-1]
            batches.append(list(range(start, len(local))))
        rows = self.forward_only(given_batch(local, batches), read_values)
        scores = {
            index: row[sequences[index].loss_mask] for index, row in zip(indices, rows, strict=True) if index >= 0
        }
        gathered = gather_objects(scores if self.parallel.is_model_parallel_main else {}, self.parallel)
        all_scores = {index: row for part in gathered for index, row in part.items()}
        return [all_scores[index] for index in range(len(sequences))]

    def _assign(self, examples: Sequence[Sequence[TrainSequence]]) -> list[list[int]]:
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
    """Check that the folder of a reward model has a value head; without one all scores would be 0.

    Raises:
        ConfigError: the folder has no value head.
    """
    if VALUE_HEAD not in check_weights(read_model_spec(path), path, "value").names():
        raise ConfigError(
            f"{path} has no {VALUE_HEAD}, so it is not a reward model. Train one with "
            "python -m megatron_rl.train_reward_model, or set the path to the hf/ folder of one of its checkpoints."
        )


def read_binary_loss(
    model: ValueModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
    """Sum of the binary losses of labelled tokens; each has weight 1, so the update averages over them."""
    mask = batch.loss_mask
    scores, labels = model.values(hidden, mask), batch.returns[mask]
    loss, count = binary_loss(scores, labels).sum(), mask.sum().int()
    num_correct = ((scores > 0) == (labels > 0.5)).sum()
    return loss + 0.0 * scores.sum(), count, _metrics(int(count), loss, num_correct, scores.sum())


def pairwise_loss_reader(context_group: Any = None) -> Reader:
    """Build the reader that sums the losses of chosen-rejected pairs.

    The sequences of a micro-batch come in pairs, the chosen one before the rejected one.

    Args:
        context_group: context-parallel ranks, which split the tokens of a sequence; None if this rank has all of them.
    """

    def read(model: ValueModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        mask = batch.loss_mask
        values, sequence_of = model.values(hidden, mask), batch.sequence[mask]
        num_pairs = len(batch.lengths) // 2
        zeros = values.new_zeros(2 * num_pairs)
        local = zeros.index_add(0, sequence_of, values)  # one labelled token per sequence
        totals = torch.stack([local.detach(), zeros.index_add(0, sequence_of, batch.returns[mask])])
        if context_group is not None:
            dist.all_reduce(totals, group=context_group)
        # scores are summed over ranks, but gradients flow to this rank's tokens only: each score gets its gradient once
        scores = (local + (totals[0] - local.detach())).unflatten(0, (num_pairs, 2))
        margins = totals[1].unflatten(0, (num_pairs, 2))[:, 0]
        losses = pairwise_loss(scores[:, 0], scores[:, 1], margins)
        counted = torch.zeros(num_pairs, dtype=torch.bool, device=losses.device)
        # the rank that holds the labelled token of the chosen sequence counts the pair
        counted[sequence_of[sequence_of % 2 == 0] // 2] = True
        num_correct = (scores[:, 0] > scores[:, 1])[counted].sum()
        metrics = _metrics(int(counted.sum()), losses[counted].sum(), num_correct, scores[counted].sum() / 2)
        return losses.sum() + 0.0 * values.sum(), counted.sum().int(), metrics

    return read


def _metrics(count: int, loss: Tensor, num_correct: Tensor, scores: Tensor) -> dict[str, Reduction]:
    values = torch.stack(
        [value.detach().float() for value in (loss, num_correct, scores)]
    ).tolist()  # one device synchronization
    names = (LOSS, "reward_model/accuracy", "reward_model/score")
    return {name: Mean(value, count) for name, value in zip(names, values, strict=True)}
