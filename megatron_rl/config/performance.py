"""Configuration of FP8 precision, memory savings and profiling."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.checks import positive, require

OffloadPart = Literal["params", "grads", "optimizer"]


RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]


@dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    """FP8 matrix multiplications by Transformer Engine; everything else stays in model.dtype."""

    fp8: Literal["disabled", "delayed", "tensorwise", "blockwise", "mxfp8"] = "disabled"
    """FP8 scaling recipe of Transformer Engine. delayed, tensorwise: Ada, Hopper and later; blockwise: Hopper; mxfp8:
    Blackwell; disabled: no FP8 (Megatron's fp8_recipe)."""
    fp8_params: bool = False
    """Store the weights of FP8 matrix multiplications in FP8 and all-gather them in FP8 (Megatron's
    fp8_param_gather)."""
    bf16_first_layers: int = 0
    """Number of layers at the start of the model that stay in bf16."""
    bf16_last_layers: int = 0
    """Number of layers at the end of the model that stay in bf16."""

    def __post_init__(self) -> None:
        for name in ("bf16_first_layers", "bf16_last_layers"):
            require(getattr(self, name) >= 0, f"precision.{name}", getattr(self, name), "0 or more")
        require(
            not self.fp8_params or self.fp8 != "disabled",
            "precision.fp8_params",
            self.fp8_params,
            "false unless precision.fp8 is set to a recipe",
            "Set precision.fp8=delayed, or precision.fp8_params=false.",
        )
        require(
            self.fp8 != "delayed" or not (self.bf16_first_layers or self.bf16_last_layers),
            "precision.bf16_first_layers, bf16_last_layers",
            (self.bf16_first_layers, self.bf16_last_layers),
            "0 with precision.fp8=delayed, whose scales are shared by all layers",
            "Set precision.fp8=tensorwise.",
        )


@dataclass(frozen=True, kw_only=True)
class MemorySection:
    """Savings of GPU memory that cost time, and the check of the memory plan."""

    recompute: Literal["disabled", "selective", "full"] = "disabled"
    """Activation recomputation, also called gradient checkpointing (Megatron's recompute_granularity). selective: the
    modules in recompute_modules; full: whole layers; disabled: none."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    """Modules of a layer whose activations recompute=selective recomputes."""
    recompute_num_layers: int = 1
    """Layers per unit of recompute=full; only the input of a unit is kept."""
    offload: list[OffloadPart] = field(default_factory=list)
    """Parts of the policy that are moved to host memory while rollouts are generated (verl's param_offload,
    grad_offload and optimizer_offload)."""
    on_overcommit: Literal["error", "warn"] = "error"
    """What happens at the start if the memory plan (docs/scaling.md) of the run exceeds the memory of this machine.
    error: the run stops; warn: it prints a warning and goes on."""

    def __post_init__(self) -> None:
        positive("memory", self, "recompute_num_layers")
        require(
            self.recompute != "selective" or bool(self.recompute_modules),
            "memory.recompute_modules",
            self.recompute_modules,
            "at least one module with memory.recompute=selective",
        )
        require(len(set(self.offload)) == len(self.offload), "memory.offload", self.offload, "every part at most once")


@dataclass(frozen=True, kw_only=True)
class ProfilingSection:
    """Profiling of single steps by torch.profiler; the files go into profile/ of the run folder."""

    steps: list[int] = field(default_factory=list)
    """Steps to profile; a timeline (trace) and a table of operations are written for each."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""
    memory_snapshot: bool = False
    """Also write a memory snapshot with every allocation of the profiled steps; needs a GPU."""
    peak_tflops: float | None = None
    """Peak throughput of the device of one rank, in TFLOP/s, for the model FLOPs utilisation (MFU); null: looked up by
    the name of the GPU."""

    def __post_init__(self) -> None:
        require(self.peak_tflops is None or self.peak_tflops > 0, "profiling.peak_tflops", self.peak_tflops, "above 0")
