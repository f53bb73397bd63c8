"""Routing replay: send each token to the experts that the engine chose.

Router scores of trainer and engine differ in their last bits, so a token near a tie goes to another expert and its
log-probability differs by far more than rounding. Replaying the engine's choice removes this difference.
Source: rollout routing replay (R3), arXiv 2510.11370.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.mcore.model.gpt_model import PolicyModel
from megatron_rl.types import MicroBatch, ParallelContext


class ReplayedRouting:
    """Replacement for Megatron's RouterReplay on one router."""

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        """[tokens of this rank, experts per token] int64, the experts to replay; None: the router chooses."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and experts of every token, [tokens, topk] each; the scores keep their gradient."""
        if self.experts is None:
            assert default_compute_topk is not None
            return default_compute_topk(scores, topk, num_groups, group_topk, **others)
        assert self.experts.shape == (scores.size(0), topk), (
            f"replayed experts have shape {tuple(self.experts.shape)}, expected {(scores.size(0), topk)}"
        )
        return scores.gather(1, self.experts), self.experts


def attach(chunk: PolicyModel) -> None:
    """Install a ``ReplayedRouting`` in every router of a chunk."""
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay = ReplayedRouting()


def set_routes(chunk: PolicyModel, batch: MicroBatch | None, parallel: ParallelContext) -> None:
    """Set the experts that the next pass through a chunk replays.

    Args:
        chunk: model chunk whose routers replay the experts.
        batch: this context-parallel rank's micro-batch; None, or a batch without recorded routing: the routers choose.
        parallel: layout of this rank.
    """
    routing = None if batch is None else batch.routing
    if routing is not None:
        routing = routing.transpose(0, 1)  # [L, S, layers, k], the order in which a router sees tokens
        if chunk.config.sequence_parallel:
            routing = routing.chunk(parallel.tp_size)[parallel.tp_rank]
        routing = routing.flatten(0, 1)
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay.experts = None if routing is None else routing[:, layer.layer_number - 1]
