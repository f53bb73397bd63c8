"""An update gives the same loss, gradient norm and weights under every layout."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import cases
from tests.gang import Gang
from tests.toys import sequences, toy_config


def keys(text: str) -> list[str]:
    """Return the overrides of a shorthand such as "tp2 pp2 sp"; words with a dot are kept unchanged."""
    overrides = []
    for word in text.split():
        if "." in word:
            overrides.append(word)
        elif word == "sp":
            overrides.append("parallel.sequence_parallel=true")
        else:
            kind, size = word.rstrip("0123456789"), word.lstrip("abcdefghijklmnopqrstuvwxyz")
            overrides.append(f"parallel.{SIZES[kind]}_size={size}")
    return overrides


SIZES = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
OVERLAP = "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true"
FIRST_3 = "parallel.num_layers_in_first_pipeline_stage=3 parallel.num_layers_in_last_pipeline_stage=1"

DENSE = [
    (1, "batching.micro_batch_size=1"),
    (1, "batching.packed=false batching.micro_batch_size=3"),
    (1, "batching.logprob_chunk_tokens=7"),
    (2, "tp2 batching.logprob_chunk_tokens=7"),
    (2, "tp2 sp"),
    (2, "pp2"),
    (2, "pp2 vpp2"),
    (2, "pp2 vpp2 batching.micro_batch_size=1 batching.packed=false"),
    (2, f"pp2 {FIRST_3}"),
    (2, "cp2"),
    (2, "cp2 batching.packed=false batching.micro_batch_size=2"),
    (2, OVERLAP),
    (2, "parallel.distributed_optimizer=false"),
    (4, "tp2 pp2 sp vpp2"),
    (4, "tp2 cp2 sp"),
    (4, "tp2 cp2 batching.packed=false"),
    (4, "pp2 cp2 batching.micro_batch_size=2"),
    (4, "cp4"),
    (4, "tp2 batching.micro_batch_size=1"),
    (4, f"pp2 vpp2 {OVERLAP}"),
    (4, "pp4"),
    (1, "memory.recompute=full"),
    (1, "memory.recompute=selective memory.recompute_modules=[core_attn,layernorm,mlp]"),
    (4, "tp2 pp2 sp memory.recompute=full memory.recompute_num_layers=2"),
    (2, "cp2 memory.recompute=selective"),
    (8, "tp2 pp2 cp2 sp"),
    (2, "memory.offload=[params,grads,optimizer]"),
    (2, "memory.offload=[optimizer] parallel.distributed_optimizer=false"),
]
EXPERTS = [
    (1, "batching.packed=false batching.micro_batch_size=3"),
    (2, "ep2"),
    (2, "tp2 sp etp1"),
    (2, "tp2 sp"),
    (2, "cp2"),
    (4, "tp2 sp ep2 etp1"),
    (4, "tp2 sp ep4 etp1"),
    (4, "tp2 sp ep2"),
    (4, "pp2 vpp2 ep2"),
    (4, "cp2 ep2 batching.packed=false"),
    (4, "ep4 batching.micro_batch_size=1"),
    (2, "ep2 memory.recompute=selective memory.recompute_modules=[moe]"),
    (2, "ep2 memory.offload=[params,grads,optimizer]"),
    (8, "tp2 pp2 sp ep4 etp1"),
]


def outcome(
    gangs: Callable[[int], Gang],
    world_size: int,
    text: str,
    model: Path,
    folder: Path,
    engine_logprobs: dict[int, torch.Tensor] | None = None,
) -> list[cases.Outcome]:
    config = toy_config(folder, model, "batching.num_mini_batches=1", *keys(text))
    return gangs(world_size).call(cases.run_updates, config=config, engine_logprobs=engine_logprobs)


def assert_same(results: list[cases.Outcome], expected: cases.Outcome) -> None:
    logprobs: dict[int, torch.Tensor] = {}
    for result in results:
        assert result.losses == pytest.approx(expected.losses, abs=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-6, abs=1e-5)
        assert result.balance == pytest.approx(expected.balance, rel=1e-5)
        assert result.corrections == pytest.approx(expected.corrections, rel=1e-4)
        logprobs |= result.logprobs
        assert set(result.weights) == set(expected.weights)
        for name, tensor in result.weights.items():
            torch.testing.assert_close(
                tensor, expected.weights[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert set(logprobs) == set(expected.logprobs)
    for index, row in logprobs.items():
        torch.testing.assert_close(row, expected.logprobs[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("world_size", "text"), DENSE, ids=[text or "dp" for _, text in DENSE])
def test_dense_updates_are_equal_under_every_layout(
    world_size: int, text: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen2", tied=True, num_hidden_layers=4)
    (expected,) = outcome(gangs, 1, "", model, tmp_path)
    assert expected.norms[0] > 0.1
    assert_same(outcome(gangs, world_size, text, model, tmp_path), expected)


@pytest.mark.parametrize(("world_size", "text"), EXPERTS, ids=[text for _, text in EXPERTS])
def test_moe_updates_are_equal_under_every_layout(
    world_size: int, text: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen3_moe", tied=False, num_hidden_layers=4)
    (expected,) = outcome(gangs, 1, "", model, tmp_path)
    assert expected.norms[0] > 0.1
    assert_same(outcome(gangs, world_size, text, model, tmp_path), expected)


ROUTER_LOSSES = "moe.aux_loss=sequence moe.aux_loss_coef=0.1 moe.z_loss_coef=0.01 batching.packed=false"


@pytest.mark.parametrize("layout", ["1:batching.micro_batch_size=1", "2:", "2:ep2", "2:pp2", "4:ep2 pp2 vpp2"])
def test_router_losses_are_equal_under_every_layout(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The load balance within each sequence does not depend on the layout."""
    model = toy_model("qwen3_moe", tied=False, num_hidden_layers=4)
    alone = f"{ROUTER_LOSSES} batching.micro_batch_size=1"
    (expected,) = outcome(gangs, 1, alone, model, tmp_path)
    (without_losses,) = outcome(gangs, 1, "", model, tmp_path)
    assert len(expected.balance) == 4
    assert expected.norms != pytest.approx(without_losses.norms, rel=1e-4)
    size, text = layout.split(":")
    assert_same(outcome(gangs, int(size), f"{alone} {text}", model, tmp_path), expected)


CORRECTED = [
    "1:batching.packed=false batching.micro_batch_size=3",
    "1:batching.micro_batch_size=1",
    "2:",
    "2:tp2 sp",
    "2:pp2 vpp2",
    "2:cp2",
    "2:cp2 batching.packed=false batching.micro_batch_size=2",
    "4:tp2 cp2 sp",
    "4:cp4 batching.micro_batch_size=2",
]
# log of the ratio trainer / engine of every token of a response, by index: among them weights above and below 1, one
# that is truncated, a response whose mean ratio is too high and one whose mean ratio is too low
LOG_RATIOS = (0.05, 0.01, -0.2, -0.02, 0.4, 0.004, -0.6, 0.0)
VETOED = 5  # because of a single token
CORRECTION = (
    "algorithm.rollout_is=sequence_truncate algorithm.rollout_is_high=1.2 algorithm.rollout_veto=0.001 "
    "algorithm.rollout_rejection=geometric algorithm.rollout_rejection_low=0.7 algorithm.rollout_rejection_high=1.3"
)


@pytest.mark.parametrize("layout", CORRECTED)
def test_response_level_corrections_are_equal_under_every_layout(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The weight and the rejection of a response depend on all its tokens, whichever rank holds them."""
    model = toy_model("qwen2", tied=True, num_hidden_layers=4)
    (uncorrected,) = outcome(gangs, 1, "", model, tmp_path)
    engine_logprobs = {index: row - LOG_RATIOS[index] for index, row in uncorrected.logprobs.items()}
    engine_logprobs[VETOED][12] += 8.0
    (expected,) = outcome(gangs, 1, CORRECTION, model, tmp_path, engine_logprobs)
    # tokens of the responses: 6, 14, 3, 27, 9, 18, 5 and none
    weights = [1.2, math.exp(0.14), math.exp(-0.6), math.exp(-0.54), 1.2, math.exp(18 * 0.004 - 8), math.exp(-3)]
    assert expected.corrections == pytest.approx(
        {
            "rollout_corr/rejected": 3 / 7,
            "rollout_corr/vetoed": 1 / 7,
            "rollout_corr/is_weight": sum(weights) / 7,
            "rollout_corr/is_changed": 2 / 7,
        },
        rel=1e-4,
    )
    assert expected.norms != pytest.approx(uncorrected.norms, rel=1e-2)
    size, text = layout.split(":")
    assert_same(outcome(gangs, int(size), f"{CORRECTION} {text}", model, tmp_path, engine_logprobs), expected)


GSPO = "algorithm.loss=gspo algorithm.clip_ratio_low=0.6 algorithm.clip_ratio_high=2.0"


@pytest.mark.parametrize("layout", CORRECTED)
def test_response_level_ratios_are_equal_under_every_layout(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The ratio of a response depends on all its tokens, whichever rank holds them."""
    model = toy_model("qwen2", tied=True, num_hidden_layers=4)
    (token_level,) = outcome(gangs, 1, "", model, tmp_path)
    (expected,) = outcome(gangs, 1, GSPO, model, tmp_path)
    assert expected.norms[0] > 0.1
    assert expected.norms != pytest.approx(token_level.norms, rel=1e-2)
    size, text = layout.split(":")
    assert_same(outcome(gangs, int(size), f"{GSPO} {text}", model, tmp_path), expected)


@pytest.mark.parametrize("layout", ["1:", "2:", "4:", "2:tp2", "2:pp2", "2:cp2", "4:tp2", "4:pp2 cp2"])
def test_returns_are_whitened_over_all_ranks(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The expected values are REINFORCE++, written out over all tokens of the step."""
    rewards = [1.0, 0.0, 0.5, 1.0, -1.0, 0.25, 2.0, 0.0]
    returns, kl = [], []
    for sequence, reward in zip(sequences(cases.LENGTHS), rewards, strict=True):
        mask = sequence.loss_mask
        token_kl = (sequence.old_logprobs - sequence.ref_logprobs)[mask].double()
        to_go = torch.ones(token_kl.numel(), token_kl.numel()).double().triu()
        returns.append(reward - 0.1 * to_go @ token_kl)
        kl.append(token_kl)
    all_returns = torch.cat(returns)
    size, text = layout.split(":")
    overrides = keys("algorithm.advantage=reinforce algorithm.kl_reward_coef=0.1 algorithm.whiten_advantages=true")
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), "batching.num_mini_batches=1", *overrides, *keys(text))
    actual: dict[int, torch.Tensor] = {}
    for rows, metrics in gangs(int(size)).call(cases.advantages_by_index, config=config, rewards=rewards):
        actual |= rows
        assert metrics["critic/kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
        assert metrics["critic/kl_coef"] == 0.1
        assert metrics["critic/advantages/mean"] == pytest.approx(0, abs=1e-6)
    for index, row in enumerate(returns):
        expected = (row - all_returns.mean()) / all_returns.std()
        torch.testing.assert_close(actual[index].double(), expected, rtol=0, atol=1e-6)


REPLAYED = ["1:batching.packed=false", "2:ep2", "2:tp2 sp", "2:cp2", "4:pp2 vpp2 ep2", "4:tp2 cp2 sp"]


@pytest.mark.parametrize("layout", REPLAYED)
def test_replayed_routing_is_equal_under_every_layout(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen3_moe", tied=False, num_hidden_layers=4)

    def replay(layout: str) -> dict[int, torch.Tensor]:
        size, text = layout.split(":")
        config = toy_config(tmp_path, model, "batching.num_mini_batches=1", *keys(text))
        logprobs: dict[int, torch.Tensor] = {}
        for rows, distance in gangs(int(size)).call(cases.replay_routing, config=config):
            logprobs |= rows
            assert distance > 1e-3
        return logprobs

    expected, actual = replay("1:"), replay(layout)
    assert set(actual) == set(expected)
    for index, row in actual.items():
        torch.testing.assert_close(row, expected[index], rtol=0, atol=1e-5)
