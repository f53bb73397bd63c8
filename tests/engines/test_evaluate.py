"""An evaluation gives the same answers on every engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.evaluation.answers import read_answers
from tests.toys import write_choice_task

ROOT = Path(__file__).parents[2]
SUITE = """
run: {{name: toy, output_dir: {folder}/out}}
model: {{path: {model}, dtype: fp32}}
tasks: [{tasks}/hasty_addition.yaml, choice.yaml]
engine: {{name: {engine}, max_num_sequences: {at_a_time}}}
limit: 48
"""


def evaluate(engine: str, folder: Path, model: Path, at_a_time: int) -> dict[str, Any]:
    folder.mkdir()
    suite, tasks = folder / "suite.yaml", ROOT / "configs/eval/tasks"
    write_choice_task(folder, 48)
    suite.write_text(SUITE.format(folder=folder, engine=engine, model=model, tasks=tasks, at_a_time=at_a_time))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out/results.json").read_text())


def test_greedy_answers_equal_those_of_the_embedded_engine(
    engine_name: str, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen2", hidden_size=128, head_dim=32, tied=True)
    embedded = evaluate("embedded", tmp_path / "embedded", model, 64)
    other = evaluate(engine_name, tmp_path / "other", model, 5)
    assert other["tasks"] == embedded["tasks"]
    assert "not installed" not in other["versions"].values()
    assert set(embedded["tasks"]) == {"hasty_addition", "choice"}
    other_answers, embedded_answers = (read_answers(tmp_path / name / "out/answers") for name in ("other", "embedded"))
    assert {key: answer.response for key, answer in other_answers.items()} == {
        key: answer.response for key, answer in embedded_answers.items()
    }
