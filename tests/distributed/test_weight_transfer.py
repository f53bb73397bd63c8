"""The planned transfer on real ranks: received tensors, transferred bytes, and faults that a push reports."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.models import read_model_spec
from megatron_rl.models.engine_shards import engine_boxes
from megatron_rl.weight_sync.host_memory import PeerAccess, expose_host_memory, no_peer_access
from megatron_rl.weight_sync.placement import parameters_by_rank
from megatron_rl.weight_sync.shared_folder import expose_in_folder
from megatron_rl.weights.layout import box_index
from tests.covering import matrix
from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config

TP2, PP2, EP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
VPP2 = "parallel.virtual_pipeline_parallel_size=2"
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "dp4": ("qwen2", []),
    "tp2-dp2": ("qwen2", [TP2]),
    "tp2-pp2": ("qwen2", [TP2, PP2]),
    "tp2-pp2-untied": ("llama", [TP2, PP2]),
    "pp2-vpp2": ("qwen3", [PP2, VPP2]),
    "ep2": ("qwen3_moe", [EP2]),
    "ep2-pp2": ("mixtral", [EP2, PP2]),
}
NODES = {"one node": [0, 0, 0, 0], "two nodes": [0, 0, 1, 1]}


@matrix(
    name=[*LAYOUTS],
    engine_tp=[1, 2, 4],
    nodes=[*NODES],
    way=["memory", "messages", "disk"],
    bucket_elements=[1, 10**6],
)
def test_every_rank_receives_what_its_engine_reads(
    name: str,
    engine_tp: int,
    nodes: str,
    way: str,
    bucket_elements: int,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Every element arrives bit for bit, no byte is received that the rank already has, and the rest is NaN."""
    family, overrides = LAYOUTS[name]
    ways: dict[str, PeerAccess] = {"memory": expose_host_memory, "messages": no_peer_access}
    peer_access = ways.get(way, partial(expose_in_folder, tmp_path, "a run"))
    model = toy_model(family, tied=family == "qwen2", num_hidden_layers=4)
    weights, spec = load_file(model / "model.safetensors"), read_model_spec(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    arguments = {
        "engine_tp": engine_tp,
        "nodes": NODES[nodes],
        "bucket_elements": bucket_elements,
        "peer_access": peer_access,
    }
    transfers = gangs(4).call(cases.run_transfer, config=toy_config(tmp_path, model, *overrides), **arguments)
    for rank, (tensors, traffic) in enumerate(transfers):
        assert set(tensors) == set(weights)
        boxes = engine_boxes(spec, shapes, tp_rank=rank % engine_tp, tp_size=engine_tp)
        for key, tensor in tensors.items():
            expected = torch.full_like(tensor, float("nan"))
            expected[box_index(boxes[key])] = weights[key][box_index(boxes[key])]
            assert torch.equal(tensor.nan_to_num(7e7), expected.nan_to_num(7e7)), key
        assert traffic["received"] == traffic["planned"] == traffic["least"]
        assert traffic["sent"] == traffic["planned to send"]
    assert sum(traffic["received"] for _, traffic in transfers) == sum(traffic["sent"] for _, traffic in transfers)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("dp4", {"dp": 4}), ("tp2-pp2", {"tp": 2, "pp": 2}), ("ep2-pp2", {"pp": 2, "dp": 2, "ep": 2})],
)
def test_computed_placement_equals_that_of_megatron(
    name: str, sizes: dict[str, int], gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, overrides = LAYOUTS[name]
    model = toy_model(family, tied=family == "qwen2", num_hidden_layers=4)
    held = gangs(4).call(cases.rank_parameters, config=toy_config(tmp_path, model, *overrides))
    for (names, place), (computed_names, computed_place) in zip(
        held, parameters_by_rank(read_model_spec(model), **sizes), strict=True
    ):
        assert set(names) == set(computed_names)
        assert (place.tp_rank, place.tp_size) == (computed_place.tp_rank, computed_place.tp_size)


@pytest.mark.parametrize("transport", ["direct", "disk"])
@pytest.mark.parametrize("name", ["tp2-pp2", "ep2"])
def test_pushes_are_verified_probed_and_reported(
    name: str, transport: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    family, overrides = LAYOUTS[name]
    overrides = [*overrides, "weight_sync.verify_every=1", f"weight_sync.transport={transport}"]
    config = toy_config(tmp_path, toy_model(family, tied=False), *overrides)
    for pushes in gangs(4).call(cases.push_twice, config=config):
        for metrics in pushes:
            assert metrics["weight_sync/received_mb"] == metrics["weight_sync/minimum_mb"] > 0
            assert 0 <= metrics["weight_sync/probe_difference"] < 1e-5
            assert metrics["weight_sync/gb_per_s"] > 0


def test_an_unwritable_folder_is_reported_by_every_rank(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    overrides = [TP2, "weight_sync.transport=disk", f"weight_sync.folder={tmp_path / 'file'}"]
    config = toy_config(tmp_path, toy_model("llama", tied=False), *overrides)
    for message in gangs(4).call(cases.failed_push, config=config):
        assert re.search(r"rank 0: .*exists.*weight_sync\.folder must be a folder with enough free space", message)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("changed on the way", r"2 tensors that the engine received differ from the policy's, first lm_head"),
        ("lost by the engine", r"the log-probabilities of 8 sampled tokens differ by .* nats"),
        ("refused by the engine", r"no room"),
        ("stale version", r"the engine reports version 0 after version 1 was pushed"),
    ],
)
def test_push_faults_are_reported_by_every_rank(
    fault: str, message: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(tmp_path, toy_model("qwen2", tied=False), TP2, "weight_sync.verify_every=1")
    for error in gangs(2).call(cases.faulty_push, config=config, fault=fault):
        assert error is not None
        assert re.search(message, error), error


def test_the_first_push_is_verified_whatever_the_interval(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    never = ("weight_sync.verify_every=0", "weight_sync.probe_tokens=0")
    config = toy_config(tmp_path, toy_model("qwen2", tied=False), TP2, *never)
    for is_first, is_detected in ((True, True), (False, False)):
        errors = gangs(2).call(cases.faulty_push, config=config, fault="changed on the way", is_first=is_first)
        assert [error is not None for error in errors] == [is_detected] * 2
