"""Sections that say how the policy is laid out and computed on the machine, and how it is watched there."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How the policy is split over ranks; the rest of the world is data parallel."""

    tensor_parallel_size: int = 1
    """Ranks that share each matrix (TP)."""
    pipeline_parallel_size: int = 1
    """Ranks that share the stack of layers (PP)."""
    virtual_pipeline_parallel_size: int = 1
    """Model chunks on each pipeline rank, visited in turn (VPP, interleaved schedule); 1 is off."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of a mixture-of-experts model (EP)."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; null: tensor_parallel_size."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the TP ranks."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first pipeline rank; null: the same as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last pipeline rank; null: the same as the others."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are shared out over the stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count output layer and loss as a layer when layers are shared out over the stages."""
    distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients of finished layers while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass begins; needs distributed_optimizer."""
    timeout_minutes: float = 30.0
    """How long a collective may wait for a missing rank, in minutes."""

    def __post_init__(self) -> None:
        positive(
            "parallel",
            self,
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "virtual_pipeline_parallel_size",
            "context_parallel_size",
            "expert_parallel_size",
            "expert_tensor_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        )
        require(self.timeout_minutes > 0, "parallel.timeout_minutes", self.timeout_minutes, "more than 0")
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "parallel.sequence_parallel",
            self.sequence_parallel,
            "tensor_parallel_size above 1 with sequence parallelism",
            "Set parallel.sequence_parallel=false.",
        )
        require(
            self.virtual_pipeline_parallel_size == 1 or self.pipeline_parallel_size > 1,
            "parallel.virtual_pipeline_parallel_size",
            self.virtual_pipeline_parallel_size,
            "1, or a pipeline_parallel_size above 1",
            "Set parallel.virtual_pipeline_parallel_size=1.",
        )
        require(
            not self.overlap_param_gather or (self.distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            self.overlap_param_gather,
            "distributed_optimizer and overlap_grad_reduce with it",
            "Set both to true, or overlap_param_gather=false.",
        )

    @property
    def expert_tensor_size(self) -> int:
        """expert_tensor_parallel_size with its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """Training of mixture-of-experts models; the architecture itself comes from the model's config."""

    aux_loss: Literal["disabled", "micro_batch", "sequence", "global"] = "disabled"
    """Load-balancing loss: per micro-batch, per sequence (needs batching.packed=false), or over all ranks."""
    aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss; 0 is off."""
    router_dtype: Literal["model", "fp32", "fp64"] = "fp32"
    """Type in which routing scores are computed; model: that of the weights."""
    routing_replay: bool = False
    """Send every token to the experts that the engine sent it to, so that both compute the same."""

    def __post_init__(self) -> None:
        for name in ("aux_loss_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"moe.{name}", getattr(self, name), "0 (off) or more")
