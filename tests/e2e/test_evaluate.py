"""python -m megatron_rl.evaluate, killed and started again, alone and under torchrun."""

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
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < until:
            if (tmp_path / "out/answers").exists() and len(lines(tmp_path)) >= kill * total // (KILLS + 4):
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


def echoed(text: str) -> dict[str, list[Any]]:
    """A token for every two characters, a start token before them and a generated one behind; A and C are likelier."""
    tokens = ["<start>", *(text[place : place + 2] for place in range(0, len(text), 2)), "!"]
    logprobs = [None, *(-1.0 for _ in tokens[1:-1]), -9.0]
    logprobs[-2] = -1.0 if text.endswith(("A", "C")) else -2.0
    return {"tokens": tokens, "token_logprobs": logprobs, "text_offset": [-1] * len(tokens)}


class Endpoint(JsonHandler):
    """Answers additions as told, and is busy every seventh time."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        if len(self.asked) % 7 == 3:
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
    """Its url."""
    Endpoint.asked.clear()
    with serving(Endpoint) as url:
        yield url


def ask(url: str, model: str, folder: Path, task: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Evaluate what an endpoint serves."""
    suite = folder / "suite.yaml"
    suite.write_text(
        f"run: {{name: x, output_dir: {folder}/out}}\nmodel: {{path: {model}}}\ntasks: [{task}]\nlimit: 40\n"
        f"engine: {{name: openai, url: '{url}', max_num_sequences: 4}}\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite), *more],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": "k"}, check=False,
    )  # fmt: skip


def scores_of(folder: Path, task: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "out/results.json").read_text())["tasks"][task]["scores"]
    return found


ADDITION = f"{ROOT}/configs/eval/tasks/hasty_addition.yaml"


def test_an_endpoint_is_asked(endpoint: str, tmp_path: Path) -> None:
    done = ask(endpoint, "some-model", tmp_path, ADDITION, "sampling.num_samples=2")
    assert done.returncode == 0, done.stderr
    found = read_answers(tmp_path / "out/answers")
    assert len(found) == 80
    asked = Endpoint.asked
    assert {(one["path"], one["key"], one["max_tokens"]) for one in asked} == {("/v1/completions", "Bearer k", 12)}
    assert len({(one["prompt"], one["seed"]) for one in asked}) == 80, "every sample has a seed of its own"
    odd = {one["prompt"] for one in asked if int(one["prompt"].split("+")[0]) % 2}
    assert scores_of(tmp_path, "hasty_addition")["response_length"] == 5
    right = {key[1] for key, one in found.items() if one.right}
    assert 0 < len(right) <= len(odd)
    assert all(one.right == (one.finish_reason == "stop" and one.shown != "0") for one in found.values())


def test_what_an_endpoint_refuses(endpoint: str, tmp_path: Path) -> None:
    """One request: it is recorded, and asked again by the next start. All of them: an error."""
    for model, message in (("none", "status 404"), ("stricter", "rejected all of 16 requests")):
        done = ask(endpoint, model, tmp_path, ADDITION, f"run.output_dir={tmp_path}/{model}")
        assert done.returncode == 1
        assert message in done.stderr
    done = ask(endpoint, "strict", tmp_path, ADDITION)
    assert done.returncode == 0, done.stderr
    found = read_answers(tmp_path / "out/answers").values()
    refused = [one for one in found if one.status == "refused"]
    assert 0 < len(refused) < len(found) == 40
    assert all(not one.right and "not this one" in one.message for one in refused)
    assert scores_of(tmp_path, "hasty_addition")["grading_failed"] == len(refused) / 40
    Endpoint.asked.clear()
    assert ask(endpoint, "strict", tmp_path, ADDITION).returncode == 0
    assert len({one["prompt"] for one in Endpoint.asked}) == len(refused)


def test_an_endpoint_says_which_choice_is_likely(endpoint: str, tmp_path: Path) -> None:
    rows = [{"question": "?" * (place % 3), "choices": ["x", "y", "z"], "answer": place % 3} for place in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"name: choice\nversion: 1\nsource: here\ndata: {{kind: jsonl, path: {tmp_path}/rows.jsonl}}\n"
        'prompt: "{question}\\n{choices}\\nAnswer:"\nchoices_field: choices\nchat: false\n'
        "likelihood: {of: letters}\nscorer: {name: exact_match}\ngold_response: '{gold}'\nmajority: false\n"
    )
    done = ask(endpoint, "some-model", tmp_path, f"{tmp_path}/task.yaml")
    assert done.returncode == 0, done.stderr
    found = read_answers(tmp_path / "out/answers").values()
    # A and C are equally likely, and the first of equals is taken
    assert {one.response for one in found} == {"A"}
    assert {tuple(one.likelihoods[:2]) for one in found} <= {(-1.0, -2.0), (-2.0, -3.0)}
    assert scores_of(tmp_path, "choice")["avg@1"] == pytest.approx(4 / 12)
