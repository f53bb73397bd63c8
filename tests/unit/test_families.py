"""The layout table of a published config.json has the published number of parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.layout import hf_shapes

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "torch_dtype": "bfloat16"}
QWEN2 = {**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN3 = {**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool = False, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        **others,
    }


QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "router_aux_loss_coef": 0.001,
}
MISTRAL = {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
MIXTRAL = {
    **COMMON,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-0.5B": ({**QWEN2, **sizes(896, 4864, 24, 14, 2, 151936, tied=True)}, 494_032_768),
    "Qwen2.5-1.5B": ({**QWEN2, **sizes(1536, 8960, 28, 12, 2, 151936, tied=True)}, 1_543_714_304),
    "Qwen2.5-Math-7B": ({**QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064, rope_theta=1e4)}, 7_615_616_512),
    "Qwen3-8B": ({**QWEN3, **sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)}, 8_190_735_360),
    "Qwen3-30B-A3B": ({**QWEN3_MOE, **sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128)}, 30_532_122_624),
    "Llama-2-7b-hf": ({**LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000, rope_theta=1e4)}, 6_738_415_616),
    "Llama-3.1-8B": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 8, 128256, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {**LLAMA, **sizes(2048, 8192, 16, 32, 8, 128256, tied=True, head_dim=64, rope_scaling=LLAMA3_ROPE)},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": ({**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, rope_theta=1e4)}, 7_241_732_096),
    "Mixtral-8x7B-v0.1": ({**MIXTRAL, **sizes(4096, 14336, 32, 32, 8, 32000)}, 46_702_792_704),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {**QWEN2, **sizes(1536, 8960, 28, 12, 2, 151936, rope_theta=1e4)},
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Llama-70B": (
        {**LLAMA, **sizes(8192, 28672, 80, 64, 8, 128256, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)},
        70_553_706_496,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(layout_table(read_model_spec(tmp_path), 1))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
