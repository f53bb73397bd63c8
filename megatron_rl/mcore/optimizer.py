"""Megatron's optimizer and learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError, TrainingDiverged
from megatron_rl.mcore.model.precision import transformer_engine_version
from megatron_rl.mcore.runtime.patches import create_adam_state
from megatron_rl.weights.hf_files import torch_dtype

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


def check_optimizer(config: RunConfig) -> None:
    """Check that the optimizers available on this machine support the configuration.

    Raises:
        ConfigError: an optimizer setting is not supported; the message says what to set.
    """
    section = config.optimizer
    if section.states_dtype != "fp32" and (
        transformer_engine_version() is None or not config.parallel.distributed_optimizer
    ):
        raise ConfigError(
            f"optimizer.states_dtype={section.states_dtype} needs a GPU, the fused Adam of Transformer Engine and "
            "parallel.distributed_optimizer=true. Set optimizer.states_dtype=fp32."
        )
    if section.cpu_offload_fraction and (not torch.cuda.is_available() or config.model.dtype != "bf16"):
        raise ConfigError(
            f"optimizer.cpu_offload_fraction={section.cpu_offload_fraction} needs a GPU and model.dtype=bf16. "
            "Set optimizer.cpu_offload_fraction=0."
        )


def build_optimizer(config: RunConfig, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Build AdamW with decoupled weight decay; bf16 weights get fp32 master weights.

    Uses the fused Adam of Transformer Engine or Apex where it is installed, torch's AdamW otherwise.

    Raises:
        ConfigError: see ``check_optimizer``.
    """
    check_optimizer(config)
    section, dtype = config.optimizer, torch_dtype(config.model.dtype)
    values: dict[str, Any] = {}
    if section.states_dtype != "fp32":
        states = STATE_DTYPES[section.states_dtype]
        values |= {"use_precision_aware_optimizer": True, "exp_avg_dtype": states, "exp_avg_sq_dtype": states}
    if section.cpu_offload_fraction:
        values |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": section.cpu_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": True,
            # the fused GPU optimizers have no CPU version
            "use_torch_optimizer_for_cpu_offload": True,
        }
    settings = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=None if config.precision.fp8 == "disabled" else config.precision.fp8,
        **values,
    )
    optimizer = get_megatron_optimizer(settings, list(chunks), config_overrides=get_standard_config_overrides(settings))
    create_adam_state(optimizer)
    return optimizer


def build_scheduler(
    config: OptimizerSection, optimizer: MegatronOptimizer, num_updates: int
) -> OptimizerParamScheduler:
    """Build a learning-rate schedule of linear warm-up, then decay, counted in optimizer updates.

    Args:
        config: optimizer section.
        optimizer: optimizer whose learning rate is set.
        num_updates: optimizer updates of the whole run; the decay ends there unless ``lr_decay_updates`` is set.
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
    """Clip the gradients, step the optimizer, and return the global gradient norm before clipping.

    Raises:
        TrainingDiverged: the norm is not finite; raised on every rank, before any weight changes.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # reduced over all ranks, so every rank gets the same value
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"gradient norm is {norm}: expected a finite number. The weights are unchanged. "
            "Lower optimizer.lr, or inspect the last rollouts."
        )
    optimizer.step()
    return norm
