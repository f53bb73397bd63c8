"""Megatron layer specs: the modules of a transformer layer."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rl.mcore.model.attention import CoreAttention, RMSNorm
from megatron_rl.mcore.model.precision import Implementation


def block_submodules(
    config: TransformerConfig, implementation: Implementation, *, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Specs of the layers of one model chunk and of its final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layer, norm = _LAYERS[implementation](config)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    """Megatron's own modules, with attention and norms that do not need Transformer Engine."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        # keep the norm before experts under its own name in checkpoints, as with Transformer Engine
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec, RMSNorm


def _transformer_engine_layer(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    """Transformer Engine's modules, with attention that reads ``PackedSequences``."""
    from megatron.core.extensions.transformer_engine import TENorm

    from megatron_rl.mcore.model.te_attention import PackedTEAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    spec.submodules.self_attention.submodules.core_attention = PackedTEAttention
    return spec, TENorm


_LAYERS = {"local": _local_layer, "transformer_engine": _transformer_engine_layer}
