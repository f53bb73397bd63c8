"""Policy checkpoints, and the faults of Megatron-Core that are worked around."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config

TP2_PP2 = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", ["true", "false"], ids=["distributed", "plain"])
def test_continues_bit_for_bit(
    distributed: str, dtype: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = [f"model.dtype={dtype}", f"parallel.distributed_optimizer={distributed}"]
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), *overrides)
    for going_on, resumed in gangs(2).call(
        cases.checkpoint_round_trip, config=config, folder=str(tmp_path / "ck"), save=True
    ):
        assert going_on == resumed
        assert len(set(going_on)) == 3


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, []), (2, []), (2, TP2_PP2[:1]), (2, TP2_PP2[1:])],
    ids=["tp1", "dp2", "tp2", "pp2"],
)
def test_loads_under_another_layout(
    world_size: int, overrides: list[str], gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, folder = toy_model("qwen2", tied=True, vocab_size=64), str(tmp_path / "ck")
    saved = gangs(4).call(
        cases.checkpoint_round_trip, config=toy_config(tmp_path, model, *TP2_PP2), folder=folder, save=True
    )
    config = toy_config(tmp_path, model, *overrides)
    for _, resumed in gangs(world_size).call(cases.checkpoint_round_trip, config=config, folder=folder, save=False):
        assert resumed == pytest.approx(saved[0][0], rel=1e-5)


def test_divergence_raises_on_every_rank_before_the_step(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(tmp_path, toy_model("qwen2", tied=True), *TP2_PP2)
    for message, unchanged in gangs(4).call(cases.diverge, config=config):
        assert message.startswith("TrainingDiverged")
        assert unchanged


# what is taken away -> the sign of its fault
UNPATCHED = {
    "create_adam_state": "AssertionError",
    "keep_step_on_load": "KeyError",
    "separate_step_counts": "norms differ",
}

SCRIPT = """
import sys
from pathlib import Path
import megatron_rl.mcore
from megatron_rl.mcore import patches
{sabotage}
import megatron_rl.mcore.optimizer as optimizer
optimizer.create_adam_state = patches.create_adam_state
from megatron_rl.mcore.parallel import init_parallel
import tests.distributed.cases as cases
from tests.toys import toy_config
if __name__ == "__main__":
    config = toy_config(Path({folder!r}), Path({model!r}))
    parallel = init_parallel(config.parallel)
    cases.world = lambda _: parallel
    going_on, resumed = cases.checkpoint_round_trip(config, {folder!r} + "/ck", save=True)
    sys.exit(0 if going_on == resumed else "norms differ")
"""


@pytest.mark.parametrize("fault", [None, *UNPATCHED])
def test_each_patch_is_still_needed(fault: str | None, toy_model: Callable[..., Path], tmp_path: Path) -> None:
    """Without a patch its fault shows; once Megatron-Core mends it, this fails and the patch can go."""
    sabotage = f"patches.{fault} = lambda *_: None" if fault else ""
    sign = UNPATCHED[fault] if fault else ""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(sabotage=sabotage, folder=str(tmp_path), model=str(toy_model("qwen2", tied=True))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_file", str(script)], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode == 0) == (fault is None), done.stderr[-3000:]
    assert sign in done.stderr


def test_counting_gaps_is_still_needed(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Without it, tied embeddings under pipeline parallelism come back shifted."""
    config, folder = toy_config(tmp_path, toy_model("qwen2", tied=True), *TP2_PP2), str(tmp_path / "ck")
    for going_on, resumed in gangs(4).call(cases.round_trip_without_counting_gaps, config=config, folder=folder):
        assert going_on != resumed
    for going_on, resumed in gangs(4).call(cases.checkpoint_round_trip, config=config, folder=folder + "2", save=True):
        assert going_on == resumed
