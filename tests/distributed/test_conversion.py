"""Converted checkpoints in Megatron-Core, and conversion of checkpoints that Megatron-LM and training write."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_rl.mcore  # noqa: F401  prepares Megatron-Core for mbridge
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.mcore.model.names import FUSED_NORMS
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.toy import FAMILIES
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.layout import fill_shard
from tests.covering import matrix
from tests.distributed import cases
from tests.distributed.test_model import MOE, reference_logits
from tests.gang import Gang
from tests.toys import toy_config

ALONE = Ranks(rank=0, size=1)
TP2 = "parallel.tensor_parallel_size=2"
PP2 = "parallel.pipeline_parallel_size=2"
EP2 = "parallel.expert_parallel_size=2"
SP = "parallel.sequence_parallel=true"
LAYOUTS: dict[str, list[str]] = {"tp1": [], "tp2": [TP2, SP], "pp2": [PP2], "tp2-pp2": [TP2, PP2, SP]}
MOE_LAYOUTS: dict[str, list[str]] = {**LAYOUTS, "ep2": [EP2], "pp2-ep2": [PP2, EP2]}


def ranks_of(overrides: list[str]) -> int:
    return 2 ** sum(name in overrides for name in (TP2, PP2)) * (2 if EP2 in overrides else 1)


def to_megatron(source: Path, target: Path) -> Path:
    convert_to_megatron(source, target, dtype=None, workers=2, ranks=ALONE)
    return target


def to_hf(source: Path, target: Path, like: Path) -> dict[str, torch.Tensor]:
    convert_to_hf(
        source, target, like=like, dtype=None, max_shard_bytes=10**9, workers=2, ranks=ALONE, unit_bytes=20_000
    )
    return load_file(target / "model.safetensors")


def assert_same(actual: dict[str, torch.Tensor], model: Path) -> None:
    expected = load_file(model / "model.safetensors")
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def is_valid(row: Mapping[str, Any]) -> bool:
    """Only experts are distributed by expert parallelism."""
    return row["family"] in MOE or "ep2" not in row["layout"]


@matrix(is_valid, family=[*FAMILIES], tied=[True, False], layout=[*MOE_LAYOUTS], loaded_by=["this", "Megatron"])
def test_a_converted_checkpoint_loads_under_every_layout(
    family: str,
    tied: bool,
    layout: str,
    loaded_by: str,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """By Megatron's own loader and as ``model.path``; the logits equal those of transformers."""
    model = toy_model(family, tied=tied)
    converted = to_megatron(model, tmp_path / "megatron")
    expected, overrides = reference_logits(model), MOE_LAYOUTS[layout]
    checkpoint = str(converted / "release") if loaded_by == "Megatron" else None
    config = toy_config(tmp_path, converted, *overrides)
    actual = gangs(ranks_of(overrides)).call(cases.logits, config=config, checkpoint=checkpoint)
    last_stage = [logits for logits in actual if logits is not None]
    assert last_stage
    for logits in last_stage:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@matrix(
    is_valid,
    family=["qwen2", "llama", "qwen3_moe"],
    layout=["tp1", "tp2-pp2", "pp2-ep2"],
    option=["", "non_homogeneous_layers", "singleton_local_shards"],
)
def test_converts_checkpoints_of_megatron_lm(
    family: str,
    layout: str,
    option: str,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Stacked layers, separate layers, and separate experts and gates; saved under several layouts."""
    model, overrides = toy_model(family, tied=family == "qwen2"), MOE_LAYOUTS[layout]
    metadata = {option: True} if option else {}
    config = toy_config(tmp_path, model, *overrides)
    gangs(ranks_of(overrides)).call(cases.save_as_megatron_lm, config=config, folder=str(tmp_path / "lm"), **metadata)
    assert_same(to_hf(tmp_path / "lm", tmp_path / "hf", like=model), model)


@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2", "ep2"])
def test_converts_checkpoints_of_training(
    layout: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The checkpoint holds weights and optimizer states after an update."""
    model = toy_model("qwen3_moe", tied=False)
    config = toy_config(tmp_path, model, *MOE_LAYOUTS[layout])
    folder = str(tmp_path / "trained")
    (expected, *_) = gangs(ranks_of(MOE_LAYOUTS[layout])).call(cases.train_and_save, config=config, folder=folder)
    actual = to_hf(tmp_path / "trained", tmp_path / "hf", like=model)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    before = load_file(model / "model.safetensors")
    assert all(not torch.equal(actual[name], before[name]) for name in ("lm_head.weight", "model.norm.weight"))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_shards_equal_those_of_mbridge(family: str, tp_size: int, toy_model: Callable[..., Path]) -> None:
    from mbridge import AutoBridge
    from mbridge.core.parallel_states import ParallelStates

    model = toy_model(family, tied=False)
    bridge = AutoBridge.from_pretrained(
        str(model), parallel_states=ParallelStates(tp_size=tp_size), make_vocab_size_divisible_by=64
    )
    bridge.dtype = torch.float32  # it would silently cast to bf16 otherwise
    spec = read_model_spec(model)
    bridge.vocab_size, bridge.padded_vocab_size = spec.vocab_size, 64
    reader, fused = HFReader(model), {plain: name for name, plain in FUSED_NORMS.items()}
    for name, layout in layout_table(spec, tp_size).items():
        local_name = ".".join(name.split(".")[3:])
        mbridge_name = name.replace(local_name, fused[local_name]) if local_name in fused else name
        tensors = [reader.read(hf, (slice(None),)) for hf in bridge._weight_name_mapping_mcore_to_hf(mbridge_name)]
        full = bridge._weight_to_mcore_format(mbridge_name, tensors)
        shape = torch.empty(layout.shape(tp_size), device="meta")
        shards = bridge._weight_split_across_tp(mbridge_name, full, shape, tp_size)
        for rank, expected in enumerate(shards):
            actual = torch.zeros(layout.shape(tp_size))
            fill_shard(actual, layout.slices(rank, tp_size), reader.read)
            assert torch.equal(actual, expected), (name, rank)
