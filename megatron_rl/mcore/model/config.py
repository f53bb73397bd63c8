"""Build Megatron's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rl.config.parallel import MoeSection, ParallelSection
from megatron_rl.config.performance import MemorySection
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.model.precision import Implementation, fp8_settings
from megatron_rl.models import ModelSpec
from megatron_rl.models.rope import softmax_scale
from megatron_rl.models.spec import MoeSpec
from megatron_rl.weights.hf_files import torch_dtype

AUX_LOSS = {
    "disabled": "none",
    "micro_batch": "aux_loss",
    "sequence": "seq_aux_loss",
    "global": "global_aux_loss",
}


def transformer_config(spec: ModelSpec, config: RunConfig, implementation: Implementation) -> TransformerConfig:
    """Build Megatron's TransformerConfig from a model spec and the configuration of the run.

    Raises:
        ConfigError: layers, heads or experts are not divisible by the parallel sizes, or Megatron rejects the values.
    """
    dtype = torch_dtype(config.model.dtype)
    _check_divisible(spec, config)
    values: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "qk_layernorm": spec.qk_norm,
        "softmax_scale": softmax_scale(spec),
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # every weight is read from the checkpoint, so none needs random initialisation; skipping initialisation
        # altogether would also skip the attributes that mark tensor-parallel parameters for Megatron
        "init_method": _unchanged,
        "output_layer_init_method": _unchanged,
        "use_cpu_initialization": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # micro-batch lengths differ between ranks, which the other token dispatchers do not support
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # the loss is a sum over tokens; the schedule divides gradients by the global token count
        "calculate_per_token_loss": True,
        **_window(spec),
        **_parallel_values(config.parallel),
        **(_moe_values(spec.moe, config.moe, implementation) if spec.moe is not None else {}),
        **_recompute(config.memory),
        **fp8_settings(config),
        # these fusions need Apex or Transformer Engine
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
    }
    try:
        return TransformerConfig(**values)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core rejects this configuration: {error}") from error


def _parallel_values(parallel: ParallelSection) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_parallel_size > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_parallel_size if interleaved else None,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
        # with batched p2p exchanges the interleaved schedule silently computes wrong values
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _moe_values(moe: MoeSpec, section: MoeSection, implementation: Implementation) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.experts_per_token,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        # Megatron's softmax over just the chosen experts equals the softmax over all, normalised over the chosen ones
        "moe_router_pre_softmax": not moe.normalize_probabilities,
        "moe_router_load_balancing_type": AUX_LOSS[section.aux_loss],
        "moe_aux_loss_coeff": section.aux_loss_coef if section.aux_loss != "disabled" else 0.0,
        "moe_z_loss_coeff": section.z_loss_coef or None,
        "moe_router_dtype": None if section.router_dtype == "model" else section.router_dtype,
        "moe_grouped_gemm": implementation == "transformer_engine",
    }


def _window(spec: ModelSpec) -> dict[str, Any]:
    window = spec.sliding_window
    if window is None:
        return {}
    return {
        "window_size": (window.size - 1, 0),  # tokens before and after
        "window_attn_skip_freq": [int(layer >= window.first_layer) for layer in range(spec.num_layers)],
    }


def _recompute(memory: MemorySection) -> dict[str, Any]:
    match memory.recompute:
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(memory.recompute_modules)}
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": memory.recompute_num_layers,
            }
    return {}


def _check_divisible(spec: ModelSpec, config: RunConfig) -> None:
    parallel = config.parallel
    checks = [
        ("key/value heads", spec.num_query_groups, parallel.tensor_parallel_size, "parallel.tensor_parallel_size"),
    ]
    uneven = (
        parallel.num_layers_in_first_pipeline_stage is not None
        or parallel.num_layers_in_last_pipeline_stage is not None
        or parallel.account_for_embedding_in_pipeline_split
        or parallel.account_for_loss_in_pipeline_split
    )
    chunks = parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
    if not uneven:
        interleaved = parallel.virtual_pipeline_parallel_size > 1
        key = "parallel.pipeline_parallel_size"
        key += " x parallel.virtual_pipeline_parallel_size" if interleaved else ""
        checks.append(("layers", spec.num_layers, chunks, key))
    if spec.moe is None:
        checks.append(
            (
                "feed-forward columns",
                spec.ffn_hidden_size,
                parallel.tensor_parallel_size,
                "parallel.tensor_parallel_size",
            )
        )
    else:
        checks += [
            ("experts", spec.moe.num_experts, parallel.expert_parallel_size, "parallel.expert_parallel_size"),
            (
                "columns of an expert",
                spec.moe.ffn_hidden_size,
                parallel.expert_tensor_size,
                "parallel.expert_tensor_parallel_size",
            ),
        ]
        if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:
            raise ConfigError(
                f"parallel.tensor_parallel_size={parallel.tensor_parallel_size} with a mixture-of-experts model needs "
                "sequence parallelism. Set parallel.sequence_parallel=true."
            )
    for what, total, size, key in checks:
        if total % size:
            raise ConfigError(
                f"{key}={size} does not divide the model's {total} {what}. Set it to a divisor of {total}."
            )
    if spec.moe is None and parallel.expert_parallel_size > 1:
        raise ConfigError(
            f"parallel.expert_parallel_size={parallel.expert_parallel_size}: {spec.family} has no experts. Set it to 1."
        )


def _unchanged(weight: Tensor) -> Tensor:
    return weight
