"""Published losses and advantages of the algorithms, to 1e-6, under every layout and batching of the responses."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import RunConfig
from tests.covering import matrix
from tests.distributed import goldens
from tests.distributed.layouts import keys, num_ranks
from tests.gang import Gang
from tests.toys import toy_config

SEQUENCES, TOKENS, LENGTH = (
    f"algorithm.aggregation={name}" for name in ("sequence_mean", "token_mean", "constant_length")
)
KL = "algorithm.kl_coef=0.04"
PLAIN = "algorithm.normalize_by_std=false"
GSPO = "algorithm.loss=gspo algorithm.clip_ratio_low=3e-4 algorithm.clip_ratio_high=4e-4"
GOLDENS = {
    f"{SEQUENCES}": 0.0613807,
    f"{SEQUENCES} {KL}": 0.0627729,
    f"{TOKENS}": -0.3379713,
    f"{TOKENS} {KL}": -0.3365594,
    f"{LENGTH}": -0.1056160,
    f"{LENGTH} {PLAIN}": -0.0580994,
    f"{TOKENS} algorithm.clip_ratio_high=0.28": -0.3467273,
    f"{SEQUENCES} {GSPO}": 0.0938577,
}
GAE = "algorithm.advantage=gae"
ESTIMATES = {
    GAE: [0.9, 0.8, 0.7, 0.6],
    f"{GAE} algorithm.gae_lambda=0.95": [0.799675, 0.7365, 0.67, 0.6],
    f"{GAE} algorithm.whiten_advantages=true": [1.161895, 0.387298, -0.387298, -1.161895],
    f"{GAE} algorithm.kl_reward_coef=0.1": [0.875, 0.785, 0.68, 0.58],
    "algorithm.advantage=bi_level_gae algorithm.turn_gamma=0.95": [
        *(1.85, 1.75, 1.65, 1.55, 1.45),
        *(0.4, 0.3, 0.2, 0.1, 0),
    ],
    "algorithm.advantage=turn_gae algorithm.turn_gamma=0.95": [1.85] * 5 + [0.4] * 5,
}
SPLITS = {
    "layout": ["dp1", "dp2", "dp4", "tp2", "pp2", "cp2", "tp2 cp2", "dp2 cp2"],
    "micro_batch_size": [1, 2, 4],
    "packed": [True, False],
}
COMMON = "batching.num_mini_batches=1 algorithm.kl_coef=0 algorithm.entropy_coef=0 algorithm.constant_length=8"


@pytest.fixture(scope="module")
def parsed(toy_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunConfig]:
    """Return a cached function from overrides to a configuration, as parsing takes longer than computing a golden."""
    folder, model = tmp_path_factory.mktemp("goldens"), toy_model("qwen2", tied=True)
    return functools.cache(lambda text: toy_config(folder, model, *keys(f"{COMMON} {text}")))


def configs(
    parsed: Callable[[str], RunConfig], layout: str, micro_batch_size: int, packed: bool, goldens: Iterable[str]
) -> list[RunConfig]:
    """Return the configuration of each golden under a layout and a batching."""
    split = f"batching.micro_batch_size={micro_batch_size} batching.packed={packed}"
    parallel, batching = parsed(layout).parallel, parsed(split).batching
    return [replace(parsed(golden), parallel=parallel, batching=batching) for golden in goldens]


@matrix(**SPLITS)
def test_losses_equal_the_published_ones(
    layout: str,
    micro_batch_size: int,
    packed: bool,
    gangs: Callable[[int], Gang],
    parsed: Callable[[str], RunConfig],
) -> None:
    own = configs(parsed, layout, micro_batch_size, packed, GOLDENS)
    for actual in gangs(num_ranks(layout)).call(goldens.losses, configs=own):
        assert dict(zip(GOLDENS, actual, strict=True)) == pytest.approx(GOLDENS, abs=1e-6)


@matrix(**SPLITS)
def test_advantages_equal_the_published_ones(
    layout: str,
    micro_batch_size: int,
    packed: bool,
    gangs: Callable[[int], Gang],
    parsed: Callable[[str], RunConfig],
) -> None:
    own = configs(parsed, layout, micro_batch_size, packed, ESTIMATES)
    for actual in gangs(num_ranks(layout)).call(goldens.estimates, configs=own):
        for golden, row in zip(ESTIMATES.values(), actual, strict=True):
            assert row == pytest.approx(golden, abs=1e-6)
