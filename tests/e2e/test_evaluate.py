"""python -m megatron_rl.evaluate, killed and started again, alone and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.evaluation.answers import read_answers

ROOT = Path(__file__).parents[2]
KILLS = 10
SUITE = """
run: {{name: toy, output_dir: {folder}}}
model: {{path: {model}, dtype: fp32}}
tasks: [{tasks}/hasty_addition.yaml, {tasks}/hasty_chain.yaml]
sampling: {{num_samples: 4, temperature: 1.0}}
engine: {{max_num_sequences: 64}}
limit: 300
"""


def command(folder: Path, model: Path, num_ranks: int = 1) -> list[str]:
    folder.mkdir(exist_ok=True)
    suite = folder / "suite.yaml"
    suite.write_text(SUITE.format(folder=folder / "out", model=model, tasks=ROOT / "configs/eval/tasks"))
    python = ["torchrun", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else [sys.executable]
    return [*python, "-m", "megatron_rl.evaluate", "--config", str(suite)]


def finished(folder: Path, model: Path, num_ranks: int = 1) -> dict[str, Any]:
    done = subprocess.run(command(folder, model, num_ranks), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "| hasty_chain | 300 x 4 |" in done.stdout
    return json.loads((folder / "out/results.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def whole(toy_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, finished(folder, toy_model())


def lines(folder: Path) -> list[str]:
    return [line for path in (folder / "out/answers").glob("*.jsonl") for line in path.read_text().splitlines()]


def test_killed_ten_times_it_has_the_same_answers_each_once(
    whole: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    total = 2 * 300 * 4
    for kill in range(1, KILLS + 1):
        process = subprocess.Popen(command(tmp_path, toy_model()), stdout=subprocess.DEVNULL, cwd=ROOT)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if (tmp_path / "out/answers").exists() and len(lines(tmp_path)) >= kill * total // (KILLS + 1):
                break
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < len(lines(tmp_path)) < total
    found = finished(tmp_path, toy_model())
    assert len(lines(tmp_path)) == total
    assert found == whole[1]
    assert read_answers(tmp_path / "out/answers") == read_answers(whole[0] / "out/answers")


def test_two_ranks_give_the_same_answers(
    whole: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    assert finished(tmp_path, toy_model(), num_ranks=2) == whole[1]
    assert len(list((tmp_path / "out/answers").glob("*.jsonl"))) == 4
    assert read_answers(tmp_path / "out/answers") == read_answers(whole[0] / "out/answers")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "nowhere"),
        ("engine.name=other", "engine.name"),
        ("limt=3", "Did you mean limit"),
        ("data.hasty_chain=none.jsonl", "none.jsonl does not exist"),
        ("model.dtype=bf16", "holds answers to another evaluation: model.dtype differ"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    override: str, message: str, whole: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path]
) -> None:
    done = subprocess.run(
        [*command(whole[0], toy_model()), override], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
