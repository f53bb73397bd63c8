"""The engine beside a Megatron policy in the same processes: both compute the same log-probabilities after pushes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config

TP2, PP2, EP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
VPP2 = "parallel.virtual_pipeline_parallel_size=2"
LAYOUTS: dict[str, tuple[str, bool, list[str]]] = {
    "tp2-pp2": ("qwen2", True, [TP2, PP2]),
    "tp2-dp2": ("qwen2", True, [TP2]),
    "pp2-vpp2": ("qwen2", True, [PP2, VPP2]),
    "tp2-pp2-untied": ("qwen3", False, [TP2, PP2]),
    "tp2-dp2-whole": ("qwen3", False, [TP2, "weight_sync.full_tensors=true"]),
    "ep2": ("qwen3_moe", False, [EP2]),
}


def test_an_engine_that_dies_in_a_job_or_a_push_is_restarted(
    engine_name: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(
        tmp_path,
        toy_model("qwen2", hidden_size=128, head_dim=32),
        "parallel.tensor_parallel_size=2",
        f"rollout.engine={engine_name}",
        "memory.offload=[params,grads,optimizer]",
        "rollout.max_num_sequences=4",
        "rollout.max_new_tokens=12",
    )
    for undisturbed, disturbed, num_failures in gangs(2).call(cases.collect_despite_engine_deaths, config=config):
        assert len(undisturbed) == 24
        assert disturbed == undisturbed
        assert num_failures == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_engine_log_probs_equal_the_policys(
    name: str,
    engine_tp: int,
    engine_name: str,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    family, tied, overrides = LAYOUTS[name]
    # sizes that the engines' CPU kernels support, also for half an expert
    experts = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    model = toy_model(family, tied=tied, num_hidden_layers=8, hidden_size=128, head_dim=32, **experts)
    config = toy_config(
        tmp_path,
        model,
        *overrides,
        f"rollout.engine={engine_name}",
        f"rollout.tensor_parallel_size={engine_tp}",
        "data.max_prompt_tokens=16",
        "rollout.temperature=0.8",
        "weight_sync.bucket_mb=1",
        "weight_sync.verify_every=1",
    )
    for results in gangs(4).call(cases.engine_and_policy_logprobs, config=config, num_updates=2):
        assert len(results) == 3 * 12
        for completion, own in results:
            torch.testing.assert_close(completion.logprobs, own, rtol=0, atol=1e-5)
