"""Benchmarks: questions, grading, scores, saved answers and comparisons."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.evaluation import EvalConfig, EvalRunSection, GradingSection, TaskConfig, TaskSamplingSection
from megatron_rl.config.load import load_as
from megatron_rl.config.schema import ModelSection
from megatron_rl.errors import ConfigError, DataError, RewardError
from megatron_rl.evaluation.answers import AnswerFile, GradedAnswer, by_question, read_answers
from megatron_rl.evaluation.backends import suffix_logprobs
from megatron_rl.evaluation.benchmark import Benchmark
from megatron_rl.evaluation.compare import comparison_table, read_all_finished
from megatron_rl.evaluation.folder import EvalFolder, read_results
from megatron_rl.evaluation.generation import RenderedQuestion, Response, truncate_at_stop
from megatron_rl.evaluation.grading import Grader
from megatron_rl.evaluation.majority_vote import majority
from megatron_rl.evaluation.questions import Question, fill_template, read_questions
from megatron_rl.evaluation.report_html import render
from megatron_rl.evaluation.results import TaskResult, task_result
from megatron_rl.evaluation.runner import missing_samples
from megatron_rl.reporting.stats import bootstrap_interval, paired_difference, pass_at_k, repetition, standard_error
from megatron_rl.rewards.math import math_answer
from megatron_rl.rewards.math_graders import math_qwen, math_sympy
from megatron_rl.rewards.types import RewardInput
from tests.limits import with_long_timeout
from tools.analysis import compare_evals

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "configs" / "eval" / "tasks"
NUM_ROWS = 20


def boxed(text: str) -> str:
    return f"So it is \\boxed{{{text}}}."


def code_row(i: int) -> dict[str, Any]:
    return {
        "task_id": f"t/{i}",
        "prompt": f'def add_{i}(a, b):\n    """a + b + {i}"""\n',
        "canonical_solution": f"    return a + b + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n",
        "entry_point": f"add_{i}",
    }


def mbpp_row(i: int) -> dict[str, Any]:
    return {
        "task_id": i,
        "text": f"Write a function that adds {i}.",
        "prompt": f"Write a function that adds {i}.",
        "code": f"def f(x):\n    return x + {i}",
        "test_list": [f"assert f(1) == {1 + i}", f"assert f(-1) == {i - 1}"],
        "test_setup_code": "",
        "test_imports": [],
    }


def choice_row(i: int) -> dict[str, Any]:
    return {
        "question": f"Which is {i}?", "subject": "odd" if i % 2 else "even",
        "choices": [str(i + shift - i % 4) for shift in range(4)], "answer": i % 4,
    }  # fmt: skip


# task -> functions from i to row i, to a right response and to a wrong response
FIXTURES: dict[str, tuple[Callable[[int], dict[str, Any]], Callable[[int], str], Callable[[int], str]]] = {
    "gsm8k": (
        lambda i: {"question": f"{i} and {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i:,}"},
        lambda i: boxed(f"{2 * i:,}"),
        lambda i: boxed(str(2 * i + 1)),
    ),
    "gsm8k_5shot": (
        lambda i: {"question": f"{i} and {i}?", "answer": f"It is\n#### {2 * i + 1000:,}"},
        lambda i: f"They are ${2 * i + 1000:,}.",
        lambda i: f"{2 * i + 1000}, no, 7",
    ),
    "gsm8k_5shot_strict": (
        lambda i: {"question": f"{i} and {i}?", "answer": f"It is\n#### {2 * i + 1000:,}"},
        lambda i: f"They are\n#### {2 * i + 1000}\n#### 3",
        lambda i: f"They are {2 * i + 1000}",
    ),
    "math": (
        lambda i: {"problem": f"What is {i}/7?", "solution": boxed(f"\\frac{{{i}}}{{7}}"), "level": f"Level {i % 5}",
                   "type": "Algebra", "subset": "algebra"},
        lambda i: boxed(f"{i}/7"),
        lambda i: boxed(f"{i + 1}/7"),
    ),
    "math500": (
        lambda i: {"problem": "?", "solution": "", "answer": f"{i}\\sqrt{{2}}", "level": i % 5 + 1},
        lambda i: boxed(f"{i}\\sqrt2"),
        lambda i: boxed(f"{i}.5"),
    ),
    "aime24": (
        lambda i: {"problem": "?", "answer": f"{i:03d}", "year": "2024"},
        lambda i: boxed(str(i)),
        lambda i: f"The answer is {i}, nearly. {boxed(str(i + 1))}",
    ),
    "aime25": (lambda i: {"problem": "?", "answer": str(i)}, lambda i: boxed(str(i)), lambda i: boxed(str(-i - 1))),
    "amc23": (
        lambda i: {"question": "?", "answer": float(i)}, lambda i: boxed(str(i)), lambda i: boxed(f"{i}.25"),
    ),
    "amc_validation": (
        lambda i: {"problem": "?", "answer": float(i), "url": ""}, lambda i: boxed(str(i)), lambda i: boxed(f"{i}.25"),
    ),
    "minerva_math": (
        lambda i: {"question": "?", "answer": f"{i}.5"}, lambda i: boxed(f"{i}.50"), lambda i: boxed(f"{i}.6"),
    ),
    "olympiadbench": (
        lambda i: {"question": "?", "final_answer": [f"${i}$", f"${i + 100}$"], "subfield": "Algebra"},
        lambda i: boxed(str(i + 100 * (i % 2))),
        lambda i: boxed(str(i + 50)),
    ),
    "humaneval": (
        code_row,
        lambda i: f"Here:\n```python\ndef add_{i}(a, b):\n    return {i} + b + a\n```\n",
        lambda i: f"```python\ndef add_{i}(a, b):\n    return a + b + {i + 1}\n```",
    ),
    "humaneval_completion": (code_row, lambda i: f"    return {i} + b + a\n", lambda i: "    return None\n"),
    "mbpp": (mbpp_row, lambda i: f"f = lambda x: {i} + x\n", lambda i: f"def f(x):\n    return {i + 1}\n"),
    "mbpp_sanitized": (mbpp_row, lambda i: f"f = lambda x: {i} + x\n", lambda i: "import os; os._exit(0)\n"),
    "mmlu": (
        choice_row, lambda i: f"answer: C?\nAnswer: {'ABCD'[i % 4]}", lambda i: f"Answer: {'BCDA'[i % 4]}",
    ),
    "mmlu_likelihood": (choice_row, lambda i: "ABCD"[i % 4], lambda i: "BCDA"[i % 4]),
    "mmlu_continued": (choice_row, lambda i: f" {'ABCD'[i % 4]}", lambda i: f" {'BCDA'[i % 4]}"),
    "gpqa_diamond": (
        lambda i: {"Question": f"{i}?", "Correct Answer": f"yes {i}", "High-level domain": "Physics",
                   **{f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}},
        lambda i: "{right}",
        lambda i: "I do not know.",
    ),
    "bbh": (
        lambda i: {"input": f"{i}?", "target": f"({'ABC'[i % 3]})", "subset": ("navigate", "snarks")[i % 2]},
        lambda i: f"Well. So the answer is ({'ABC'[i % 3]}).",
        lambda i: f"So the answer is ({'BCA'[i % 3]}).",
    ),
    "bbh_3shot": (
        lambda i: {"input": f"{i}?", "target": f"({'ABC'[i % 3]})", "subset": ("navigate", "snarks")[i % 2],
                   "description": "About.", "worked": "So the answer is (A)."},
        lambda i: f"Well. So the answer is ({'ABC'[i % 3]}).",
        lambda i: f"So the answer is ({'BCA'[i % 3]}).",
    ),
    "hasty_addition": (
        lambda i: {"prompt": f"{i}+{i}=", "answer": str(2 * i)}, lambda i: f"00,00>{2 * i}", lambda i: "1",
    ),
    "hasty_chain": (
        lambda i: {"prompt": f"{i}+{i}+1=", "answer": str(2 * i + 1)}, lambda i: f"x={2 * i + 1}", lambda i: "x=0",
    ),
    "countdown": (
        lambda i: {"prompt": "?", "demonstration": f"{i} + 1", "nums": [i, 1], "target": i + 1},
        lambda i: f"<think></think> <answer>1 + {i}</answer>",
        lambda i: f"<answer>{i} - 1</answer>",
    ),
    "arithmetic": (
        lambda i: {"prompt": "?", "answer": str(7 - 1000 * i)},
        lambda i: f"<answer> {7 - 1000 * i:,} </answer>",
        lambda i: f"<answer>{1000 * i - 7}</answer>",
    ),
    "multiplication": (
        lambda i: {"prompt": "?", "answer": str(1000 * i)},
        lambda i: f"<answer> {1000 * i:,} </answer>",
        lambda i: f"<answer>{1000 * i}.0</answer>",
    ),
    "knights_and_knaves": (
        lambda i: {"prompt": "?", "answer": "(1) Ada is a knight\n(2) Ben is a knave",
                   "roles": {"Ada": "knight", "Ben": "knave"}},
        lambda i: "<answer>(1) Ben is a knave, and (2) Ada is a KNIGHT</answer>",
        lambda i: ("<answer>Ada is a knight</answer>",
                   "<answer>Ada is a knight, Ben is a knave, Eve is a knave</answer>",
                   "Ada is a knight, Ben is a knave", "<answer>Ada is a knave, Ben is a knave</answer>")[i % 4],
    ),
}  # fmt: skip


def is_right(question: int, sample: int) -> bool:
    """Return whether a scripted response is right: of the four samples of question i, the first i % 5 are."""
    return sample < question % 5


@pytest.fixture
def start_grader() -> Iterator[Callable[[TaskConfig], Grader]]:
    started: list[Grader] = []

    def start(task: TaskConfig) -> Grader:
        started.append(Grader(GradingSection(timeout_s=60), [task]))
        return started[-1]

    yield start
    for one in started:
        one.close()


def fixture_task(name: str, folder: Path) -> TaskConfig:
    """Return the task with NUM_ROWS generated rows in the schema of its public data set."""
    task = with_long_timeout(load_as(TaskConfig, TASKS / f"{name}.yaml"))
    rows = [FIXTURES[name][0](i) for i in range(1, NUM_ROWS + 1)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"kind": "jsonl", "path": str(path), "name": None}
    shots = task.few_shot and replace(task.few_shot, rows=replace(task.few_shot.rows, **local))
    return replace(
        task,
        likelihood=None,  # the scripted responses are letters
        data=replace(task.data, **local, limit=None),
        few_shot=shots,
        sampling=replace(task.sampling, num_samples=4),
        pass_at=[1, 2, 4],
    )


def test_every_task_has_a_fixture() -> None:
    assert sorted(FIXTURES) == sorted(path.stem for path in TASKS.glob("*.yaml"))


@pytest.mark.parametrize("name", FIXTURES)
def test_scripted_responses_get_the_expected_scores(
    name: str, start_grader: Callable[[TaskConfig], Grader], tmp_path: Path
) -> None:
    task = fixture_task(name, tmp_path)
    questions, grader = read_questions(task), start_grader(task)
    assert len(questions) == NUM_ROWS
    assert grader.misgraded_references(task, questions) == []
    _, right, wrong = FIXTURES[name]
    pending = []
    for question in questions:
        number = question.index + 1 if not name.startswith("bbh") else int(question.row["input"][:-1])
        for sample in range(4):
            text = (right if is_right(number, sample) else wrong)(number)
            text = text.replace("{right}", f"Answer: {question.row.get('letter')}")
            rendered = RenderedQuestion(question=question, prompt=question.text, token_ids=[1])
            response = Response(
                rendered=rendered, sample=sample, seed=0, text=text, num_tokens=10 + sample, finish_reason="stop"
            )
            pending.append((number, response, grader.submit(task, response)))
    answers = []
    for number, response, submitted in pending:
        answer = grader.collect(task, response, submitted)
        assert answer.status == "ok", answer.message
        assert answer.right == is_right(number, answer.sample), (number, answer)
        answers.append(answer)
    grouped = by_question(answers)
    clusters = {q.index: grader.cluster_answers(task, q, grouped[q.index]) for q in questions} if task.majority else {}
    result = task_result(task, grouped, clusters, {q.index: q.group for q in questions}, [])
    counts = [i % 5 for i in range(1, NUM_ROWS + 1)]
    assert result.scores["avg@4"] == pytest.approx(sum(counts) / 4 / NUM_ROWS)
    for k in (1, 2, 4):
        expected_pass = [any_right(count, k) for count in counts]
        assert result.scores[f"pass@{k}"] == pytest.approx(sum(expected_pass) / NUM_ROWS)
    if task.majority:
        # the wrong responses to a question have the same answer, or none; a tie goes to the first, which is right
        expected = [
            sum(one.right for one in samples) >= (1 if all(one.right or one.shown is None for one in samples) else 2)
            for samples in grouped.values()
        ]
        assert result.scores["maj@4"] == pytest.approx(sum(expected) / NUM_ROWS)
    assert result.scores["grading_failed"] == 0


def any_right(num_right: int, k: int) -> float:
    """Return pass@k of four samples, of which the first `num_right` are right, by enumerating all choices of k."""
    choices = list(combinations(range(4), k))
    return sum(any(sample < num_right for sample in choice) for choice in choices) / len(choices)


# answer, reference answer, and whether math_sympy, math and math_qwen accept it
DISAGREEMENTS = [
    ("42.0", "42", "111"),
    ("1/2", r"\frac12", "111"),
    ("0.5", r"\frac12", "111"),
    ("1,234", "1234", "111"),
    ("x=5", "5", "111"),
    (r"\$5", "5", "111"),
    (r"5^\circ", "5", "111"),
    (r"50\%", "50", "111"),
    ("x^2+2x+1", "(x+1)^2", "111"),
    (r"\sqrt{8}", r"2\sqrt{2}", "111"),
    ("142", "142.0", "111"),
    (r"\frac{2}{4}", r"\frac12", "011"),
    ("0.5", "50", "001"),
    ("50", "0.5", "001"),
    ("3.1416", r"\pi", "001"),
    ("[0,1]", "[0,1)", "001"),
    (r"\{1,2\}", r"\{2,1\}", "011"),
    ("10^{3}", "1000", "011"),
    (r"5\text{ cm}", "5", "110"),
    ("(2,1)", "(1,2)", "000"),
    ("0.333", "1/3", "000"),
]


@pytest.mark.parametrize(("given", "answer", "expected"), DISAGREEMENTS)
def test_graders_disagree_as_published(given: str, answer: str, expected: str) -> None:
    sample = RewardInput(prompt="", response=boxed(given), answer=answer, finish_reason="stop", num_tokens=1, seed=0)
    assert "".join(str(int(grader(sample))) for grader in (math_sympy, math_answer, math_qwen)) == expected


def test_the_grades_of_a_task_depend_on_its_grader(
    start_grader: Callable[[TaskConfig], Grader], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n" for _, answer, _ in DISAGREEMENTS))
    task = load_as(TaskConfig, TASKS / "math500.yaml")
    task = replace(task, data=replace(task.data, kind="jsonl", path=str(path)), group_field=None)
    for column, name in enumerate(("math_sympy", "math", "math_qwen")):
        graded = replace(task, scorer=replace(task.scorer, name=name))
        grader, grades = start_grader(graded), []
        for question, (given, _, _) in zip(read_questions(graded), DISAGREEMENTS, strict=True):
            rendered = RenderedQuestion(question=question, prompt="", token_ids=[1])
            response = Response(
                rendered=rendered, sample=0, seed=0, text=boxed(given), num_tokens=1, finish_reason="stop"
            )
            grades.append(grader.collect(graded, response, grader.submit(graded, response)).right)
        assert grades == [expected[column] == "1" for *_, expected in DISAGREEMENTS]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<s>", "Q", ":", " A", "!"], [3]),  # with a start token and a generated token
        (["Q", ":", "A"], [2]),  # decoded without white space, no generated token
        (["Q", ":", " ", "A", "!"], [2, 3]),
        (["Q", ": A", "!"], [1]),
        (["\ufffd", ":", " A", ""], [2]),
    ],
)
def test_suffix_logprobs_are_those_of_the_tokens_of_a_choice(tokens: list[str], expected: list[int]) -> None:
    assert suffix_logprobs(" A", tokens, [None, *map(float, range(1, len(tokens)))]) == expected


def test_a_choice_that_is_not_at_the_end_is_rejected() -> None:
    with pytest.raises(ValueError, match="do not end with ' B'"):
        suffix_logprobs(" B", ["Q", ":", " A", "!"], [None, 1.0, 2.0, 3.0])


def test_pass_at_k_has_published_values() -> None:
    values = [pass_at_k(8, 2, 1), pass_at_k(8, 2, 4), pass_at_k(8, 2, 8), pass_at_k(16, 1, 8), pass_at_k(8, 0, 4)]
    assert values == pytest.approx([0.25, 0.785714, 1, 0.5, 0], abs=1e-6)


def test_standard_errors_and_intervals_have_the_expected_values() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert standard_error(values) == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
    assert paired_difference([0, 0, 1, 1], [1, 0, 1, 1]) == (0.25, 0.25)
    assert math.isnan(standard_error([1.0]))


def test_the_majority_is_the_largest_cluster_or_the_first_of_a_tie() -> None:
    assert majority([None, 1, 2, 1, 2]) == 1
    assert majority([2, 1, 1]) == 1
    assert majority([None, None]) is None


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    assert repetition("abcdefghijklmnopqrstuvwxyz", 5) == 0
    assert repetition("ab" * 50, 5) == pytest.approx(1 - 2 / 96)
    assert repetition("ab", 5) == 0


def test_equal_wrong_answers_vote_together(start_grader: Callable[[TaskConfig], Grader], tmp_path: Path) -> None:
    task = fixture_task("math500", tmp_path)
    grader = start_grader(task)
    question = Question(index=0, text="?", answers=["7"], group=None)
    responses = [boxed("1/2"), boxed("7"), boxed("0.5"), "nothing", boxed(r"\frac{1}{2}"), boxed("7.0")]
    answers = [
        graded_answer(
            0, sample, response=text, right=sample in (1, 5), shown=text[len("So it is \\boxed{") : -2] or None
        )
        for sample, text in enumerate(responses)
    ]
    answers[3] = replace(answers[3], shown=None)
    assert grader.cluster_answers(task, question, answers) == [0, 1, 0, None, 0, 1]


def graded_answer(question: int, sample: int, **fields: Any) -> GradedAnswer:
    values = {"response": "r", "right": False, "shown": None, "asked": "d", **fields}
    return GradedAnswer(
        task="t", question=question, sample=sample, seed=1, num_tokens=3, finish_reason="stop", status="ok", message="",
        **values,
    )  # fmt: skip


def test_a_truncated_last_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "t.0.jsonl"
    file = AnswerFile(path)
    for sample in range(3):
        file.write(graded_answer(0, sample, response="ä\nb"))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert sorted(read_answers(tmp_path)) == [("t", 0, 0, "d"), ("t", 0, 1, "d")]
    again = AnswerFile(path)
    again.write(graded_answer(0, 2, response="ä\nb"))
    again.close()
    assert path.read_bytes() == whole
    path.write_bytes(b"x" + whole)
    with pytest.raises(DataError, match=r"t\.0\.jsonl:1 is damaged"):
        read_answers(tmp_path)


def test_a_saved_answer_counts_only_for_its_prompt_and_if_graded(tmp_path: Path) -> None:
    task = fixture_task("math500", tmp_path)
    first, second = (Question(index=0, text="?", answers=[gold], group=None) for gold in ("1", "2"))
    rendered = [RenderedQuestion(question=one, prompt="?", token_ids=[1]) for one in (first, second)]
    assert rendered[0].digest != rendered[1].digest
    file = AnswerFile(tmp_path / "answers/math500.0.jsonl")
    benchmark = Benchmark(replace(task, sampling=replace(task.sampling, num_samples=2)), [first], [rendered[0]], [])
    for sample, digest, status in ((0, rendered[0].digest, "ok"), (1, rendered[1].digest, "ok")):
        file.write(replace(graded_answer(0, sample, asked=digest), task="math500", status=status))
    ((_, samples),) = missing_samples(benchmark, 0, read_answers(tmp_path / "answers"), 0, 1)
    assert [sample for sample, _ in samples] == [1], "the second answer belongs to another prompt"
    file.write(replace(graded_answer(0, 1, asked=rendered[0].digest), task="math500", status="reward_error"))
    ((_, samples),) = missing_samples(benchmark, 0, read_answers(tmp_path / "answers"), 0, 1)
    assert [sample for sample, _ in samples] == [1], "the grading of the second answer failed"
    file.write(replace(graded_answer(0, 1, asked=rendered[0].digest, right=True), task="math500"))
    file.close()
    assert missing_samples(benchmark, 0, read_answers(tmp_path / "answers"), 0, 1) == []
    assert read_answers(tmp_path / "answers")["math500", 0, 1, rendered[0].digest].right


def test_a_scorer_that_fails_on_every_reference_answer_raises(
    start_grader: Callable[[TaskConfig], Grader], tmp_path: Path
) -> None:
    task = fixture_task("humaneval", tmp_path)
    broken = replace(task, scorer=replace(task.scorer, options={"style": "mbpp"}))
    with pytest.raises(RewardError, match=r"fails on every reference answer: .*no column 'test_list'"):
        start_grader(broken).misgraded_references(broken, read_questions(broken))


def test_a_folder_rejects_another_evaluation(tmp_path: Path) -> None:
    task = fixture_task("math500", tmp_path)
    config = EvalConfig(
        run=EvalRunSection(name="x", output_dir=str(tmp_path / "out")), model=ModelSection(path="m"), tasks=["t"]
    )
    folder = EvalFolder(tmp_path / "out")
    folder.prepare(config, [task], "f1")
    folder.prepare(replace(config, limit=3), [replace(task, majority=False), fixture_task("aime24", tmp_path)], "f1")
    for changed, fingerprint, message in (
        (task, "f2", "the model's fingerprint"),
        (replace(task, prompt="{problem}"), "f1", r"tasks\.math500\.prompt"),
    ):
        with pytest.raises(ConfigError, match=f"another evaluation: {message} differ"):
            folder.prepare(config, [changed], fingerprint)
    result = TaskResult(task="math500", version=1, num_questions=2, num_samples=1, scores={"a": 0.5, "b": math.nan})
    folder.write_results(config, [], [], model="f1", versions={})
    assert result.as_json()["scores"] == {"a": 0.5, "b": None}
    assert read_results(tmp_path / "out")["fingerprint"] == "f1"
    with pytest.raises(DataError, match="Give the folder of a finished evaluation"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({"prompt": "{nothing}"}, {}, "column 'nothing' is missing"),
        ({"answer_pattern": "#### (.*)"}, {}, "does not match answer_pattern"),
        ({"answer_in_box": True}, {}, r"has no \\boxed"),
        ({"group_field": "kind"}, {}, "column 'kind' is missing"),
        (
            {"choices_field": "choices", "answer_field": "place"},
            {"choices": ["a"], "place": 1},
            "place=1: expected .* 0 to 0",
        ),
        ({"subsets": ["a"]}, {"subset": "b"}, "'b', which is none of the task's subsets"),
    ],
)
def test_invalid_rows_are_rejected(changes: dict[str, Any], row: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = replace(fixture_task("math500", tmp_path), group_field=None)
    (tmp_path / "one.jsonl").write_text(json.dumps({"problem": "?", "answer": "1", **row}))
    task = replace(task, data=replace(task.data, path=str(tmp_path / "one.jsonl")), **changes)
    with pytest.raises(DataError, match=message):
        read_questions(task)


def test_templates_fill_columns_and_keep_other_braces() -> None:
    filled = fill_template(r"{a} {Two Words} \boxed{} {ANSWER}", {"a": "{b}", "Two Words": 2}, "")
    assert filled == r"{b} 2 \boxed{} {ANSWER}"


def test_a_response_is_truncated_before_a_stop_string() -> None:
    assert truncate_at_stop("a\nQ: b [DONE]", ["[DONE]", "\nQ:"]) == ("a", True)
    assert truncate_at_stop("a", ["b"]) == ("a", False)


def test_few_shot_examples_match_the_question(tmp_path: Path) -> None:
    task = fixture_task("mmlu", tmp_path)
    shots = load_as(TaskConfig, TASKS / "gsm8k_5shot.yaml").few_shot
    assert shots is not None
    section = replace(shots, count=2, same="subject", template="{question} {letter}\n", rows=task.data)
    texts = [question.text for question in read_questions(replace(task, few_shot=section, prompt="{question}"))]
    assert texts[0] == "Which is 1? B\nWhich is 3? D\nWhich is 1?"
    assert texts[1] == "Which is 2? C\nWhich is 4? A\nWhich is 2?"
    with pytest.raises(DataError, match=r"few_shot\.count=11, but only 10 examples match"):
        read_questions(replace(task, few_shot=replace(section, count=11)))


def finished_run(folder: Path, rights: list[bool], *, prompt: str = "{problem}") -> Path:
    """Write a finished evaluation, in which the response to question i is right if `rights[i]`; return its folder."""
    folder.mkdir()
    task = replace(fixture_task("math500", folder), prompt=prompt, sampling=TaskSamplingSection())
    rows = Path(str(task.data.path))
    shared = folder.parent / "rows.jsonl"
    shared.write_text(rows.read_text())
    task = replace(task, data=replace(task.data, path=str(shared)))
    out = EvalFolder(folder / "out")
    config = EvalConfig(
        run=EvalRunSection(name="x", output_dir=str(out.path)), model=ModelSection(path=folder.name), tasks=["t"]
    )
    out.prepare(config, [task], "mark")
    file = AnswerFile(out.answers_of(task.name, 0))
    answers = [
        replace(graded_answer(i, 0, right=right, shown="1", response=boxed("<b>1</b>")), task=task.name)
        for i, right in enumerate(rights)
    ]
    for one in answers:
        file.write(one)
    file.close()
    questions = read_questions(task)
    result = task_result(task, by_question(answers), {}, {q.index: q.group for q in questions}, ["a note"])
    results = out.write_results(config, [task], [result], model="mark", versions={"torch": "2"})
    rendered = [
        RenderedQuestion(question=question, prompt=f"<s>{question.text}", token_ids=[1]) for question in questions
    ]
    page = render(results, {task.name: rendered}, {task.name: by_question(answers)})
    assert page.count("<svg") == 2, "one plot by length, one by level"
    assert "&lt;s&gt;" in page, "prompts and responses are escaped"
    assert "<b>1</b>" not in page
    assert "a note" in page
    return out.path


def test_models_are_compared_on_the_same_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished_run(tmp_path / "before", [i < 8 for i in range(NUM_ROWS)])
    after = finished_run(tmp_path / "after", [4 <= i < 18 for i in range(NUM_ROWS)])
    assert compare_evals.main([str(before), str(after)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    changes = [-1.0] * 4 + [0.0] * 4 + [1.0] * 10 + [0.0] * 2
    error = standard_error(changes)
    assert f"| math500 | 20 | 40.0% | 70.0% | +30.0% ± {error:.1%} | 4 / 4 / 10 / 2 |" in line.replace(" *", "")
    assert (" *" in line) == (1.96 * error < 0.3)
    other = finished_run(tmp_path / "other", [True] * NUM_ROWS, prompt="Please: {problem}")
    with pytest.raises(DataError, match="cannot be compared, because prompt differ"):
        comparison_table(read_all_finished([before, other]))
