"""Layouts of many nodes, rank by rank in one process: real Megatron models, meta tensors, fake process groups."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rl.config import load_config
from megatron_rl.mcore.model.config import transformer_config
from megatron_rl.mcore.model.gpt_model import build_chunks, global_parameters, place_of
from megatron_rl.mcore.runtime.parallel import build_layout, leave_world
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.engine_shards import engine_boxes
from megatron_rl.planning.shares import stage_shares
from megatron_rl.weight_sync.plan import plan_reshard
from megatron_rl.weights.layout import Box, Place, box_size, hf_shapes, intersection

ROOT = Path(__file__).parents[2]
CASES = {
    "70b, TP8 x PP8": ("grpo-llama3.1-70b-8n8g-h100-fp8", 64, 8, ["parallel.pipeline_parallel_size=8"]),
    "70b, TP8 x PP4 x DP2": ("grpo-llama3.1-70b-8n8g-h100-fp8", 64, 8, []),
    "70b, TP4 x PP8 in two chunks x DP2": (
        "grpo-llama3.1-70b-8n8g-h100-fp8",
        64,
        4,
        [
            "parallel.tensor_parallel_size=4",
            "parallel.pipeline_parallel_size=8",
            "parallel.virtual_pipeline_parallel_size=2",
        ],
    ),
    "32b, TP4 x PP4": ("grpo-qwen2.5-32b-2n8g-h100-fp8", 16, 4, []),
    "30b of experts, TP2 x PP2 x DP4, EP8": ("grpo-qwen3-30b-a3b-2n8g-h100-bf16", 16, 4, []),
}


@pytest.fixture
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace every new process group by a fake one, which does not communicate."""
    original = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **others: Any) -> Any:
        return original(ranks, timeout, backend="fake", **others)

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    yield
    leave_world()


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_held_once_and_every_engine_receives_its_shard(case: str, fake_groups: None) -> None:
    recipe, world_size, engine_tp, overrides = CASES[case]
    path = ROOT / f"configs/recipes/production/{recipe}.yaml"
    folder = ROOT / "configs/model_shapes" / Path(load_config(path).model.path).name
    config = load_config(path, [f"model.path={folder}", "precision.fp8=disabled", *overrides])
    spec, parallel = read_model_spec(folder), config.parallel
    table = layout_table(spec, parallel.tensor_parallel_size)
    shares = stage_shares(spec, parallel)
    held: list[tuple[list[str], Place]] = []
    replicas: dict[int, list[int]] = defaultdict(list)
    for rank in range(world_size):
        names, place, stage, replica, num_elements = build_rank(config, spec, rank, world_size, table)
        assert num_elements == shares[stage].total, "the plan counts the same elements"
        held.append((names, place))
        replicas[replica].append(rank)

    shapes = hf_shapes(table)
    for ranks in replicas.values():
        check_each_element_once([held[rank] for rank in ranks], table, shapes)

    boxes = [engine_boxes(spec, shapes, tp_rank=rank, tp_size=engine_tp) for rank in range(engine_tp)]
    engine_reads = [boxes[rank % engine_tp] for rank in range(world_size)]
    plan = plan_reshard(held, table, engine_reads, [rank // 8 for rank in range(world_size)], bucket_elements=2 * 10**8)
    assert sorted(name for bucket in plan.buckets for name in bucket.names) == sorted(shapes)
    for rank in range(world_size):
        assert plan.num_received(rank) == plan.minimum(rank)


def build_rank(
    config: Any, spec: Any, rank: int, world_size: int, table: Any
) -> tuple[list[str], Place, int, int, int]:
    """Return the parameter names, place, pipeline stage, replica and number of elements of a rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        context = build_layout(config.parallel, FakeStore(), rank % 8, torch.device("meta"))
        context = replace(context, device=torch.device("meta"))
        with torch.device("meta"):
            chunks = build_chunks(spec, transformer_config(spec, config, "local"), "local", context)
        parameters = global_parameters(chunks, context)
        place = place_of(context)
        for name, parameter in parameters.items():
            assert parameter.is_meta
            assert tuple(parameter.shape) == place.shape(table[name]), name
        # the ranks of an expert group share the experts of one copy of the model
        replica = context.dp_rank // context.ep_size if spec.moe is not None else context.dp_rank
        num_elements = sum(parameter.numel() for parameter in parameters.values())
        return list(parameters), place, context.pp_rank, replica, num_elements
    finally:
        leave_world()


def check_each_element_once(
    held: list[tuple[list[str], Place]], table: Any, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Assert that the ranks of a replica together hold every element, and that parts of a tensor do not overlap."""
    boxes: dict[str, set[Box]] = defaultdict(set)
    for names, place in held:
        for name in names:
            for piece in place.slices(table[name]):
                boxes[piece.hf_name].add(piece.hf_box)
    assert boxes.keys() == shapes.keys()
    for name, shape in shapes.items():
        parts = sorted(boxes[name])
        assert sum(map(box_size, parts)) == box_size(tuple((0, extent) for extent in shape)), name
        assert all(intersection(a, b) is None for a, b in pairwise(parts)), name
