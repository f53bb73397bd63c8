"""The contract of all engines; ``--engine`` selects the engine under test."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.errors import EngineError, Interrupted, WeightSyncError
from megatron_rl.models.toy import FAMILIES
from megatron_rl.rollout.engines.base import Continuation, Engine, Request
from tests.engines.contract import INTERRUPTION, SIZES, collect, params, requests
from tests.toys import VOCAB

EngineOf = Callable[..., Engine]
# families whose toy model has a sliding window, which SGLang does not support
WINDOWED = ("mistral",)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, False) for family in FAMILIES), ("qwen2", True), ("llama", True)]
)
def test_greedy_tokens_equal_transformers(
    family: str, tied: bool, engine_of: EngineOf, engine_name: str, toy_model: Callable[..., Path]
) -> None:
    folder = toy_model(family, tied=tied, **SIZES)
    if engine_name == "sglang" and family in WINDOWED:
        with pytest.raises(EngineError, match="attends to the last 8"):
            engine_of(folder)
        return
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = requests(samples=1)
    completions = collect(engine_of(folder).generate(iter(batch), params(temperature=0.0), max_requests=5))
    for request in batch:
        ids = request.token_ids[None]
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, ids.size(1) :]
        completion = completions[request.key, 0]
        assert completion.token_ids.tolist() == expected.tolist()
        assert completion.policy_version == 3
        assert completion.finish_reason == ("stop" if expected[-1] == 1 else "length")


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.6}], ids=str
)
def test_logprobs_are_those_of_the_sampled_distribution(
    changes: dict[str, float], engine_of: EngineOf, engine_name: str, toy_model: Callable[..., Path]
) -> None:
    folder = toy_model("qwen2", **SIZES)
    # SGLang reports log-probs of the distribution without top-k and top-p
    if engine_name == "sglang" and {"top_k", "top_p"} & set(changes):
        with pytest.raises(EngineError, match=r"Set rollout\.top_p=1 and rollout\.top_k=0"):
            list(engine_of(folder).generate(iter(requests()), params(**changes), max_requests=5))
        return
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch, sampling = requests(), params(**changes)
    completions = collect(engine_of(folder).generate(iter(batch), sampling, max_requests=5))
    assert len(completions) == 15
    for (key, _), completion in completions.items():
        ids = torch.cat([batch[key].token_ids, completion.token_ids])
        with torch.no_grad():
            logits = hf(ids[None]).logits[0, batch[key].token_ids.numel() - 1 : -1] / sampling.temperature
        if sampling.top_k:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], float("-inf"))
        if sampling.top_p < 1:
            values, order = logits.softmax(-1).sort(descending=True)
            outside = torch.zeros_like(logits, dtype=torch.bool).scatter(
                1, order, values.cumsum(-1) - values >= sampling.top_p
            )
            logits = logits.masked_fill(outside, float("-inf"))
        expected = logits.log_softmax(-1).gather(1, completion.token_ids[:, None])[:, 0]
        torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_samples_without_logprobs_come_from_the_nucleus(engine_of: EngineOf, toy_model: Callable[..., Path]) -> None:
    """Evaluation samples without log-probs; SGLang supports top-p only in this way."""
    folder = toy_model("qwen2", **SIZES)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch, sampling = requests(count=8, samples=8), params(top_p=0.4, logprobs=False)
    completions = collect(engine_of(folder).generate(iter(batch), sampling, max_requests=8))
    assert len(completions) == 64
    outside = 0
    for (key, _), completion in completions.items():
        ids = torch.cat([batch[key].token_ids, completion.token_ids])
        with torch.no_grad():
            probs = hf(ids[None]).logits[0, batch[key].token_ids.numel() - 1 : -1].softmax(-1)
        values, order = probs.sort(descending=True)
        before = (values.cumsum(-1) - values).gather(1, order.argsort(-1))  # probability mass of all likelier tokens
        outside += int((before.gather(1, completion.token_ids[:, None]) >= 0.4 + 1e-4).sum())
        assert completion.logprobs.shape == completion.token_ids.shape
    assert outside == 0


def test_loglikelihoods_equal_transformers(engine_of: EngineOf, toy_model: Callable[..., Path]) -> None:
    folder = toy_model("qwen2", **SIZES)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = engine_of(folder)
    continuations = [
        Continuation(token_ids=continuation.token_ids, start=start)
        for continuation in requests(count=9) for start in {1, continuation.token_ids.numel() - 1}
    ]  # fmt: skip
    for _ in range(2):  # in the second pass the engine may have the prompts in its cache
        loglikelihoods = engine.loglikelihood(continuations)
        assert len(loglikelihoods) == len(continuations)
        for continuation, logprobs in zip(continuations, loglikelihoods, strict=True):
            with torch.no_grad():
                logits = hf(continuation.token_ids[None]).logits[0, continuation.start - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, continuation.token_ids[continuation.start :, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert engine.loglikelihood([]) == []
    # the engine can still sample
    assert len(collect(engine.generate(iter(requests()), params(), max_requests=5))) == 15


@pytest.mark.parametrize(
    ("tokens", "start", "message"),
    [([3, 4], 0, "starts at token 0 of 2"), ([3, 4], 2, "starts at token 2 of 2"), ([3] * 512, 5, "has 512 tokens"),
     ([3, VOCAB], 1, f"token ids 3 to {VOCAB}")],
)  # fmt: skip
def test_invalid_continuations_are_rejected(
    tokens: list[int], start: int, message: str, engine_of: EngineOf, toy_model: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match=message):
        engine_of(toy_model("qwen2", **SIZES)).loglikelihood(
            [Continuation(token_ids=torch.tensor(tokens), start=start)]
        )


def test_a_sample_depends_on_its_seed_and_not_on_other_requests(
    engine_of: EngineOf, engine_name: str, toy_model: Callable[..., Path]
) -> None:
    folder, batch = toy_model("qwen3", **SIZES), requests(count=9)
    together = collect(engine_of(folder).generate(iter(batch), params(), max_requests=9))
    assert len({tuple(c.token_ids.tolist()) for c in together.values()}) > 20
    # SGLang has one random state for all requests, so that repeated requests give other samples
    if engine_name == "sglang":
        again = collect(engine_of(folder).generate(iter(batch), params(), max_requests=9))
        assert sum(again[k].token_ids.tolist() == together[k].token_ids.tolist() for k in again) < 10
        return
    for limits in ((64, 1), (3, 9), (7, 2)):
        engine = engine_of(folder, max_num_sequences=limits[0])
        other = collect(engine.generate(iter(reversed(batch)), params(), max_requests=limits[1]))
        assert other.keys() == together.keys()
        for key, completion in together.items():
            assert other[key].token_ids.tolist() == completion.token_ids.tolist()


def test_results_are_streamed_and_requests_are_pulled_as_slots_become_free(
    engine_of: EngineOf, toy_model: Callable[..., Path]
) -> None:
    pulled: list[int] = []

    def queue() -> Iterator[Request]:
        for request in requests(count=6):
            pulled.append(request.key)
            yield request

    engine = engine_of(toy_model("qwen2", **SIZES), max_num_sequences=6)
    results = engine.generate(queue(), params(max_new_tokens=40), max_requests=6)
    next(results)
    assert pulled == [0, 1]
    assert len(list(results)) == 17
    assert pulled == list(range(6))


def test_length_limits_and_stop_tokens_end_samples(engine_of: EngineOf, toy_model: Callable[..., Path]) -> None:
    completions = collect(
        engine_of(toy_model("qwen2", **SIZES)).generate(iter(requests()), params(max_new_tokens=1), max_requests=5)
    )
    assert {c.token_ids.numel() for c in completions.values()} == {1}
    everything = params(stop_token_ids=tuple(range(VOCAB)))
    completions = collect(engine_of(toy_model("qwen2", **SIZES)).generate(iter(requests()), everything, max_requests=5))
    assert {(c.token_ids.numel(), c.finish_reason) for c in completions.values()} == {(1, "stop")}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 tokens"),
        ([VOCAB], f"token ids {VOCAB} to {VOCAB}"),
        ([-1], "token ids -1"),
        ([5] * 510, "more than the engine's 512"),
    ],
)
def test_invalid_requests_are_rejected(
    ids: list[int], message: str, engine_of: EngineOf, toy_model: Callable[..., Path]
) -> None:
    request = Request(key=0, token_ids=torch.tensor(ids, dtype=torch.int64), seeds=(1,))
    with pytest.raises(EngineError, match=message):
        list(engine_of(toy_model(**SIZES)).generate(iter([request]), params(), max_requests=1))


def test_incomplete_or_unknown_weights_are_rejected(engine_of: EngineOf, toy_model: Callable[..., Path]) -> None:
    tensors = load_file(toy_model(**SIZES) / "model.safetensors")
    engine = engine_of(toy_model(**SIZES))
    without = {name: t for name, t in tensors.items() if "norm.weight" not in name}
    with pytest.raises(WeightSyncError, match="tensors are missing, first model"):
        engine.load_weights(iter(without.items()), version=4)
    assert engine.version == -1
    with pytest.raises(EngineError, match="no weights yet"):
        list(engine.generate(iter(requests()), params(), max_requests=1))
    with pytest.raises(WeightSyncError, match="extra is not a tensor of the model"):
        engine.load_weights(iter({**tensors, "extra": torch.zeros(1)}.items()), version=4)
    with pytest.raises(WeightSyncError, match="expected"):
        engine.load_weights(iter({**tensors, "model.norm.weight": torch.zeros(1)}.items()), version=4)
    engine.load_weights(iter(tensors.items()), version=5)
    assert engine.version == 5


def test_a_sleeping_engine_holds_no_memory_and_wakes_part_by_part(
    engine_of: EngineOf, engine_name: str, toy_model: Callable[..., Path]
) -> None:
    folder = toy_model("qwen2", **SIZES)
    engine, greedy = engine_of(folder), params(temperature=0.0)
    before = collect(engine.generate(iter(requests()), greedy, max_requests=5))
    awake = engine.memory()
    engine.sleep()
    assert engine.version == -1
    assert set(engine.memory().values()) <= {0}
    with pytest.raises(EngineError, match="no weights yet"):
        list(engine.generate(iter(requests()), greedy, max_requests=5))
    engine.wake("weights")
    if engine_name == "vllm":
        assert engine.memory() == {"weights": awake["weights"], "kv_cache": 0}
    engine.load_weights(iter(load_file(folder / "model.safetensors").items()), version=6)
    engine.wake("kv_cache")
    engine.wake("kv_cache")
    assert engine.memory() == awake
    after = collect(engine.generate(iter(requests()), greedy, max_requests=5))
    assert {k: c.token_ids.tolist() for k, c in after.items()} == {k: c.token_ids.tolist() for k, c in before.items()}
    assert {completion.policy_version for completion in after.values()} == {6}


def test_sequences_may_be_as_long_as_the_engines_maximum(engine_of: EngineOf, toy_model: Callable[..., Path]) -> None:
    engine = engine_of(toy_model("qwen2", **SIZES))
    for length in (500, 511):
        request = Request(key=0, token_ids=torch.full((length,), 5), seeds=(1,))
        changes = params(temperature=0.0, max_new_tokens=512 - length, stop_token_ids=())
        completion = collect(engine.generate(iter([request]), changes, max_requests=1))[0, 0]
        assert (completion.token_ids.numel(), completion.finish_reason) == (512 - length, "length")


def test_an_interrupted_engine_stops_at_once_and_can_generate_again(
    engine_of: EngineOf, toy_model: Callable[..., Path]
) -> None:
    engine = engine_of(toy_model("qwen2", **SIZES))
    batch = [Request(key=key, token_ids=torch.tensor([5, 6, 7]), seeds=(1, 2)) for key in range(2)]
    INTERRUPTION.queries_left = 5
    with pytest.raises(Interrupted):
        collect(engine.generate(iter(batch), params(max_new_tokens=500, stop_token_ids=()), max_requests=4))
    INTERRUPTION.queries_left = math.inf
    completions = collect(engine.generate(iter(batch), params(max_new_tokens=3, stop_token_ids=()), max_requests=4))
    assert {
        key_and_sample: completion.token_ids.numel() for key_and_sample, completion in completions.items()
    } == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 3)
