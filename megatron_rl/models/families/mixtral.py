"""Mixtral: Mistral's attention and a mixture of experts in every layer, whose tensors have different names."""

from megatron_rl.models.families.common import HFConfig, decoder
from megatron_rl.models.spec import HFNames, ModelSpec, MoeSpec, SlidingWindow


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model; the probabilities of the chosen experts always sum to 1.

    Source: transformers' MixtralConfig.
    """
    size = config.get("sliding_window")
    moe = MoeSpec(
        num_experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["intermediate_size"],
        normalize_probabilities=True,
    )
    return decoder(
        "mixtral",
        config,
        moe=moe,
        sliding_window=SlidingWindow(size=size) if size else None,
        hf_names=HFNames(feed_forward="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
