"""Policy checkpoints, and workarounds for faults of Megatron-Core."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.covering import chosen
from tests.distributed import cases
from tests.distributed.layouts import keys, num_ranks
from tests.gang import Gang
from tests.limits import LIMIT_S
from tests.toys import toy_config

TP2_PP2 = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", ["true", "false"], ids=["distributed", "plain"])
def test_resume_continues_bit_for_bit(
    distributed: str, dtype: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    schedule = ["optimizer.lr_warmup_updates=4", "optimizer.lr_decay_style=cosine"]
    overrides = [f"model.dtype={dtype}", f"parallel.distributed_optimizer={distributed}", *schedule]
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), *overrides)
    for continued, resumed in gangs(2).call(
        cases.checkpoint_round_trip, config=config, folder=str(tmp_path / "ck"), save=True
    ):
        assert continued == resumed
        assert len(set(continued)) == 3


# layouts of the save, and layouts under which make test loads it and make test-all as well
DENSE = {
    "tp2 pp2": (["dp1", "pp2 vpp2", "cp2", "tp2 cp2"], ["dp2", "tp2 sp", "pp2", "pp2 vpp2 dp2"]),
    "pp2 vpp2 dp2": (["dp2", "tp2 sp", "pp2", "tp2 cp2"], ["dp1", "pp2 vpp2", "cp2", "pp2 vpp2 dp2"]),
}
EXPERTS = {
    "dp1": (["ep2 dp2", "tp2 sp ep2 dp2", "pp2 vpp2 ep2 dp2"], ["dp1", "tp2 sp etp1", "pp2 ep2 dp2"]),
    "pp2 ep2 dp2": (["dp1", "tp2 sp etp1", "tp2 sp ep2 dp2"], ["ep2 dp2", "pp2 ep2 dp2", "pp2 vpp2 ep2 dp2"]),
}


LAYOUTS = [("qwen2", *item) for item in DENSE.items()] + [("qwen3_moe", *item) for item in EXPERTS.items()]
FEW = [(family, saved, loaded) for family, saved, (often, _) in LAYOUTS for loaded in often]
RARE = [(family, saved, loaded) for family, saved, (_, rarely) in LAYOUTS for loaded in rarely]


Saved = Callable[[Path, str], tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def saved(gangs: Callable[[int], Gang], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a cached function from a model and a layout to a checkpoint and the gradient norms that follow it."""

    @functools.cache
    def save(model: Path, layout: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp("saved")
        config = toy_config(folder, model, *keys(layout))
        options = {"config": config, "folder": str(folder / "ck"), "save": True}
        continued, _ = gangs(num_ranks(layout)).call(cases.checkpoint_round_trip, **options)[0]
        return folder / "ck", continued

    return save


@pytest.mark.parametrize(("family", "saved_at", "layout"), chosen([*FEW, *RARE], FEW))
def test_updates_after_a_load_under_another_layout_equal_those_after_the_save(
    family: str,
    saved_at: str,
    layout: str,
    saved: Saved,
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = toy_model(family, tied=family == "qwen2", num_hidden_layers=4)
    folder, continued = saved(model, saved_at)
    options = {"config": toy_config(tmp_path, model, *keys(layout)), "folder": str(folder), "save": False}
    for _, resumed in gangs(num_ranks(layout)).call(cases.checkpoint_round_trip, **options):
        assert resumed == pytest.approx(continued, rel=1e-5)


def test_a_background_save_equals_a_synchronous_one(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), *TP2_PP2)
    gangs(4).call(cases.save_both_ways, config=config, folder=str(tmp_path / "both"))
    files = {path.name for path in (tmp_path / "both/now").iterdir()}
    assert len(files) > 4
    assert files == {path.name for path in (tmp_path / "both/later").iterdir()}
    written = [FileSystemReader(tmp_path / "both" / way).read_metadata() for way in ("now", "later")]
    assert written[0].state_dict_metadata == written[1].state_dict_metadata
    for name in files - {".metadata"}:  # .metadata contains the name of its folder
        assert (tmp_path / "both/now" / name).read_bytes() == (tmp_path / "both/later" / name).read_bytes(), name


def test_divergence_raises_on_every_rank_before_the_step(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), *TP2_PP2)
    for message, unchanged in gangs(4).call(cases.diverge, config=config):
        assert message.startswith("TrainingDiverged")
        assert unchanged


# removed patch -> text in stderr that shows the fault
UNPATCHED = {
    "create_adam_state": "AssertionError",
    "keep_step_on_load": "KeyError",
    "separate_step_counts": "norms differ",
}

SCRIPT = """
import sys
from pathlib import Path
import megatron_rl.mcore
from megatron_rl.mcore.runtime import patches
{sabotage}
import megatron_rl.mcore.optimizer as optimizer
optimizer.create_adam_state = patches.create_adam_state
from megatron_rl.mcore.runtime.parallel import init_parallel
import tests.distributed.cases as cases
from tests.toys import toy_config
if __name__ == "__main__":
    config = toy_config(Path({folder!r}), Path({model!r}))
    parallel = init_parallel(config.parallel)
    cases.world = lambda _: parallel
    continued, resumed = cases.checkpoint_round_trip(config, {folder!r} + "/ck", save=True)
    sys.exit(0 if continued == resumed else "norms differ")
"""


@pytest.mark.parametrize("fault", [None, *UNPATCHED])
def test_each_patch_is_still_needed(fault: str | None, toy_model: Callable[..., Path], tmp_path: Path) -> None:
    """Without a patch its fault shows. If Megatron-Core fixes the fault, this fails and the patch can be removed."""
    sabotage = f"patches.{fault} = lambda *_: None" if fault else ""
    fault_text = UNPATCHED[fault] if fault else ""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(sabotage=sabotage, folder=str(tmp_path), model=str(toy_model("qwen2", tied=True))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_file", str(script)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode == 0) == (fault is None), done.stderr[-3000:]
    assert fault_text in done.stderr


def test_include_bucket_padding_is_still_needed(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Without this patch, tied embeddings are loaded shifted under pipeline parallelism."""
    config, folder = toy_config(tmp_path, toy_model("qwen2", tied=True), *TP2_PP2), str(tmp_path / "ck")
    for continued, resumed in gangs(4).call(cases.round_trip_without_bucket_padding, config=config, folder=folder):
        assert continued != resumed
    for continued, resumed in gangs(4).call(cases.checkpoint_round_trip, config=config, folder=folder + "2", save=True):
        assert continued == resumed
