"""Verdicts on generated responses against lm-evaluation-harness' own filters and metrics.

Its data sets and the metric that runs code would be downloaded, so the code tasks are held against its programs, which
are run plainly here.
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
from tests.limits import patient
from tools.data import bbh_examples

TASKS = Path(__file__).parents[2] / "configs" / "eval" / "tasks"
HARNESS = Path(hendrycks_math.__path__[0]).parent
NUMBER = 240


def settings(path: str) -> dict[str, Any]:
    """A task file of the harness, without the functions that it names."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: str(node.value))
    found = yaml.load((HARNESS / path).read_text(), Loader=loader)
    include = found.get("include")
    return {**(settings(f"{Path(path).parent}/{include}") if include else {}), **found}


def harness_verdicts(
    task: dict[str, Any], filter_name: str, responses: Sequence[str], answers: Sequence[str]
) -> list[bool]:
    """Its filters, and its metric with its options."""
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


def our_verdicts(
    name: str, responses: Sequence[str], rows: Sequence[dict[str, Any]], answers: Sequence[str]
) -> list[bool]:
    task = patient(load_as(TaskConfig, TASKS / f"{name}.yaml"))
    grader = Grader(GradingSection(timeout_s=60), [task])
    try:
        pending = []
        for index, (text, row, answer) in enumerate(zip(responses, rows, answers, strict=True)):
            question = Question(index=index, text="", answers=[answer], group=None, row=row)
            said, is_cut = truncate_at_stop(text, task.sampling.stop)
            response = Response(
                rendered=RenderedQuestion(question=question, prompt="", token_ids=[1]), sample=0, seed=0, text=said,
                num_tokens=1,
                finish_reason="stop" if is_cut else "length",
            )  # fmt: skip
            pending.append((response, grader.submit(task, response)))
        found = [grader.collect(task, response, verdicts) for response, verdicts in pending]
    finally:
        grader.close()
    assert {one.status for one in found} == {"ok"}
    return [one.right for one in found]


def generated(forms: Sequence[str], values: Callable[[random.Random], tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Responses, each a form around a value, and the answers."""
    draw = random.Random(7)
    responses, answers = [], []
    for place in range(NUMBER):
        value, answer = values(draw)
        responses.append(forms[place % len(forms)].replace("{v}", value))
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
def test_gsm8k(name: str, filter_name: str) -> None:
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
    ours = our_verdicts(name, responses, [{}] * NUMBER, golds)
    assert ours == harness_verdicts(settings("gsm8k/gsm8k.yaml"), filter_name, responses, answers)
    assert 10 < sum(ours) < NUMBER - 10


def test_bbh() -> None:
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
    ours = our_verdicts("bbh", responses, [{}] * NUMBER, answers)
    theirs = harness_verdicts(settings("bbh/cot_zeroshot/navigate.yaml"), "strict-match", responses, answers)
    assert ours == theirs
    assert 10 < sum(ours) < NUMBER - 10


def published(folder: Path, subset: str) -> tuple[dict[str, Any], Path]:
    """The harness' settings of a subset, and its examples as they are published."""
    found = settings(f"bbh/cot_fewshot/{subset}.yaml")
    questions = [
        "Q: {input}\nA: Let's think step by step.\n{target}".format(**one) for one in found["fewshot_config"]["samples"]
    ]
    path = folder / f"{subset}.txt"
    path.write_text(
        "\n".join(["Some notice.", "-----", found["description"].strip(), "", "\n\n".join(questions)]) + "\n"
    )
    return found, path


def test_bbh_with_its_published_examples(tmp_path: Path) -> None:
    """Prompts as the harness' first-n sampler writes them, and its filter and metric."""
    task = load_as(TaskConfig, TASKS / "bbh_3shot.yaml")
    (tmp_path / "cot-prompts").mkdir()
    settings_of = {subset: published(tmp_path / "cot-prompts", subset)[0] for subset in task.subsets}
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
        theirs = settings_of[question.row["subset"]]
        assert theirs["fewshot_config"]["sampler"] == "first_n"
        wanted = theirs["description"]
        for one in [*theirs["fewshot_config"]["samples"][: theirs["num_fewshot"]], {"input": question.row["input"]}]:
            text = theirs["doc_to_text"].replace("{{input}}", one["input"])
            wanted += text + (one["target"] + "\n\n" if "target" in one else "")
        assert question.text == wanted
    forms = [
        "So the answer is {v}.",
        "the answer is {v}",
        "The answer is {v}.",
        "the answer is {v}. Q the answer is X.",
    ]
    responses, answers = generated([*forms, "Hm.\n\nSo the answer is {v}."], yes_or_no)
    ours = our_verdicts("bbh_3shot", responses, [{}] * NUMBER, answers)
    assert ours == harness_verdicts(settings_of["navigate"], "get-answer", responses, answers)
    assert 10 < sum(ours) < NUMBER - 10


def yes_or_no(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice(["Yes", "No", "(A)"])
    return draw.choice([answer, answer, answer.lower(), "Yes"]), answer


def test_mmlu() -> None:
    def values(draw: random.Random) -> tuple[str, str]:
        answer = draw.choice("ABCD")
        return draw.choice([answer, answer, answer.lower(), "E", "BA"]), answer

    forms = ["{v}", " {v}\nQuestion", "{v}.", "({v})", " {v} ", "{v}. because", "\n{v}", "Answer: {v}"]
    responses, answers = generated(forms, values)
    ours = our_verdicts("mmlu_continued", responses, [{}] * NUMBER, answers)
    theirs = harness_verdicts(settings("mmlu/generative/_default_template_yaml"), "get_response", responses, answers)
    assert ours == theirs
    assert 10 < sum(ours) < NUMBER - 10


@pytest.mark.parametrize("of", ["letters", "choices"])
def test_mmlu_by_likelihood(of: str, toy_model: Callable[..., Path]) -> None:
    """A real model in both: log-likelihoods, and what is right by them without and with the choices' lengths."""
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
        for _ in range(NUMBER)
    ]
    prompts = ["\n".join([doc["question"], *map("{}. {}".format, "ABCD", doc["choices"]), "Answer:"]) for doc in docs]
    questions = [
        Question(index=place, text=prompt, answers=["ABCD"[doc["answer"]]], group=None, choices=doc["choices"])
        for place, (doc, prompt) in enumerate(zip(docs, prompts, strict=True))
    ]
    tokenizer = load_tokenizer(str(folder))
    engine = EmbeddedEngine(setup_of(folder))
    engine.load_weights(iter(load_file(folder / "model.safetensors").items()), version=0)
    wanted = [(asked, [(0, 0)]) for asked in render_questions(task, questions, tokenizer)]

    shown = ["A", "B", "C", "D"] if of == "letters" else None
    harness = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=16)
    pairs = [(prompt, f" {one}") for prompt, doc in zip(prompts, docs, strict=True) for one in shown or doc["choices"]]
    told = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    scorer = ConfigurableTask.__new__(ConfigurableTask)
    scorer.OUTPUT_TYPE, scorer.prompt, scorer.features = "multiple_choice", None, ["answer", "choices"]
    scorer.multiple_input = scorer.multiple_target = 0
    scorer._metric_fn_list = {"acc": None, "acc_norm": None}
    scorer._config = TaskConfigOfHarness(doc_to_target="answer", doc_to_choice=shown or "{{choices}}")
    for normalize, metric in (("none", "acc"), ("characters", "acc_norm")):
        normalized = replace(task, likelihood=LikelihoodSection(of=of, normalize=normalize))
        found = list(choose_by_likelihood(engine, normalized, wanted))
        right = [one.text == one.rendered.question.answers[0] for one in found]
        theirs = [
            bool(scorer.process_results(doc, told[4 * place : 4 * place + 4])[metric]) for place, doc in enumerate(docs)
        ]
        assert right == theirs
        assert 10 < sum(right) < NUMBER - 10
        if normalize == "none":
            ours = [value for one in found for value in one.likelihoods]
            assert ours == pytest.approx([value for value, _ in told], abs=1e-4)


def test_math_differs_only_where_equal_answers_are_written_differently() -> None:
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
    for place in range(NUMBER):
        gold, other = draw.choice(pairs)
        kind = ("same", "other", "wrong")[place % 3]
        said = {"same": gold, "other": other, "wrong": "17"}[kind]
        responses.append(f"Steps.\nFinal Answer: The final answer is ${said}$. I hope it is correct.")
        answers.append(gold)
        kinds.append(kind)
    ours = our_verdicts("math", responses, [{}] * NUMBER, answers)
    for text, gold, kind, right in zip(responses, answers, kinds, ours, strict=True):
        theirs = harness_math.process_results({"solution": f"\\boxed{{{gold}}}"}, [text])["exact_match"]
        assert right == (kind != "wrong")
        if kind != "other":
            assert right == bool(theirs)
        same += right == bool(theirs)
    assert same >= 2 * NUMBER / 3


CODE = [
    "    return a + b + {i}\n", "    return a - b\n", "    raise ValueError\n", "    return a + b + {i} if a else 0\n",
    "    x = a\n    return x + b + {i}\n\ndef other():\n    return 1\n", "    return (a\n", "",
    "    import sys\n    sys.exit(0)\n",
]  # fmt: skip


def plainly(program: str) -> bool:
    """As the harness' metric does it: it passes when nothing is raised."""
    try:
        exec(program, {})
    except BaseException:
        return False
    return True


def test_humaneval() -> None:
    stops = settings("humaneval/humaneval.yaml")["generation_kwargs"]["until"]
    task = load_as(TaskConfig, TASKS / "humaneval_completion.yaml")
    assert task.sampling.stop == stops
    responses, rows, theirs = [], [], []
    for place in range(NUMBER):
        i = place // len(CODE)
        response = CODE[place % len(CODE)].replace("{i}", str(i))
        prompt, entry = f'def add(a, b):\n    """a + b + {i}"""\n', "add"
        test = f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n    assert candidate(0, 2) == {2 + i}\n"
        responses.append(response)
        rows.append({"prompt": prompt, "test": test, "entry_point": entry})
        theirs.append(plainly(f"{prompt}{truncate_at_stop(response, stops)[0]}\n{test}\ncheck({entry})"))
    ours = our_verdicts("humaneval_completion", responses, rows, [""] * NUMBER)
    assert ours == theirs
    assert 10 < sum(ours) < NUMBER - 10


def test_mbpp() -> None:
    stops = settings("mbpp/mbpp.yaml")["generation_kwargs"]["until"]
    assert load_as(TaskConfig, TASKS / "mbpp.yaml").sampling.stop == stops
    responses, rows, theirs = [], [], []
    for place in range(NUMBER):
        i = place // len(CODE)
        response = "def add(a, b):\n" + CODE[place % len(CODE)].replace("{i}", str(i)) + "[DONE]\nnonsense("
        tests = [f"assert add(1, 2) == {3 + i}", f"assert add(0, 2) == {2 + i}"]
        responses.append(response)
        rows.append({"test_list": tests, "test_setup_code": ""})
        theirs.append(plainly("\n".join([truncate_at_stop(response, stops)[0], *tests])))
    ours = our_verdicts("mbpp", responses, rows, [""] * NUMBER)
    assert ours == theirs
    assert 10 < sum(ours) < NUMBER - 10


def test_prompts_are_those_of_the_harness() -> None:
    """With its templates' variables written as columns."""
    for name, path in (("gsm8k_5shot", "gsm8k/gsm8k.yaml"), ("humaneval_completion", "humaneval/humaneval.yaml")):
        theirs = settings(path)["doc_to_text"].replace("{{", "{").replace("}}", "}")
        assert load_as(TaskConfig, TASKS / f"{name}.yaml").prompt == theirs
    task = load_as(TaskConfig, TASKS / "mbpp.yaml")
    theirs = settings("mbpp/mbpp.yaml")["doc_to_text"]
    lines = "\n".join(f"{{{{test_list[{place}]}}}}" for place in range(3))
    assert task.prompt == theirs.replace(lines, "{tests}").replace("{{text}}", "{text}")
    assert replace(task, chat=False) == task
