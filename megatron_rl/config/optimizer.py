"""Configuration of the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule, counted in optimizer updates."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up."""
    lr_warmup_updates: int = 0
    """Warm-up: optimizer updates over which the learning rate rises linearly from 0 to lr."""
    lr_decay_updates: int | None = None
    """Optimizer update at which the learning rate reaches min_lr; null: the last one of the run."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to norms and biases."""
    adam_beta1: float = 0.9
    """Adam beta1: decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Adam beta2: decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Adam epsilon: added to the square root of the second moment."""
    clip_grad: float = 1.0
    """Gradient clipping: largest global gradient norm (TRL's max_grad_norm); 0 is off."""
    states_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Data type of the two Adam moments; bf16 and fp8 need Transformer Engine's fused Adam."""
    cpu_offload_fraction: float = 0.0
    """Fraction, from 0 to 1, of the optimizer that is stored in host memory and stepped on the CPU."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "more than 0")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"0 to optimizer.lr={self.lr}")
        require(self.lr_warmup_updates >= 0, "optimizer.lr_warmup_updates", self.lr_warmup_updates, "0 or more")
        positive("optimizer", self, "lr_decay_updates")
        require(0 <= self.adam_beta1 < 1, "optimizer.adam_beta1", self.adam_beta1, "0 or more and below 1")
        require(0 <= self.adam_beta2 < 1, "optimizer.adam_beta2", self.adam_beta2, "0 or more and below 1")
        require(self.clip_grad >= 0, "optimizer.clip_grad", self.clip_grad, "0 (off) or more")
        require(
            0 <= self.cpu_offload_fraction <= 1, "optimizer.cpu_offload_fraction", self.cpu_offload_fraction, "0 to 1"
        )
