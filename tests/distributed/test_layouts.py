"""An update gives the same loss, gradient norm and weights under every layout."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.covering import chosen
from tests.distributed import cases
from tests.distributed.layouts import FIRST_3, OVERLAP, PADDED, keys, layout_cases
from tests.gang import Gang
from tests.toys import sequences, toy_config

PACKING = ("", PADDED)
MICRO_BATCHES = ("", "batching.micro_batch_size=1", "batching.micro_batch_size=3")
OFFLOAD = ("", "memory.offload=[params,grads,optimizer]")
PLAIN_OPTIMIZER = "parallel.distributed_optimizer=false"
DENSE = (
    ("", "tp2", "tp2 sp"),
    ("", "pp2", "pp2 vpp2", f"pp2 {FIRST_3}"),
    ("", "cp2"),
    ("", "dp2"),
    PACKING,
    MICRO_BATCHES,
    ("", "batching.logprob_chunk_tokens=7"),
    ("", PLAIN_OPTIMIZER, OVERLAP),
    ("", "memory.recompute=full", "memory.recompute=selective memory.recompute_modules=[core_attn,layernorm,mlp]"),
    OFFLOAD,
)
LARGE_DENSE = [(8, "tp2 pp2 cp2 sp")]
MORE_DENSE = [
    (4, "cp4"),
    (4, "pp4"),
    (2, "cp2 memory.recompute=selective"),
    (4, "tp2 pp2 sp memory.recompute=full memory.recompute_num_layers=2"),
    (2, f"memory.offload=[optimizer] {PLAIN_OPTIMIZER}"),
]
EXPERTS = (
    ("", "tp2 sp", "tp2 sp etp1"),
    ("", "pp2", "pp2 vpp2"),
    ("", "cp2"),
    ("", "dp2"),
    ("", "ep2", "ep4"),
    PACKING,
    MICRO_BATCHES,
    ("", "memory.recompute=selective memory.recompute_modules=[moe]"),
    OFFLOAD,
)
LARGE_EXPERTS = [(8, "tp2 pp2 sp ep4 etp1")]
RESPONSES = (("", "tp2 sp"), ("", "pp2", "pp2 vpp2"), ("", "cp2"), ("", "dp2"), PACKING, MICRO_BATCHES)


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


@pytest.fixture(scope="module")
def dense(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", tied=True, num_hidden_layers=4)


@pytest.fixture(scope="module")
def experts(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen3_moe", tied=False, num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(
    gangs: Callable[[int], Gang], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, str], cases.Outcome]:
    """Return a cached function from a model and overrides to the outcome on one rank."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def get(model: Path, text: str) -> cases.Outcome:
        (result,) = outcome(gangs, 1, text, model, folder)
        return result

    return get


Alone = Callable[[Path, str], cases.Outcome]


@layout_cases(*DENSE, also=LARGE_DENSE, beyond=MORE_DENSE)
def test_dense_updates_are_equal_under_every_layout(
    world_size: int, layout: str, alone: Alone, gangs: Callable[[int], Gang], dense: Path, tmp_path: Path
) -> None:
    expected = alone(dense, "")
    assert expected.norms[0] > 0.1
    assert_same(outcome(gangs, world_size, layout, dense, tmp_path), expected)


@layout_cases(*EXPERTS, also=LARGE_EXPERTS)
def test_moe_updates_are_equal_under_every_layout(
    world_size: int, layout: str, alone: Alone, gangs: Callable[[int], Gang], experts: Path, tmp_path: Path
) -> None:
    expected = alone(experts, "")
    assert expected.norms[0] > 0.1
    assert_same(outcome(gangs, world_size, layout, experts, tmp_path), expected)


ROUTER_LOSSES = f"moe.aux_loss=sequence moe.aux_loss_coef=0.1 moe.z_loss_coef=0.01 {PADDED}"
ROUTER_LAYOUTS = [(1, MICRO_BATCHES[1]), (2, "dp2"), (2, "ep2"), (2, "pp2"), (4, "ep2 pp2 vpp2")]


@pytest.mark.parametrize(("world_size", "text"), chosen(ROUTER_LAYOUTS, ROUTER_LAYOUTS[-1:]))
def test_router_losses_are_equal_under_every_layout(
    world_size: int, text: str, alone: Alone, gangs: Callable[[int], Gang], experts: Path, tmp_path: Path
) -> None:
    """The load balance within each sequence does not depend on the layout."""
    in_sequence = f"{ROUTER_LOSSES} batching.micro_batch_size=1"
    expected = alone(experts, in_sequence)
    assert len(expected.balance) == 4
    assert expected.norms != pytest.approx(alone(experts, "").norms, rel=1e-4)
    assert_same(outcome(gangs, world_size, f"{in_sequence} {text}", experts, tmp_path), expected)


# log of the ratio trainer / engine of every token of a response, by index: among them weights above and below 1, one
# that is truncated, a response whose mean ratio is too high and one whose mean ratio is too low
LOG_RATIOS = (0.05, 0.01, -0.2, -0.02, 0.4, 0.004, -0.6, 0.0)
VETOED = 5  # because of a single token
CORRECTION = (
    "algorithm.rollout_is=sequence_truncate algorithm.rollout_is_high=1.2 algorithm.rollout_veto=0.001 "
    "algorithm.rollout_rejection=geometric algorithm.rollout_rejection_low=0.7 algorithm.rollout_rejection_high=1.3"
)
GSPO = "algorithm.loss=gspo algorithm.clip_ratio_low=0.6 algorithm.clip_ratio_high=2.0"


@layout_cases(*RESPONSES, beyond=[(4, "cp4 batching.micro_batch_size=2")])
def test_response_level_corrections_and_ratios_are_equal_under_every_layout(
    world_size: int, layout: str, alone: Alone, gangs: Callable[[int], Gang], dense: Path, tmp_path: Path
) -> None:
    """The weight, the rejection and the GSPO ratio of a response depend on all its tokens, whichever rank has them."""
    uncorrected = alone(dense, "")
    engine_logprobs = {index: row - LOG_RATIOS[index] for index, row in uncorrected.logprobs.items()}
    engine_logprobs[VETOED][12] += 8.0
    (expected,) = outcome(gangs, 1, CORRECTION, dense, tmp_path, engine_logprobs)
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
    assert_same(outcome(gangs, world_size, f"{CORRECTION} {layout}", dense, tmp_path, engine_logprobs), expected)
    expected = alone(dense, GSPO)
    assert expected.norms[0] > 0.1
    assert expected.norms != pytest.approx(uncorrected.norms, rel=1e-2)
    assert_same(outcome(gangs, world_size, f"{GSPO} {layout}", dense, tmp_path), expected)


WHITENED = [(1, ""), (2, "dp2"), (4, "dp4"), (2, "tp2"), (2, "pp2"), (2, "cp2"), (4, "tp2 dp2"), (4, "pp2 cp2")]


@pytest.mark.parametrize(("world_size", "text"), chosen(WHITENED, [(1, ""), (4, "dp4"), *WHITENED[-2:]]))
def test_returns_are_whitened_over_all_ranks(
    world_size: int, text: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
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
    overrides = keys("algorithm.advantage=reinforce algorithm.kl_reward_coef=0.1 algorithm.whiten_advantages=true")
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), "batching.num_mini_batches=1", *overrides, *keys(text))
    actual: dict[int, torch.Tensor] = {}
    for rows, metrics in gangs(world_size).call(cases.advantages_by_index, config=config, rewards=rewards):
        actual |= rows
        assert metrics["critic/kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
        assert metrics["critic/kl_coef"] == 0.1
        assert metrics["critic/advantages/mean"] == pytest.approx(0, abs=1e-6)
    for index, row in enumerate(returns):
        expected = (row - all_returns.mean()) / all_returns.std()
        torch.testing.assert_close(actual[index].double(), expected, rtol=0, atol=1e-6)


REPLAYED = [(1, PADDED), (2, "ep2"), (2, "tp2 sp"), (2, "cp2"), (4, "pp2 vpp2 ep2"), (4, "tp2 cp2 sp")]


@pytest.mark.parametrize(("world_size", "text"), chosen(REPLAYED, [(1, PADDED), *REPLAYED[-2:]]))
def test_replayed_routing_is_equal_under_every_layout(
    world_size: int, text: str, gangs: Callable[[int], Gang], experts: Path, tmp_path: Path
) -> None:
    def replay(world_size: int, text: str) -> dict[int, torch.Tensor]:
        config = toy_config(tmp_path, experts, "batching.num_mini_batches=1", *keys(text))
        logprobs: dict[int, torch.Tensor] = {}
        for rows, distance in gangs(world_size).call(cases.replay_routing, config=config):
            logprobs |= rows
            assert distance > 1e-3
        return logprobs

    expected, actual = replay(1, ""), replay(world_size, text)
    assert set(actual) == set(expected)
    for index, row in actual.items():
        torch.testing.assert_close(row, expected[index], rtol=0, atol=1e-5)
