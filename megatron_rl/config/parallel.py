"""Configuration of the parallel layout and of mixture-of-experts training."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Parallel layout of the model; the remaining factor of the world size is data parallelism."""

    tensor_parallel_size: int = 1
    """Tensor parallelism (TP): ranks that each weight matrix is split over."""
    pipeline_parallel_size: int = 1
    """Pipeline parallelism (PP): ranks that the layers are split over."""
    virtual_pipeline_parallel_size: int = 1
    """Virtual pipeline parallelism (VPP, interleaved schedule): model chunks on each pipeline rank; 1 is off."""
    context_parallel_size: int = 1
    """Context parallelism (CP): ranks that each sequence is split over."""
    expert_parallel_size: int = 1
    """Expert parallelism (EP): ranks that the experts of a mixture-of-experts model are distributed over."""
    expert_tensor_parallel_size: int | None = None
    """Expert tensor parallelism (ETP): ranks that the matrices of each expert are split over; null:
    tensor_parallel_size."""
    sequence_parallel: bool = False
    """Sequence parallelism (Megatron's): split the activations of norms and residuals along the sequence over the TP
    ranks."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Number of layers on the first pipeline rank; null: as many as on the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Number of layers on the last pipeline rank; null: as many as on the others."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are distributed over the pipeline stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as one layer when layers are distributed over the pipeline stages."""
    distributed_optimizer: bool = True
    """Shard the optimizer states over the data-parallel ranks (ZeRO-1; Megatron's use_distributed_optimizer)."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction of finished layers with the rest of the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the all-gather of updated weights with the next forward pass; needs distributed_optimizer and
    overlap_grad_reduce."""
    timeout_minutes: float = 30.0
    """Time-out of a collective, in minutes: how long it waits for a missing rank before it fails."""

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
            "parallel.tensor_parallel_size above 1 with sequence parallelism",
            "Set parallel.sequence_parallel=false.",
        )
        require(
            self.virtual_pipeline_parallel_size == 1 or self.pipeline_parallel_size > 1,
            "parallel.virtual_pipeline_parallel_size",
            self.virtual_pipeline_parallel_size,
            "1, or parallel.pipeline_parallel_size above 1",
            "Set parallel.virtual_pipeline_parallel_size=1.",
        )
        require(
            not self.overlap_param_gather or (self.distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            self.overlap_param_gather,
            "parallel.distributed_optimizer=true and parallel.overlap_grad_reduce=true with it",
            "Set both to true, or parallel.overlap_param_gather=false.",
        )

    @property
    def expert_tensor_size(self) -> int:
        """expert_tensor_parallel_size with its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """Training of mixture-of-experts models; the architecture itself comes from the model's config."""

    aux_loss: Literal["disabled", "micro_batch", "sequence", "global"] = "disabled"
    """Load-balancing (auxiliary) loss. micro_batch: computed per micro-batch; sequence: per sequence, needs
    batching.packed=false; global: over all ranks; disabled: none."""
    aux_loss_coef: float = 0.001
    """Coefficient of the load-balancing loss (Megatron's moe_aux_loss_coeff)."""
    z_loss_coef: float = 0.0
    """Coefficient of the router z-loss (Megatron's moe_z_loss_coeff); 0 is off."""
    router_dtype: Literal["model", "fp32", "fp64"] = "fp32"
    """Data type in which routing scores are computed; model: that of the weights."""
    routing_replay: bool = False
    """Routing replay (R3): route every token to the experts that the engine used, so that trainer and engine compute
    the same."""

    def __post_init__(self) -> None:
        for name in ("aux_loss_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"moe.{name}", getattr(self, name), "0 (off) or more")
