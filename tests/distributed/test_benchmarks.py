"""Benchmarks during a run, answered by the training engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.answers import read_answers
from megatron_rl.evaluation.compare import read_all_finished
from megatron_rl.trainer.inputs import load_inputs
from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config, write_choice_task
from tools.analysis import compare_evals

ROOT = Path(__file__).parents[2]
SUITE = """
run: {{name: benchmarks, output_dir: {folder}/suite}}
model: {{path: none}}
tasks: [{tasks}/hasty_addition.yaml, choice.yaml]
limit: 12
sampling: {{num_samples: 2, temperature: 1.0, top_p: 0.9}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    write_choice_task(tmp_path, 12)
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(folder=tmp_path, tasks=ROOT / "configs/eval/tasks"))
    return path


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_policy_is_examined_on_schedule(
    world_size: int, suite: Path, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = toy_config(
        tmp_path, toy_model("qwen2"), f"run.output_dir={folder}", "run.num_steps=3", f"benchmarks.suite={suite}",
        "benchmarks.every=2", "checkpoint.save_hf=true", "optimizer.lr=1e-2",
    )  # fmt: skip
    gangs(world_size).call(cases.run_training, config=config)
    found = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    examined = {step for step, row in found.items() if "benchmark/choice/avg@1" in row}
    assert examined == {0, 2, 3}
    steps = {step: read_answers(folder / f"benchmarks/step_{step:06d}/answers") for step in examined}
    assert {len(answers) for answers in steps.values()} == {12 * 2 + 12}
    for step, answers in steps.items():
        rates = [one.right for one in answers.values() if one.task == "choice"]
        assert found[step]["benchmark/choice/avg@1"] == pytest.approx(sum(rates) / 12)
        assert (folder / f"benchmarks/step_{step:06d}/report.html").exists()
    assert found[3]["timing_s/benchmarks"] > 0
    # the checkpoint, asked by itself, says the same
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite), "model.dtype=fp32",
         f"model.path={folder}/checkpoints/step_000003/hf", f"run.output_dir={tmp_path}/alone"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = read_answers(tmp_path / "alone/answers")
    assert {key: one.response for key, one in alone.items()} == {key: one.response for key, one in steps[3].items()}
    before = {key: one.response for key, one in steps[0].items()}
    assert before != {key: one.response for key, one in steps[3].items()}, "the policy has learnt something"

    page = tmp_path / "page.html"
    folders = [str(folder / f"benchmarks/step_{step:06d}") for step in (0, 3)]
    assert compare_evals.main([*folders, "--html", str(page)]) == 0
    rates = [one.rates for one in read_all_finished([Path(folder) for folder in folders])]
    pairs = [pair for task in rates[0] for pair in zip(rates[0][task], rates[1][task], strict=True)]
    changed = sum((old >= 0.5) != (new >= 0.5) for old, new in pairs)
    text = page.read_text()
    assert text.count("<svg") == 3, "the shares, and what changed of each task"
    assert text.count("<details>") == changed


def test_a_suite_that_cannot_be_answered_stops_before_the_first_step(
    suite: Path, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"benchmarks\.every=2.*benchmarks\.suite beside it"):
        toy_config(tmp_path, toy_model("qwen2"), "benchmarks.every=2")
    (tmp_path / "choices.jsonl").write_text(
        json.dumps({"question": "1" * 600, "choices": ["1", "2"], "answer": 0}) + "\n"
    )
    config = toy_config(tmp_path, toy_model("qwen2"), f"benchmarks.suite={suite}")
    with pytest.raises(DataError, match=r"question 0 of task choice has 6\d\d tokens"):
        load_inputs(config, 1)
