"""Tokens routed as the engine routed them.

Trainer and engine compute a router's scores with different last bits, and a token near a tie then goes
to another expert: its log-probability is off by far more than rounding. Replaying the engine's choice
removes that. Source: rollout routing replay (R3), arXiv 2510.11370.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.mcore.model.gpt_model import PolicyModel
from megatron_rl.types import MicroBatch, ParallelContext


class Replay:
    """Stands where Megatron's router looks for its own RouterReplay."""

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        """[tokens of this rank, experts per token] int64; None: the router chooses."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts of every token, the former still with their gradient."""
        if self.chosen is None:
            assert default_compute_topk is not None
            return default_compute_topk(scores, topk, num_groups, group_topk, **others)
        assert self.chosen.shape == (scores.size(0), topk), (
            f"{tuple(self.chosen.shape)} routes, {scores.size(0)} tokens"
        )
        return scores.gather(1, self.chosen), self.chosen


def attach(chunk: PolicyModel) -> None:
    """Give every router of a chunk a place to be told."""
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay = Replay()


def set_routes(chunk: PolicyModel, batch: MicroBatch | None, parallel: ParallelContext) -> None:
    """Routes of the next pass through a chunk; None lets its routers choose.

    Args:
        batch: of this context-parallel rank.
    """
    routing = None if batch is None else batch.routing
    if routing is not None:
        routing = routing.transpose(0, 1)  # [L, S, layers, k], the order in which a router sees tokens
        if chunk.config.sequence_parallel:
            routing = routing.chunk(parallel.tp_size)[parallel.tp_rank]
        routing = routing.flatten(0, 1)
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay.chosen = None if routing is None else routing[:, layer.layer_number - 1]
