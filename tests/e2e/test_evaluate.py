"""python -m megatron_rl.evaluate: killed and restarted, on one rank and under torchrun, and on an endpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megatron_rl.evaluation.answers import read_answers
from tests import forked
from tests.limits import LIMIT_S
from tests.serving import JsonHandler, serving

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
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    python = [sys.executable, *(ranks if num_ranks > 1 else [])]
    return [*python, "-m", "megatron_rl.evaluate", "--config", str(suite)]


def evaluate(folder: Path, model: Path, num_ranks: int = 1) -> dict[str, Any]:
    done = forked.run(command(folder, model, num_ranks))
    assert done.returncode == 0, done.stderr
    assert "| hasty_chain | 300 x 4 |" in done.stdout
    return json.loads((folder / "out/results.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def uninterrupted(
    toy_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(folder, toy_model())


def answer_lines(folder: Path) -> list[str]:
    return [line for path in (folder / "out/answers").glob("*.jsonl") for line in path.read_text().splitlines()]


def test_ten_kills_leave_the_answers_unchanged_and_without_duplicates(
    uninterrupted: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    total = 2 * 300 * 4
    for kill in range(1, KILLS + 1):
        process = forked.start(command(tmp_path, toy_model()))
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < until:
            if (tmp_path / "out/answers").exists() and len(answer_lines(tmp_path)) >= kill * total // (KILLS + 4):
                break
            time.sleep(0.005)
        assert process.poll() is None, "the evaluation ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < len(answer_lines(tmp_path)) < total
    tasks = evaluate(tmp_path, toy_model())
    assert len(answer_lines(tmp_path)) == total
    assert tasks == uninterrupted[1]
    assert read_answers(tmp_path / "out/answers") == read_answers(uninterrupted[0] / "out/answers")


def test_two_ranks_give_the_same_answers(
    uninterrupted: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    assert evaluate(tmp_path, toy_model(), num_ranks=2) == uninterrupted[1]
    assert len(list((tmp_path / "out/answers").glob("*.jsonl"))) == 4
    assert read_answers(tmp_path / "out/answers") == read_answers(uninterrupted[0] / "out/answers")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "nowhere"),
        ("model.dtype=bf16", "holds answers to another evaluation: model.dtype differ"),
    ],
)
def test_invalid_configurations_give_a_single_error_line(
    override: str, message: str, uninterrupted: tuple[Path, dict[str, Any]], toy_model: Callable[..., Path]
) -> None:
    done = forked.run([*command(uninterrupted[0], toy_model()), override])
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def echoed(text: str) -> dict[str, list[Any]]:
    """Return echoed log-probs: a start token, a token per two characters, a generated token; A and C are likelier."""
    tokens = ["<start>", *(text[start : start + 2] for start in range(0, len(text), 2)), "!"]
    logprobs = [None, *(-1.0 for _ in tokens[1:-1]), -9.0]
    logprobs[-2] = -1.0 if text.endswith(("A", "C")) else -2.0
    return {"tokens": tokens, "token_logprobs": logprobs, "text_offset": [-1] * len(tokens)}


class Endpoint(JsonHandler):
    """Endpoint that answers additions in a way that depends on the model name, and is busy every seventh time."""

    requests: ClassVar[list[dict[str, Any]]] = []

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        if len(self.requests) % 7 == 3:
            return 503, {"error": "busy"}
        if body["model"] == "none":
            return 404, {"error": "no such model"}
        if body.get("echo"):
            return 200, {"choices": [{"logprobs": echoed(body["prompt"])}]}
        a, b = map(int, body["prompt"].rstrip("=").split("+"))
        if body["model"] == "strict" and a % 2:
            return 400, {"error": "not this one"}
        if body["model"] == "stricter":
            return 400, {"error": "none of them"}
        text = f"it is >{a + b if a % 2 else 0}"
        choice = {"text": text, "finish_reason": "stop" if a % 3 else "length"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 5}}


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Start the endpoint and yield its URL."""
    Endpoint.requests.clear()
    with serving(Endpoint) as url:
        yield url


def evaluate_endpoint(url: str, model: str, folder: Path, task: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Evaluate a model of an endpoint on one task."""
    suite = folder / "suite.yaml"
    suite.write_text(
        f"run: {{name: x, output_dir: {folder}/out}}\nmodel: {{path: {model}}}\ntasks: [{task}]\nlimit: 40\n"
        f"engine: {{name: openai, url: '{url}', max_num_sequences: 4}}\n"
    )
    return forked.run(
        [sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite), *more],
        env=os.environ | {"OPENAI_API_KEY": "k"},
    )


def scores_of(folder: Path, task: str) -> dict[str, float]:
    scores: dict[str, float] = json.loads((folder / "out/results.json").read_text())["tasks"][task]["scores"]
    return scores


ADDITION = f"{ROOT}/configs/eval/tasks/hasty_addition.yaml"


def test_endpoint_responses_are_graded(endpoint: str, tmp_path: Path) -> None:
    done = evaluate_endpoint(endpoint, "some-model", tmp_path, ADDITION, "sampling.num_samples=2")
    assert done.returncode == 0, done.stderr
    answers = read_answers(tmp_path / "out/answers")
    assert len(answers) == 80
    requests = Endpoint.requests
    assert {(request["path"], request["key"], request["max_tokens"]) for request in requests} == {
        ("/v1/completions", "Bearer k", 12)
    }
    assert len({(request["prompt"], request["seed"]) for request in requests}) == 80, "every sample has its own seed"
    odd = {request["prompt"] for request in requests if int(request["prompt"].split("+")[0]) % 2}
    assert scores_of(tmp_path, "hasty_addition")["response_length"] == 5
    right = {key[1] for key, answer in answers.items() if answer.right}
    assert 0 < len(right) <= len(odd)
    assert all(answer.right == (answer.finish_reason == "stop" and answer.shown != "0") for answer in answers.values())


def test_requests_that_an_endpoint_rejects_are_recorded_and_repeated(endpoint: str, tmp_path: Path) -> None:
    """A single rejected request is recorded and repeated by the next start; if all are rejected, it is an error."""
    for model, message in (("none", "status 404"), ("stricter", "rejected all of 16 requests")):
        done = evaluate_endpoint(endpoint, model, tmp_path, ADDITION, f"run.output_dir={tmp_path}/{model}")
        assert done.returncode == 1
        assert message in done.stderr
    done = evaluate_endpoint(endpoint, "strict", tmp_path, ADDITION)
    assert done.returncode == 0, done.stderr
    answers = read_answers(tmp_path / "out/answers").values()
    rejected = [answer for answer in answers if answer.status == "refused"]
    assert 0 < len(rejected) < len(answers) == 40
    assert all(not answer.right and "not this one" in answer.message for answer in rejected)
    assert scores_of(tmp_path, "hasty_addition")["grading_failed"] == len(rejected) / 40
    Endpoint.requests.clear()
    assert evaluate_endpoint(endpoint, "strict", tmp_path, ADDITION).returncode == 0
    assert len({answer["prompt"] for answer in Endpoint.requests}) == len(rejected)


def test_choices_are_ranked_by_log_probs_of_an_endpoint(endpoint: str, tmp_path: Path) -> None:
    rows = [{"question": "?" * (index % 3), "choices": ["x", "y", "z"], "answer": index % 3} for index in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"name: choice\nversion: 1\nsource: here\ndata: {{kind: jsonl, path: {tmp_path}/rows.jsonl}}\n"
        'prompt: "{question}\\n{choices}\\nAnswer:"\nchoices_field: choices\nchat: false\n'
        "likelihood: {of: letters}\nscorer: {name: exact_match}\ngold_response: '{gold}'\nmajority: false\n"
    )
    done = evaluate_endpoint(endpoint, "some-model", tmp_path, f"{tmp_path}/task.yaml")
    assert done.returncode == 0, done.stderr
    answers = read_answers(tmp_path / "out/answers").values()
    # A and C are equally likely, and the first one is chosen
    assert {answer.response for answer in answers} == {"A"}
    assert {tuple(answer.likelihoods[:2]) for answer in answers} <= {(-1.0, -2.0), (-2.0, -3.0)}
    assert scores_of(tmp_path, "choice")["avg@1"] == pytest.approx(4 / 12)
