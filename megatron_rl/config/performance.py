"""Precision, memory and profiling."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.checks import positive, require

OffloadPart = Literal["params", "grads", "optimizer"]


RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]


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
    on_overcommit: Literal["error", "warn"] = "error"
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
