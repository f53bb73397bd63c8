"""Rotary scaling against transformers, FLOP counts, and settings that need a GPU."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.errors import ConfigError
from megatron_rl.mcore.model.precision import choose_implementation
from megatron_rl.mcore.optimizer import check_optimizer
from megatron_rl.models import read_model_spec
from megatron_rl.models.flops import forward_flops, peak_tflops
from megatron_rl.models.rope import inverse_frequencies, softmax_scale
from megatron_rl.models.spec import ModelSpec
from tests.toys import toy_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn-whole-dimensions": {**YARN, "truncate": False, "beta_fast": 24, "beta_slow": 2},
    "yarn-magnitudes": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.9},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    config = Qwen2Config(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=3,
        intermediate_size=512,
        vocab_size=1000,
        max_position_embeddings=131072,
    ).to_dict()
    config |= {"architectures": ["Qwen2ForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_spec(folder)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_scaling_equals_transformers(name: str, tmp_path: Path) -> None:
    scaling = {**SCALINGS[name], "rope_theta": 1e6}
    spec = spec_of(tmp_path, rope_parameters=scaling)
    config = Qwen2Config(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=scaling
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(spec), frequencies, rtol=1e-6, atol=0)
    assert (softmax_scale(spec) or 128**-0.5) == pytest.approx(factor**2 * 128**-0.5)


def test_forward_flops_equal_a_count_by_hand(tmp_path: Path) -> None:
    """Check one sequence of 10 tokens, 4 of them with logits."""
    flops = forward_flops(spec_of(tmp_path), num_tokens=10, sum_squared_lengths=100, num_logit_tokens=4)
    layer = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512
    assert flops == 2 * (10 * 3 * layer + 3 * 256 * 100 + 4 * 256 * 1000)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_known_devices_have_a_peak(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without a GPU")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.implementation=transformer_engine", "expected Transformer Engine .* found no Transformer Engine"),
        ("precision.fp8=delayed", "precision.fp8=delayed: expected Transformer Engine and a GPU with FP8"),
        ("precision.fp8=mxfp8", "precision.fp8=mxfp8: expected"),
        ("optimizer.states_dtype=bf16", "optimizer.states_dtype=bf16 needs a GPU"),
        ("optimizer.cpu_offload_fraction=0.5", "optimizer.cpu_offload_fraction=0.5 needs a GPU"),
    ],
)
def test_settings_that_need_a_gpu_are_rejected_without_one(override: str, message: str, tmp_path: Path) -> None:
    config = toy_config(tmp_path, tmp_path, override)
    check = check_optimizer if override.startswith("optimizer") else choose_implementation
    with pytest.raises(ConfigError, match=message):
        check(config)
