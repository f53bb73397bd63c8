"""Features that only the embedded engine has, and its random draws."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.sampling import choose, sample_seed, uniforms
from tests.engines.contract import collect, params, requests, setup_of


def test_reported_routing_equals_transformers(toy_model: Callable[..., Path]) -> None:
    folder = toy_model("qwen3_moe", tied=False)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # four sequences at a time, so that sequences join and leave the batch
    engine = EmbeddedEngine(setup_of(folder, max_num_sequences=4), reports_routing=True)
    engine.load_weights(iter(load_file(folder / "model.safetensors").items()), version=0)
    batch = requests(count=6, samples=2)
    completions = collect(engine.generate(iter(batch), params(), max_requests=6))
    assert len({completion.token_ids.numel() for completion in completions.values()}) > 1
    for (key, _), completion in completions.items():
        tokens = torch.cat([batch[key].token_ids, completion.token_ids])
        assert completion.routing is not None
        assert completion.routing.shape == (tokens.numel(), 2, 2)
        with torch.no_grad():
            scores = hf(tokens[None], output_router_logits=True).router_logits
        for layer, logits in enumerate(scores):
            expected = logits.topk(2).indices.sort(-1).values
            actual = completion.routing[:, layer].long().sort(-1).values
            assert torch.equal(actual[:-1], expected[:-1])  # the engine never runs the last token through the model
            assert actual[-1].tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_frequencies_match_the_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    count = 20000
    draws = torch.stack([uniforms(sample_seed(5, i), 1) for i in range(count)])[:, 0]
    tokens, _ = choose(logits.expand(count, 4), draws, params(temperature=temperature))
    frequencies = torch.bincount(tokens, minlength=4) / count
    torch.testing.assert_close(frequencies, (logits / temperature).softmax(-1), rtol=0, atol=0.015)


def test_seeds_of_neighbours_are_unrelated() -> None:
    draws = torch.stack(
        [uniforms(sample_seed(0, step, prompt, k), 1) for step in range(10) for prompt in range(10) for k in range(10)]
    )
    lagged = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(float(lagged)) < 0.1
    assert 0.45 < float(draws.mean()) < 0.55
