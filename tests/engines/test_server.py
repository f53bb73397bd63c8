"""An evaluation through vLLM's own server gives the answers of the embedded engine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from megatron_rl.evaluation.answers import read_answers
from tests.limits import LIMIT_S
from tests.toys import write_choice_task

ROOT = Path(__file__).parents[2]
SUITE = """
run: {{name: toy, output_dir: {folder}/out}}
model: {{path: {model}, dtype: fp32}}
tasks: [choice.yaml, {tasks}/hasty_addition.yaml]
engine: {{max_num_sequences: 8}}
limit: 24
"""


@pytest.fixture
def model(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", hidden_size=128, head_dim=32, tied=True)


@pytest.fixture
def server(model: Path, engine_name: str, tmp_path: Path) -> Iterator[str]:
    """Start a vLLM server that serves the model as "toy", and yield its URL."""
    if engine_name != "vllm":
        pytest.skip("a test of vLLM's server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    log = (tmp_path / "server.log").open("w")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        log.close()


def evaluate(suite: Path, output: Path, *overrides: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite), f"run.output_dir={output}", *overrides],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "answers"


def test_answers_and_likelihoods_of_a_server_equal_the_embedded_engine(
    server: str, model: Path, tmp_path: Path
) -> None:
    write_choice_task(tmp_path, 24)
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.format(folder=tmp_path, model=model, tasks=ROOT / "configs/eval/tasks"))
    embedded_answers = read_answers(evaluate(suite, tmp_path / "embedded"))
    server_answers = read_answers(
        evaluate(suite, tmp_path / "server", "engine.name=openai", f"engine.url={server}", "model.path=toy")
    )
    assert len(embedded_answers) == len(server_answers) == 48
    for key, answer in server_answers.items():
        assert answer.response == embedded_answers[key].response
        assert answer.likelihoods == pytest.approx(embedded_answers[key].likelihoods, abs=1e-4)
