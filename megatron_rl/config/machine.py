"""Sections that say how the policy is laid out and computed on the machine, and how it is watched there."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.checks import positive, require

OffloadPart = Literal["params", "grads", "optimizer"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]


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


@dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    """FP8 products by Transformer Engine; everything else stays in model.dtype."""

    fp8: Literal["disabled", "delayed", "tensorwise", "blockwise", "mxfp8"] = "disabled"
    """Scaling recipe: delayed and tensorwise need Ada or Hopper and later, blockwise Hopper, mxfp8 Blackwell."""
    fp8_params: bool = False
    """Keep the weights of products in FP8 and gather them so."""
    bf16_first_layers: int = 0
    """First layers that stay in bf16."""
    bf16_last_layers: int = 0
    """Last layers that stay in bf16."""

    def __post_init__(self) -> None:
        for name in ("bf16_first_layers", "bf16_last_layers"):
            require(getattr(self, name) >= 0, f"precision.{name}", getattr(self, name), "0 or more")
        require(
            not self.fp8_params or self.fp8 != "disabled",
            "precision.fp8_params",
            self.fp8_params,
            "a recipe in precision.fp8 with it",
            "Set precision.fp8=delayed, or precision.fp8_params=false.",
        )
        require(
            self.fp8 != "delayed" or not (self.bf16_first_layers or self.bf16_last_layers),
            "precision.bf16_first_layers, bf16_last_layers",
            (self.bf16_first_layers, self.bf16_last_layers),
            "0 with precision.fp8=delayed, whose scales are shared by all layers",
            "Choose precision.fp8=tensorwise.",
        )


@dataclass(frozen=True, kw_only=True)
class MemorySection:
    """Time for memory."""

    recompute: Literal["disabled", "selective", "full"] = "disabled"
    """Activations computed again for the gradient: none, those of recompute_modules, or whole layers."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    """What recompute=selective computes again."""
    recompute_num_layers: int = 1
    """Layers of one unit of recompute=full: their inputs alone are kept."""
    offload: list[OffloadPart] = field(default_factory=list)
    """Parts of the policy that move to host memory while rollouts are generated."""
    if_too_large: Literal["refuse", "warn"] = "refuse"
    """What to do with a run that does not fit into this machine by its plan (docs/scaling.md)."""

    def __post_init__(self) -> None:
        positive("memory", self, "recompute_num_layers")
        require(
            self.recompute != "selective" or bool(self.recompute_modules),
            "memory.recompute_modules",
            self.recompute_modules,
            "at least one module with memory.recompute=selective",
        )
        require(len(set(self.offload)) == len(self.offload), "memory.offload", self.offload, "every part once")


@dataclass(frozen=True, kw_only=True)
class ProfilingSection:
    """Steps to look at closely; the files go into profile/ of the run folder."""

    steps: list[int] = field(default_factory=list)
    """Steps of which a timeline and a table of operations are written."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write them."""
    memory_snapshot: bool = False
    """Also write every allocation of those steps; needs a GPU."""
    peak_tflops: float | None = None
    """Peak of one rank's device in TFLOP/s, for the model FLOPs utilisation; null: known GPUs by name."""

    def __post_init__(self) -> None:
        require(self.peak_tflops is None or self.peak_tflops > 0, "profiling.peak_tflops", self.peak_tflops, "above 0")
