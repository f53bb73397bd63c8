"""Behaviour of saved responses: reflection keywords, LLM judges, rates, prompt templates and HTML pages."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megatron_rl.analysis.behaviour import ResponseRecord, behaviour, by_label
from megatron_rl.analysis.behaviour_page import render_behaviour
from megatron_rl.analysis.reflection import ANSWERING, POOLS, REFLECTION, category_of, keywords_in
from megatron_rl.analysis.responses import read_responses
from megatron_rl.config.evaluation import load_evaluation
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.reporting.stats import pass_at_k
from megatron_rl.rewards.math import math_answer
from megatron_rl.rewards.types import RewardInput
from megatron_rl.rollout.serialization import step_file, write_groups
from megatron_rl.types import Prompt, Rollout, RolloutGroup
from tests import forked
from tests.serving import JsonHandler, serving
from tools.analysis import analyze_responses

ROOT = Path(__file__).parents[2]


def record(question: int, sample: int, response: str, **changes: Any) -> ResponseRecord:
    default = ResponseRecord(
        label="4", key=str(question), question=f"question {question}", response=response, is_right=False, num_tokens=10,
        is_truncated=False, has_answer=True,
    )  # fmt: skip
    return replace(default, **changes)


@pytest.mark.parametrize("pool", POOLS)
def test_keywords_match_only_at_the_beginning_of_a_word(pool: str) -> None:
    for word in POOLS[pool]:
        assert word in keywords_in(f"So. {word.capitalize()} it", pool)
        assert word in keywords_in(f"({word}ing)", pool)
        assert keywords_in(f"a{word} it", pool) == [] or word not in keywords_in(f"a{word} it", pool)
    assert keywords_in("Nothing here: awaited, forewarned.", pool) == []


def test_keyword_pools_have_their_published_sizes() -> None:
    assert {name: len(words) for name, words in POOLS.items()} == {"understand_r1_zero": 15, "simplerl_zoo": 7}


@pytest.mark.parametrize(
    ("text", "category"),
    [("Category: 2", 2), ("category 1, no: **Category: 3**", 3), ("Category: 7", None), ("2", None), ("", None)],
)
def test_the_category_is_parsed_from_a_judge_response(text: str, category: int | None) -> None:
    assert category_of(text, REFLECTION) == category
    assert category_of("Category: 2", ANSWERING) is None


def test_rates_follow_their_definitions() -> None:
    records = [
        record(0, 0, "wait, recheck", is_right=True, num_tokens=4, judge_categories={"reflection": 2, "answering": 1}),
        record(0, 1, "plainly", num_tokens=6, judge_categories={"reflection": 1, "answering": 1}),
        record(
            1, 0, "Recheck it", num_tokens=20, is_truncated=True, has_answer=False, judge_categories={"reflection": 1}
        ),
        record(1, 1, "", num_tokens=2, has_answer=False, judge_categories={"reflection": 0, "answering": 0}),
    ]
    rates = behaviour(records).rates
    assert rates["accuracy"] == 0.25
    assert rates["pass@2"] == pytest.approx((pass_at_k(2, 1, 2) + 0) / 2)
    assert (rates["answered"], rates["truncated"]) == (0.5, 0.25)
    assert (rates["response_length_right"], rates["response_length_wrong"]) == (4, pytest.approx(28 / 3))
    assert (rates["reflection/understand_r1_zero"], rates["reflection/understand_r1_zero/questions"]) == (0.5, 1.0)
    assert (rates["reflection/judge"], rates["reflection/keywords_and_judge"]) == (0.25, 0.25)
    assert rates["accuracy/understand_r1_zero/with"] == 0.5
    assert rates["accuracy/understand_r1_zero/without"] == 0.0
    assert [rates[f"judged/{name}"] for name in REFLECTION.categories.values()] == [0.25, 0.5, 0.25, 0.0]
    assert rates["answered_by_judge"] == pytest.approx(2 / 3)
    without_judge = behaviour([replace(one, judge_categories={}) for one in records]).rates
    assert not {"reflection/judge", "answered_by_judge"} & set(without_judge), "rates of the judge need its responses"


def write_run(folder: Path) -> Path:
    """Write a run of three steps; responses get longer, right more often, and reflect less from step to step."""
    for step in (1, 2, 3):
        groups = []
        for index in range(4):
            ids = torch.tensor([3, 4])
            prompt = Prompt(prompt_id=f"p{index}", text=f"{index}+1=", token_ids=ids, answer=str(index + 1))
            texts = [f"\\boxed{{{index + 1}}}" if sample < step else "wait, no" for sample in range(4)]
            samples = [
                Rollout(
                    token_ids=torch.tensor([3, 4] + [5] * (step + 1)),
                    loss_mask=torch.tensor([False, False] + [True] * (step + 1)),
                    rollout_logprobs=torch.zeros(step + 3),
                    text=text,
                    finish_reason="stop",
                    reward=float("boxed" in text),
                    reward_parts={},
                    status="ok",
                    failure="",
                    policy_versions=torch.zeros(step + 3, dtype=torch.int32),
                    seed=sample,
                )
                for sample, text in enumerate(texts)
            ]  # fmt: skip
            groups.append(RolloutGroup(index=index, prompt=prompt, rollouts=samples))
        write_groups(step_file(folder / "rollouts", step), step, groups)
    return folder


def test_rates_of_a_run_are_grouped_by_step(tmp_path: Path) -> None:
    steps = by_label(read_responses([write_run(tmp_path)], min_reward=1.0, answer_shown_by=None))
    assert [step.label for step in steps] == ["1", "2", "3"]
    assert [step.rates["accuracy"] for step in steps] == [0.25, 0.5, 0.75]
    assert [step.rates["answered"] for step in steps] == [0.25, 0.5, 0.75]
    assert [step.rates["reflection/simplerl_zoo"] for step in steps] == [0.75, 0.5, 0.25]
    assert [step.rates["response_length"] for step in steps] == [2, 3, 4]
    page = render_behaviour("x", steps, read_responses([tmp_path], min_reward=1.0, answer_shown_by=None))
    assert page.count("<svg") == 5
    assert "wait, no" in page
    with pytest.raises(DataError, match="has no step_"):
        read_responses([tmp_path / "nothing"], min_reward=1.0, answer_shown_by=None)


def test_several_runs_get_distinct_titles(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("one/run", "two/run", "other")]
    behaviours = by_label(read_responses(paths, min_reward=1.0, answer_shown_by=None))
    names = ["one/run", "two/run", f"{tmp_path.name}/other"]
    assert [one.title for one in behaviours] == [f"{name} {step}" for name in names for step in (1, 2, 3)]
    assert [one.num_questions for one in behaviours] == [4] * 9
    named = by_label(read_responses(paths[1:], min_reward=1.0, answer_shown_by=None))
    assert [one.title for one in named] == [f"{name} {step}" for name in ("run", "other") for step in (1, 2, 3)]


class JudgeServer(JsonHandler):
    """Fake LLM judge: a response reflects (category 2) if it has "wait, no", and answers if it has "boxed"."""

    prompts: ClassVar[list[str]] = []

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = body["messages"][0]["content"]
        self.prompts.append(text)
        is_about_answering = "N being 0 or 1" in text
        category = int("boxed" in text) if is_about_answering else 1 + ("wait, no" in text)
        return 200, {"choices": [{"message": {"content": f"Well. Category: {category}"}, "finish_reason": "stop"}]}


@pytest.fixture
def judge_url() -> Iterator[str]:
    JudgeServer.prompts.clear()
    with serving(JudgeServer) as url:
        yield url


def test_a_judge_endpoint_gets_each_prompt_once(judge_url: str, tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "out"
    arguments = [str(run), "--output", str(output), "--judge-url", judge_url, "--judge-model", "m"]
    assert analyze_responses.main(arguments) == 0
    behaviours = json.loads((output / "behaviour.json").read_text())
    assert [one["rates"]["reflection/judge"] for one in behaviours] == [0.75, 0.5, 0.25]
    assert [one["rates"]["answered_by_judge"] for one in behaviours] == [0.25, 0.5, 0.75]
    # 4 questions with 2 distinct responses each, and 2 prompts (reflection, answering) for each response
    assert len(JudgeServer.prompts) == len(set(JudgeServer.prompts)) == 4 * 2 * 2
    assert analyze_responses.main(arguments) == 0
    assert len(JudgeServer.prompts) == 16, "saved judge responses are reused"
    with pytest.raises(SystemExit):
        analyze_responses.main([str(run), "--output", str(output), "--judge-url", judge_url])
    # as left by a process that is killed in the middle of a line
    saved = output / "judged.jsonl"
    saved.write_text(saved.read_text()[:-5])
    assert analyze_responses.main(arguments) == 0
    assert len(JudgeServer.prompts) == 17
    assert len(saved.read_text().splitlines()) == 16
    saved.write_text("nonsense\n" + saved.read_text())
    with pytest.raises(SystemExit, match=r"judged\.jsonl:1 is damaged"):
        analyze_responses.main(arguments)


SUITE = """
run: {{name: templates, output_dir: {folder}/out}}
model: {{path: {model}, dtype: fp32}}
tasks: [task.yaml]
templates: [{templates}/none.yaml, {templates}/qwen_math.yaml, {templates}/r1.yaml, four_shot.yaml]
temperatures: [0.5, 1.0]
sampling: {{num_samples: 4, max_new_tokens: 8}}
"""
TASK = """
name: sums
version: 1
source: here
data: {{kind: jsonl, path: {folder}/rows.jsonl}}
prompt: "{{problem}} in a box"
question: "{{problem}}"
system_prompt: never
scorer: {{name: math}}
"""
FOUR_SHOT = """
name: four_shot
source: here
text: "Problem: {{question}}\\nSolution:"
few_shot:
  count: 4
  template: "Problem: {{problem}}\\nSolution: {{answer}}\\n"
  rows: {{kind: jsonl, path: {folder}/rows.jsonl}}
"""


def suite_in(folder: Path, model: str) -> Path:
    rows = [{"problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(folder=folder))
    (folder / "four_shot.yaml").write_text(FOUR_SHOT.format(folder=folder))
    suite = folder / "suite.yaml"
    suite.write_text(SUITE.format(folder=folder, model=model, templates=ROOT / "configs/eval/templates"))
    return suite


def test_a_suite_has_a_task_per_template_and_temperature(tmp_path: Path) -> None:
    _, tasks = load_evaluation(suite_in(tmp_path, "m"), [])
    names = [f"sums@{name}@{t}" for name in ("none", "qwen_math", "r1", "four_shot") for t in ("0.5", "1")]
    assert [task.name for task in tasks] == names
    by_name = {task.name: task for task in tasks}
    assert by_name["sums@none@0.5"].prompt == "{problem}"
    assert by_name["sums@qwen_math@1"].prompt.endswith("<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n")
    assert by_name["sums@r1@1"].sampling.stop == ["</answer>"]
    assert {task.system_prompt for task in tasks} == {None}
    assert {task.chat for task in tasks} == {False}
    text = (tmp_path / "task.yaml").read_text()
    (tmp_path / "task.yaml").write_text(text.replace('question: "{problem}"\n', ""))
    with pytest.raises(ConfigError, match=r"templates with task sums: question=None"):
        load_evaluation(tmp_path / "suite.yaml", [])


@pytest.mark.parametrize(
    ("response", "right"),
    [("so </think> <answer> 1/2", 1), ("</think> <answer>\\boxed{0.5}</answer> 3", 1), ("so \\boxed{1/2}", 0),
     ("</think><answer> 1/2", 0), ("</think> <answer> 1/3", 0), ("</think> <answer>", 0)],
)  # fmt: skip
def test_the_r1_template_requires_its_tags(response: str, right: int) -> None:
    sample = RewardInput(prompt="", response=response, answer="1/2", finish_reason="stop", num_tokens=1, seed=0)
    assert math_answer(sample, after="</think> <answer>") == right


def test_one_command_compares_templates_on_a_base_model(toy_model: Any, judge_url: str, tmp_path: Path) -> None:
    suite = suite_in(tmp_path, str(toy_model("qwen2", tied=False, hidden_size=64)))
    done = forked.run([sys.executable, "-m", "megatron_rl.evaluate", "--config", str(suite)])
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("Right by temperature") == 1
    assert page.count("Answered by temperature") == 1
    questions = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()]
    assert len(questions) == 8 * 6
    assert questions[-1]["text"].count("Problem:") == 5
    assert analyze_responses.main([str(tmp_path / "out"), "--output", str(tmp_path / "behaviour")]) == 0
    behaviours = json.loads((tmp_path / "behaviour/behaviour.json").read_text())
    assert [(one["label"].split("@")[1:], one["num_responses"]) for one in behaviours][:3] == [
        (["none", "0.5"], 24), (["none", "1"], 24), (["qwen_math", "0.5"], 24),
    ]  # fmt: skip
    assert (tmp_path / "behaviour/behaviour.html").read_text().count("<svg") == 3
