"""Qwen3 with a mixture of experts in every layer."""

from megatron_rl.errors import ConversionError
from megatron_rl.models.families.common import HFConfig, decoder, reject_value
from megatron_rl.models.spec import ModelSpec, MoeSpec


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model. Source: transformers' Qwen3MoeConfig."""
    reject_value(config, "use_sliding_window", True)
    reject_value(config, "attention_bias", True)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ConversionError(
            f"config.json: mlp_only_layers={config.get('mlp_only_layers')}, "
            f"decoder_sparse_step={config.get('decoder_sparse_step')}: only models with experts in every layer "
            "are supported."
        )
    moe = MoeSpec(
        num_experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize_probabilities=bool(config.get("norm_topk_prob", False)),
    )
    return decoder("qwen3_moe", config, qk_norm=True, moe=moe)
