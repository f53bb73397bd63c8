"""Megatron's optimizer and learning-rate schedule."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.schema import OptimizerSection
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.patches import create_adam_state


def build_optimizer(
    config: OptimizerSection, model: DistributedDataParallel, dtype: torch.dtype, *, distributed: bool
) -> MegatronOptimizer:
    """AdamW with decoupled weight decay; bf16 weights have fp32 masters."""
    section = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(section, [model], config_overrides=get_standard_config_overrides(section))
    create_adam_state(optimizer)
    return optimizer


def build_scheduler(
    config: OptimizerSection, optimizer: MegatronOptimizer, num_updates: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then the decay, counted in optimizer updates.

    Args:
        num_updates: of the whole run, where the decay ends unless the configuration says otherwise.
    """
    decay = max(config.lr_decay_updates or num_updates, config.lr_warmup_updates + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_updates,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
    )


def step_if_finite(optimizer: MegatronOptimizer) -> float:
    """Clip and step; the global gradient norm before clipping.

    Raises:
        TrainingDiverged: on every rank, before any weight changes, when the norm is not finite.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # reduced over all ranks, so all of them see the same
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"gradient norm is {norm}: expected a finite number. The weights were left as they were. "
            "Lower optimizer.lr, or look at the last rollouts."
        )
    optimizer.step()
    return norm
