"""Plans of weight transfers: complete, minimal, and with little traffic between nodes."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import ConfigError, WeightSyncError
from megatron_rl.models import ModelSpec, layout_table, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size, engine_boxes
from megatron_rl.weight_sync.placement import parameters_by_rank
from megatron_rl.weight_sync.plan import ReshardPlan, plan_reshard
from megatron_rl.weights.layout import Box, box_size, hf_shapes, layer_of
from tests.unit.test_families import PUBLISHED

Layout = Mapping[str, int]


def engine_targets(spec: ModelSpec, num_ranks: int, engine_tp: int) -> list[dict[str, Box]]:
    shapes = hf_shapes(layout_table(spec, 1))
    return [engine_boxes(spec, shapes, tp_rank=rank % engine_tp, tp_size=engine_tp) for rank in range(num_ranks)]


def plan_of(
    spec: ModelSpec, layout: Layout, engine_tp: int, ranks_per_node: int = 8, bucket_elements: int = 10**6
) -> ReshardPlan:
    held = parameters_by_rank(spec, **layout)
    nodes = [rank // ranks_per_node for rank in range(len(held))]
    targets = engine_targets(spec, len(held), engine_tp)
    table = layout_table(spec, layout.get("tp", 1))
    return plan_reshard(held, table, targets, nodes, bucket_elements=bucket_elements)


LAYOUTS: list[Layout] = [
    {},
    {"dp": 4},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2},
    {"pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "dp": 2},
]
MOE_LAYOUTS: list[Layout] = [{"dp": 2, "ep": 2}, {"dp": 4, "ep": 2}, {"pp": 2, "dp": 2, "ep": 2}]


@pytest.mark.parametrize("ranks_per_node", [1, 2, 8])
@pytest.mark.parametrize("engine_tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "layout"),
    [*itertools.product(["qwen2", "llama"], LAYOUTS), *itertools.product(["qwen3_moe", "mixtral"], MOE_LAYOUTS)],
    ids=str,
)
def test_every_target_element_arrives_once(
    family: str, layout: Layout, engine_tp: int, ranks_per_node: int, toy_model: Callable[..., Path]
) -> None:
    """Replay the moves: a rank sends only elements that it holds or has received in an earlier group of moves."""
    spec = read_model_spec(toy_model(family, tied=family == "qwen2"))
    plan = plan_of(spec, layout, engine_tp, ranks_per_node)
    shapes = plan.shapes
    copies: list[dict[str, torch.Tensor]] = []
    for pieces in plan.pieces:
        copies_of_rank = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        for name, parts in pieces.items():
            for piece in parts:
                copies_of_rank[name][tuple(slice(*pair) for pair in piece.slice.hf_box)] = 1
        copies.append(copies_of_rank)
    for bucket in plan.buckets:
        for moves in (bucket.inter_node, bucket.intra_node):
            arrived = []
            for move in moves:
                index = tuple(slice(*pair) for pair in move.box)
                assert move.name in bucket.names
                assert copies[move.source][move.name][index].min() > 0
                assert copies[move.target][move.name][index].max() == 0
                is_intra_node = move.source // ranks_per_node == move.target // ranks_per_node
                assert is_intra_node == (moves is bucket.intra_node)
                arrived.append((move, index))
            for move, index in arrived:
                copies[move.target][move.name][index] += 1
    for rank, boxes in enumerate(plan.target_boxes):
        for name, box in boxes.items():
            assert (copies[rank][name][tuple(slice(*pair) for pair in box)] == 1).all()
        assert plan.num_received(rank) == plan.minimum(rank)


def test_buckets_are_whole_layers_of_all_stages(toy_model: Callable[..., Path]) -> None:
    spec = read_model_spec(toy_model("qwen2", num_hidden_layers=4))
    small = plan_of(spec, {"pp": 2}, 1, bucket_elements=1)
    layers = [sorted({layer_of(name) for name in bucket.names if "layers" in name}) for bucket in small.buckets]
    assert [bucket_layers for bucket_layers in layers if bucket_layers] == [
        ["model.layers.0", "model.layers.2"],
        ["model.layers.1", "model.layers.3"],
    ]
    assert sorted(name for bucket in small.buckets for name in bucket.names) == sorted(small.shapes)
    assert len(plan_of(spec, {"pp": 2}, 1).buckets) == 1


def test_a_parameter_that_no_rank_holds_is_reported(toy_model: Callable[..., Path]) -> None:
    spec = read_model_spec(toy_model("qwen2"))
    held = [
        ([name for name in names if "layers.1.mlp" not in name], place)
        for names, place in parameters_by_rank(spec, tp=2)
    ]
    with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight: rank 0 reads"):
        plan_reshard(held, layout_table(spec, 2), engine_targets(spec, 2, 1), [0, 0], bucket_elements=10**6)


def test_invalid_engine_sizes_are_rejected(toy_model: Callable[..., Path]) -> None:
    spec = read_model_spec(toy_model("qwen2"))  # 4 attention heads, 2 key-value heads
    for size in (1, 2, 4):
        check_engine_size(spec, size)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3: the model has 4 attention heads"):
        check_engine_size(spec, 3)


def test_70b_over_eight_nodes_moves_only_missing_elements(tmp_path: Path) -> None:
    """From TP8 x PP8 to one TP8 engine per node: a rank receives once each element that it reads and does not hold."""
    config, parameters = PUBLISHED["DeepSeek-R1-Distill-Llama-70B"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model_spec(tmp_path)
    plan = plan_of(spec, {"tp": 8, "pp": 8}, 8, bucket_elements=2 * 10**8)
    norms = sum(box_size(((0, n),)) for n in (8192,) * (2 * 80 + 1))
    share = (parameters - norms) // 8 + norms
    for rank in range(64):
        held = sum(box_size(piece.slice.hf_box) for pieces in plan.pieces[rank].values() for piece in pieces)
        # Megatron and the engines split the vocabulary alike, so a rank reads no shards of other tensor parallel ranks
        assert plan.num_received(rank) == plan.minimum(rank) == share - held
    # a norm, which all 8 ranks of a node read, is sent to one of them
    assert plan.num_inter_node() == sum(plan.num_received(rank) for rank in range(64)) - 7 * 7 * norms
