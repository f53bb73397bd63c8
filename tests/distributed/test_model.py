"""The Megatron model against transformers, and the export of its weights."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.models.toy import FAMILIES
from tests.covering import matrix
from tests.distributed import cases
from tests.gang import Gang
from tests.toys import VOCAB, sequences, toy_config

MOE = ("qwen3_moe", "mixtral")
BOOLEANS = [True, False]
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}


def ranks_of(layout: str) -> int:
    return prod(LAYOUTS[layout])


def sizes(layout: str) -> list[str]:
    tp, pp = LAYOUTS[layout]
    return [f"parallel.tensor_parallel_size={tp}", f"parallel.pipeline_parallel_size={pp}"]


def reference_logits(model: Path) -> torch.Tensor:
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([hf(s.token_ids[None]).logits[0] for s in sequences()])


def is_valid(row: Mapping[str, Any]) -> bool:
    """Sequence parallelism needs tensor parallelism, whose experts need it."""
    if "tp2" not in row["layout"]:
        return not row["sequence_parallel"]
    return row["sequence_parallel"] or row["family"] not in MOE


@matrix(is_valid, family=[*FAMILIES], tied=BOOLEANS, layout=[*LAYOUTS], packed=BOOLEANS, sequence_parallel=BOOLEANS)
def test_logits_equal_transformers(
    family: str,
    tied: bool,
    layout: str,
    packed: bool,
    sequence_parallel: bool,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = toy_model(family, tied=tied)
    expected = reference_logits(model)
    options = [f"batching.packed={packed}", f"parallel.sequence_parallel={sequence_parallel}"]
    config = toy_config(tmp_path, model, *sizes(layout), *options)
    actual = [x for x in gangs(ranks_of(layout)).call(cases.logits, config=config) if x is not None]
    assert actual
    for logits in actual:
        assert logits.shape == expected.shape == (sum(s.token_ids.numel() for s in sequences()), VOCAB)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", BOOLEANS)
def test_logits_with_a_sliding_window_in_later_layers(
    packed: bool, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    expected = reference_logits(model)
    assert (expected - reference_logits(toy_model("qwen2"))).abs().max() > 0.1  # the window has an effect
    (actual,) = gangs(1).call(cases.logits, config=toy_config(tmp_path, model, f"batching.packed={packed}"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_logits_with_llama3_rope_scaling(gangs: Callable[[int], Gang], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_rl.models.toy import make_tokenizer

    torch.manual_seed(0)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=131072,
            rope_parameters=scaling,
            tie_word_embeddings=True,
        )
    )
    hf.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    expected = reference_logits(tmp_path / "model")
    (actual,) = gangs(1).call(cases.logits, config=toy_config(tmp_path, tmp_path / "model"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", BOOLEANS, ids=["tied", "untied"])
def test_export_equals_the_loaded_checkpoint(
    tied: bool, layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen3", tied=tied)
    expected = load_file(model / "model.safetensors")
    gang = gangs(ranks_of(layout))
    for tensors in gang.call(cases.exported_weights, config=toy_config(tmp_path, model, *sizes(layout))):
        assert set(tensors) == set(expected)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key
