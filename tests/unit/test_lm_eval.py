"""Grading of generated responses against the filters and metrics of lm-evaluation-harness.

The harness would download its data sets and its metric that runs code. The code tasks are therefore compared with the
programs that it builds, run here without a sandbox.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import TaskConfig as TaskConfigOfHarness
from lm_eval.filters.extraction import RegexFilter, WhitespaceFilter
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import hendrycks_math
from lm_eval.tasks.hendrycks_math import utils as harness_math
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config.evaluation import GradingSection, LikelihoodSection, TaskConfig, load_evaluation
from megatron_rl.config.load import load_as
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.evaluation.generation import (
    RenderedQuestion,
    Response,
    choose_by_likelihood,
    render_questions,
    truncate_at_stop,
)
from megatron_rl.evaluation.grading import Grader
from megatron_rl.evaluation.questions import Question, read_questions
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from tests.engines.contract import setup_of
from tests.limits import with_long_timeout
from tools.data import bbh_examples

TASKS = Path(__file__).parents[2] / "configs" / "eval" / "tasks"
HARNESS = Path(hendrycks_math.__path__[0]).parent
NUM_RESPONSES = 240


def harness_settings(path: str) -> dict[str, Any]:
    """Return a task file of the harness, with functions replaced by their names."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: str(node.value))
    task = yaml.load((HARNESS / path).read_text(), Loader=loader)
    include = task.get("include")
    return {**(harness_settings(f"{Path(path).parent}/{include}") if include else {}), **task}


def harness_grades(
    task: dict[str, Any], filter_name: str, responses: Sequence[str], answers: Sequence[str]
) -> list[bool]:
    """Grade responses with the filters and the metric of a task of the harness."""
    texts: Any = [[truncate_at_stop(text, task["generation_kwargs"]["until"])[0]] for text in responses]
    (steps,) = [one["filter"] for one in task["filter_list"] if one["name"] == filter_name]
    for step in steps:
        options = {key: value for key, value in step.items() if key != "function"}
        match step["function"]:
            case "regex":
                texts = RegexFilter(**options).apply(texts, [])
            case "remove_whitespace":
                texts = WhitespaceFilter().apply(texts, [])
    options = {key: value for key, value in task["metric_list"][0].items() if key.startswith(("ignore", "regexes"))}
    return [
        bool(exact_match_hf_evaluate([text], [answer], **options)["exact_match"])
        for (text,), answer in zip(texts, answers, strict=True)
    ]


def our_grades(
    name: str, responses: Sequence[str], rows: Sequence[dict[str, Any]], answers: Sequence[str]
) -> list[bool]:
    task = with_long_timeout(load_as(TaskConfig, TASKS / f"{name}.yaml"))
    grader = Grader(GradingSection(timeout_s=60), [task])
    try:
        pending = []
        for index, (text, row, answer) in enumerate(zip(responses, rows, answers, strict=True)):
            question = Question(index=index, text="", answers=[answer], group=None, row=row)
            truncated, is_cut = truncate_at_stop(text, task.sampling.stop)
            response = Response(
                rendered=RenderedQuestion(question=question, prompt="", token_ids=[1]), sample=0, seed=0,
                text=truncated, num_tokens=1,
                finish_reason="stop" if is_cut else "length",
            )  # fmt: skip
            pending.append((response, grader.submit(task, response)))
        graded = [grader.collect(task, response, submitted) for response, submitted in pending]
    finally:
        grader.close()
    assert {one.status for one in graded} == {"ok"}
    return [one.right for one in graded]


def generated(forms: Sequence[str], values: Callable[[random.Random], tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return responses, made by putting values into `forms`, and their reference answers."""
    draw = random.Random(7)
    responses, answers = [], []
    for index in range(NUM_RESPONSES):
        value, answer = values(draw)
        responses.append(forms[index % len(forms)].replace("{v}", value))
        answers.append(answer)
    return responses, answers


def numbers(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice([draw.randint(-20, 20), draw.randint(1000, 99999), draw.randint(0, 9) / 4])
    shown = draw.choice([answer, answer, answer, draw.randint(0, 9)])
    text = f"{shown:,}" if draw.random() < 0.5 else str(shown)
    return draw.choice([text, f"${text}", f"{text}.", f"{text} dollars"]), f"some steps\n#### {answer:,}"


@pytest.mark.parametrize(
    ("name", "filter_name"), [("gsm8k_5shot", "flexible-extract"), ("gsm8k_5shot_strict", "strict-match")]
)
def test_gsm8k_grades_equal_those_of_the_harness(name: str, filter_name: str) -> None:
    forms = [
        "So 3+4.\n#### {v}",
        "It is {v}",
        "#### {v}\n#### 7",
        "{v} it is, not 12\nQuestion: 5",
        "none",
        "x {v} y 1,000.00",
    ]
    responses, answers = generated(forms, numbers)
    golds = [answer.rpartition("#### ")[2] for answer in answers]
    ours = our_grades(name, responses, [{}] * NUM_RESPONSES, golds)
    assert ours == harness_grades(harness_settings("gsm8k/gsm8k.yaml"), filter_name, responses, answers)
    assert 10 < sum(ours) < NUM_RESPONSES - 10


def test_bbh_grades_equal_those_of_the_harness() -> None:
    def values(draw: random.Random) -> tuple[str, str]:
        answer = draw.choice(["(A)", "(B)", "True", "valid", "7", "apple banana", "[ ] )"])
        return draw.choice([answer, answer, answer.lower(), "(C)"]), answer

    forms = [
        *(
            "So the answer is {v}.",
            "the answer is {v}",
            "The answer is {v},.",
            "I think {v}.",
            "The final answer: {v}.",
        ),
        *("the answer is no. Then the answer is {v}.", "The answer: {v}.\nQ: the answer is (A)."),
    ]
    responses, answers = generated(forms, values)
    ours = our_grades("bbh", responses, [{}] * NUM_RESPONSES, answers)
    expected = harness_grades(harness_settings("bbh/cot_zeroshot/navigate.yaml"), "strict-match", responses, answers)
    assert ours == expected
    assert 10 < sum(ours) < NUM_RESPONSES - 10


def write_published_examples(folder: Path, subset: str) -> tuple[dict[str, Any], Path]:
    """Return the harness' settings of a subset, and the path of its examples, written in their published format."""
    settings = harness_settings(f"bbh/cot_fewshot/{subset}.yaml")
    questions = [
        "Q: {input}\nA: Let's think step by step.\n{target}".format(**one)
        for one in settings["fewshot_config"]["samples"]
    ]
    path = folder / f"{subset}.txt"
    path.write_text(
        "\n".join(["Some notice.", "-----", settings["description"].strip(), "", "\n\n".join(questions)]) + "\n"
    )
    return settings, path


def test_bbh_prompts_and_grades_with_published_examples_equal_those_of_the_harness(tmp_path: Path) -> None:
    """Compare prompts with the harness' first-n sampler, and grades with its filter and metric."""
    task = load_as(TaskConfig, TASKS / "bbh_3shot.yaml")
    (tmp_path / "cot-prompts").mkdir()
    settings_of = {subset: write_published_examples(tmp_path / "cot-prompts", subset)[0] for subset in task.subsets}
    assert bbh_examples.main([str(tmp_path / "cot-prompts"), str(tmp_path / "examples.jsonl")]) == 0
    rows = [{"input": f"What of {subset}?", "target": "(A)", "subset": subset} for subset in task.subsets]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"run: {{name: x, output_dir: x}}\nmodel: {{path: x}}\ntasks: [{TASKS}/bbh_3shot.yaml]\n"
        f"data: {{bbh_3shot: {tmp_path}/rows.jsonl}}\nexamples: {{bbh_3shot: {tmp_path}/examples.jsonl}}\n"
    )
    _, (task,) = load_evaluation(suite, [])
    for question in read_questions(task):
        settings = settings_of[question.row["subset"]]
        assert settings["fewshot_config"]["sampler"] == "first_n"
        expected = settings["description"]
        for one in [
            *settings["fewshot_config"]["samples"][: settings["num_fewshot"]],
            {"input": question.row["input"]},
        ]:
            text = settings["doc_to_text"].replace("{{input}}", one["input"])
            expected += text + (one["target"] + "\n\n" if "target" in one else "")
        assert question.text == expected
    forms = [
        "So the answer is {v}.",
        "the answer is {v}",
        "The answer is {v}.",
        "the answer is {v}. Q the answer is X.",
    ]
    responses, answers = generated([*forms, "Hm.\n\nSo the answer is {v}."], yes_or_no)
    ours = our_grades("bbh_3shot", responses, [{}] * NUM_RESPONSES, answers)
    assert ours == harness_grades(settings_of["navigate"], "get-answer", responses, answers)
    assert 10 < sum(ours) < NUM_RESPONSES - 10


def yes_or_no(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice(["Yes", "No", "(A)"])
    return draw.choice([answer, answer, answer.lower(), "Yes"]), answer


def test_mmlu_grades_equal_those_of_the_harness() -> None:
    def values(draw: random.Random) -> tuple[str, str]:
        answer = draw.choice("ABCD")
        return draw.choice([answer, answer, answer.lower(), "E", "BA"]), answer

    forms = ["{v}", " {v}\nQuestion", "{v}.", "({v})", " {v} ", "{v}. because", "\n{v}", "Answer: {v}"]
    responses, answers = generated(forms, values)
    ours = our_grades("mmlu_continued", responses, [{}] * NUM_RESPONSES, answers)
    expected = harness_grades(
        harness_settings("mmlu/generative/_default_template_yaml"), "get_response", responses, answers
    )
    assert ours == expected
    assert 10 < sum(ours) < NUM_RESPONSES - 10


@pytest.mark.parametrize("of", ["letters", "choices"])
def test_mmlu_likelihoods_and_grades_equal_those_of_the_harness(of: str, toy_model: Callable[..., Path]) -> None:
    """Compare log-likelihoods of one model, and the grades that they give with and without length normalization."""
    folder, draw = toy_model("qwen2"), random.Random(5)
    task = load_as(TaskConfig, TASKS / "mmlu_likelihood.yaml")
    assert (task.prompt, task.chat) == ("{question}\n{choices}\nAnswer:", False)
    task = replace(task, likelihood=LikelihoodSection(of=of))
    docs = [
        {
            "question": f"{draw.randint(0, 99)}+{draw.randint(0, 99)}=",
            "choices": ["0" * draw.randint(1, 3) + str(draw.randint(0, 999)) for _ in "ABCD"],
            "answer": draw.randint(0, 3),
        }
        for _ in range(NUM_RESPONSES)
    ]
    prompts = ["\n".join([doc["question"], *map("{}. {}".format, "ABCD", doc["choices"]), "Answer:"]) for doc in docs]
    questions = [
        Question(index=index, text=prompt, answers=["ABCD"[doc["answer"]]], group=None, choices=doc["choices"])
        for index, (doc, prompt) in enumerate(zip(docs, prompts, strict=True))
    ]
    tokenizer = load_tokenizer(str(folder))
    engine = EmbeddedEngine(setup_of(folder))
    engine.load_weights(iter(load_file(folder / "model.safetensors").items()), version=0)
    requests = [(rendered, [(0, 0)]) for rendered in render_questions(task, questions, tokenizer)]

    shown = ["A", "B", "C", "D"] if of == "letters" else None
    harness = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=16)
    pairs = [(prompt, f" {one}") for prompt, doc in zip(prompts, docs, strict=True) for one in shown or doc["choices"]]
    harness_scores = harness.loglikelihood(
        [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True
    )
    scorer = ConfigurableTask.__new__(ConfigurableTask)
    scorer.OUTPUT_TYPE, scorer.prompt, scorer.features = "multiple_choice", None, ["answer", "choices"]
    scorer.multiple_input = scorer.multiple_target = 0
    scorer._metric_fn_list = {"acc": None, "acc_norm": None}
    scorer._config = TaskConfigOfHarness(doc_to_target="answer", doc_to_choice=shown or "{{choices}}")
    for normalize, metric in (("none", "acc"), ("characters", "acc_norm")):
        normalized = replace(task, likelihood=LikelihoodSection(of=of, normalize=normalize))
        responses = list(choose_by_likelihood(engine, normalized, requests))
        right = [one.text == one.rendered.question.answers[0] for one in responses]
        harness_right = [
            bool(scorer.process_results(doc, harness_scores[4 * index : 4 * index + 4])[metric])
            for index, doc in enumerate(docs)
        ]
        assert right == harness_right
        assert 10 < sum(right) < NUM_RESPONSES - 10
        if normalize == "none":
            ours = [value for one in responses for value in one.likelihoods]
            assert ours == pytest.approx([value for value, _ in harness_scores], abs=1e-4)


def test_math_grades_differ_only_for_equal_answers_in_another_form() -> None:
    pairs = [
        ("\\frac{1}{2}", "0.5"),
        ("10", "10.0"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("(1,2)", "(1, 2)"),
        ("x^2", "x^{2}"),
    ]
    same = 0
    responses, answers, kinds = [], [], []
    draw = random.Random(3)
    for index in range(NUM_RESPONSES):
        gold, other = draw.choice(pairs)
        kind = ("same", "other", "wrong")[index % 3]
        shown = {"same": gold, "other": other, "wrong": "17"}[kind]
        responses.append(f"Steps.\nFinal Answer: The final answer is ${shown}$. I hope it is correct.")
        answers.append(gold)
        kinds.append(kind)
    ours = our_grades("math", responses, [{}] * NUM_RESPONSES, answers)
    for text, gold, kind, right in zip(responses, answers, kinds, ours, strict=True):
        harness_grade = harness_math.process_results({"solution": f"\\boxed{{{gold}}}"}, [text])["exact_match"]
        assert right == (kind != "wrong")
        if kind != "other":
            assert right == bool(harness_grade)
        same += right == bool(harness_grade)
    assert same >= 2 * NUM_RESPONSES / 3


CODE = [
    "    return a + b + {i}\n", "    return a - b\n", "    raise ValueError\n", "    return a + b + {i} if a else 0\n",
    "    x = a\n    return x + b + {i}\n\ndef other():\n    return 1\n", "    return (a\n", "",
    "    import sys\n    sys.exit(0)\n",
]  # fmt: skip


def runs_without_error(program: str) -> bool:
    """Return whether a program raises nothing, which is the criterion of the harness' metric."""
    try:
        exec(program, {})
    except BaseException:
        return False
    return True


def test_humaneval_grades_equal_those_of_the_harness() -> None:
    stops = harness_settings("humaneval/humaneval.yaml")["generation_kwargs"]["until"]
    task = load_as(TaskConfig, TASKS / "humaneval_completion.yaml")
    assert task.sampling.stop == stops
    responses, rows, expected = [], [], []
    for index in range(NUM_RESPONSES):
        i = index // len(CODE)
        response = CODE[index % len(CODE)].replace("{i}", str(i))
        prompt, entry = f'def add(a, b):\n    """a + b + {i}"""\n', "add"
        test = f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n    assert candidate(0, 2) == {2 + i}\n"
        responses.append(response)
        rows.append({"prompt": prompt, "test": test, "entry_point": entry})
        expected.append(runs_without_error(f"{prompt}{truncate_at_stop(response, stops)[0]}\n{test}\ncheck({entry})"))
    ours = our_grades("humaneval_completion", responses, rows, [""] * NUM_RESPONSES)
    assert ours == expected
    assert 10 < sum(ours) < NUM_RESPONSES - 10


def test_mbpp_grades_equal_those_of_the_harness() -> None:
    stops = harness_settings("mbpp/mbpp.yaml")["generation_kwargs"]["until"]
    assert load_as(TaskConfig, TASKS / "mbpp.yaml").sampling.stop == stops
    responses, rows, expected = [], [], []
    for index in range(NUM_RESPONSES):
        i = index // len(CODE)
        response = "def add(a, b):\n" + CODE[index % len(CODE)].replace("{i}", str(i)) + "[DONE]\nnonsense("
        tests = [f"assert add(1, 2) == {3 + i}", f"assert add(0, 2) == {2 + i}"]
        responses.append(response)
        rows.append({"test_list": tests, "test_setup_code": ""})
        expected.append(runs_without_error("\n".join([truncate_at_stop(response, stops)[0], *tests])))
    ours = our_grades("mbpp", responses, rows, [""] * NUM_RESPONSES)
    assert ours == expected
    assert 10 < sum(ours) < NUM_RESPONSES - 10


def test_prompts_equal_those_of_the_harness() -> None:
    """Compare after writing the variables of the harness' templates as columns."""
    for name, path in (("gsm8k_5shot", "gsm8k/gsm8k.yaml"), ("humaneval_completion", "humaneval/humaneval.yaml")):
        template = harness_settings(path)["doc_to_text"].replace("{{", "{").replace("}}", "}")
        assert load_as(TaskConfig, TASKS / f"{name}.yaml").prompt == template
    task = load_as(TaskConfig, TASKS / "mbpp.yaml")
    template = harness_settings("mbpp/mbpp.yaml")["doc_to_text"]
    lines = "\n".join(f"{{{{test_list[{index}]}}}}" for index in range(3))
    assert task.prompt == template.replace(lines, "{tests}").replace("{{text}}", "{text}")
    assert replace(task, chat=False) == task
