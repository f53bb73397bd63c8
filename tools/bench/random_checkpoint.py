"""Write Hugging Face folders with the shapes of real models and random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.hf_files import write_hf_folder
from megatron_rl.weights.layout import hf_shapes

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
QWEN25_0_5B: dict[str, Any] = {
    **_QWEN,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_1_5B: dict[str, Any] = {
    **_QWEN,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_7B: dict[str, Any] = {
    **_QWEN,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def write_random_checkpoint(folder: Path, config: dict[str, Any], *, max_shard_bytes: int = 5 * 10**9) -> int:
    """Write random bf16 weights; return their number of bytes.

    Args:
        folder: folder to write; must not exist.
        config: content of config.json.
        max_shard_bytes: largest safetensors file.
    """
    like = folder.with_name(folder.name + "_config")
    like.mkdir(parents=True)
    (like / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(layout_table(read_model_spec(like), 1))
    generator = torch.Generator().manual_seed(0)
    # small, different values, without drawing billions of normal numbers
    bits = torch.randint(0x3800, 0x3D00, (2**20 + 7,), generator=generator, dtype=torch.int16).view(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            repeated = bits.roll(number).repeat(-(-count // bits.numel()))[:count].view(shape)
            yield name, torch.ones_like(repeated) if "norm" in name else repeated

    write_hf_folder(folder, tensors(), like=like, max_shard_bytes=max_shard_bytes)
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())
