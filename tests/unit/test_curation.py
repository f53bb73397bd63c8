"""Curation: published schemas, licences, contamination, near duplicates, pass rates and output rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.curation import CurationConfig
from megatron_rl.config.data import RowsSection, SourceSection
from megatron_rl.config.load import load_as
from megatron_rl.curation.contamination import BenchmarkNgrams
from megatron_rl.curation.near_duplicates import near_duplicates
from megatron_rl.curation.pipeline import candidates
from megatron_rl.curation.rows import OUTPUTS, Solved, difficulty_of
from megatron_rl.data.adapters import to_problem
from megatron_rl.data.schemas import SCHEMAS, licence_of
from megatron_rl.data.sources import read_rows
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.answers import GradedAnswer
from megatron_rl.rewards.countdown import countdown
from megatron_rl.rewards.knights_and_knaves import knights_and_knaves
from megatron_rl.rewards.types import RewardInput
from tools.data import curate

ROOT = Path(__file__).parents[2]
TURNS = [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "so \\boxed{4}"}]
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "so \\boxed{4}"}]
PROMPT = [{"role": "user", "content": "2+2?"}]
# schema -> (a row with its public columns, prompt, answer, demonstration)
ROWS: dict[str, tuple[dict[str, Any], Any, str | None, str | None]] = {
    "openr1_math": (
        {"problem": "2+2?", "solution": "four", "answer": "4", "problem_type": "Algebra", "question_type": "math-word",
         "source": "olympiads", "uuid": "u", "is_reasoning_complete": [True, True], "generations": ["5", "4"],
         "correctness_math_verify": [False, True], "correctness_llama": None, "finish_reasons": ["stop", "stop"],
         "correctness_count": 1, "messages": MESSAGES},
        "2+2?", "4", "4",
    ),
    "openthoughts_metadata": (
        {"problem": "2+2?", "deepseek_reasoning": "hm", "deepseek_solution": "4", "ground_truth_solution": "\\boxed{4}",
         "domain": "math", "source": "numina", "test_cases": None, "starter_code": None},
        "2+2?", "4", "<think>hm</think>4",
    ),
    "conversations": (
        {"system": "be brief", "conversations": TURNS},
        [{"role": "system", "content": "be brief"}, *PROMPT], "4", "so \\boxed{4}",
    ),
    "messages": ({"messages": MESSAGES}, PROMPT, "4", "so \\boxed{4}"),
    "r1_distill_sft": (
        {"id": "1", "reannotated_assistant_content": "<think></think>4", "problem": "2+2?", "source": "x",
         "solution": "it is \\boxed{4}", "verified": True, "quality_metrics": None},
        "2+2?", "4", "<think></think>4",
    ),
    "gsm8k": ({"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "2+2?", "4", "2+2=<<2+2=4>>4"),
    "countdown": ({"target": 7, "nums": [3, 4]}, None, "7", None),
    "knights_and_knaves": (
        {"quiz": "Who?", "names": ["Ada", "Ben"], "knight_knave": {}, "solution": [True, False],
         "solution_text": "(1) Ada is a knight\n(2) Ben is a knave"},
        "Who?", "(1) Ada is a knight\n(2) Ben is a knave", None,
    ),
    "verl": (
        {"data_source": "x", "prompt": PROMPT, "ability": "math", "reward_model": {"style": "rule", "ground_truth": 4}},
        PROMPT, "4", None,
    ),
    "deepscaler": ({"problem": "2+2?", "answer": "4", "solution": "add"}, "2+2?", "4", "add"),
    "x_r1": ({"problem": "2+2?", "solution": "$4$"}, "2+2?", "4", None),
}  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_schema_has_a_row_here() -> None:
    assert set(ROWS) == set(SCHEMAS)


@pytest.mark.parametrize("schema", ROWS)
def test_rows_of_a_published_schema_are_read(schema: str, tmp_path: Path) -> None:
    row, prompt, answer, demonstration = ROWS[schema]
    path = write(tmp_path, [row])
    source = SourceSection(kind="jsonl", path=path, schema=schema, allow_noncommercial=True, demonstration_field=None)
    (parsed,) = read_rows(source)
    assert parsed["prompt"] == prompt if prompt is not None else "[3, 4]" in parsed["prompt"]
    assert (parsed["answer"], parsed["demonstration"]) == (answer, demonstration)
    assert parsed["licence"] == "unknown", "the licence of a local file is unknown"
    assert parsed["source"] == row.get("source", path)
    problem = to_problem(parsed, source, 0)
    assert problem.answer == answer
    broken = {key: value for key, value in row.items() if key in ("source", "system", "data_source", "id")}
    write(tmp_path, [broken or {"x": 1}])
    with pytest.raises(DataError, match="row 0 of"):
        read_rows(source)


def test_reasoning_beside_messages_is_put_into_the_demonstration(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": PROMPT, "reasoning": "hm", "answer": "\\boxed{4}"}])
    (row,) = read_rows(RowsSection(kind="jsonl", path=path, schema="messages"))
    assert (row["prompt"], row["answer"], row["demonstration"]) == (PROMPT, "4", "<think>hm</think>\\boxed{4}")


def test_a_schema_has_the_columns_that_its_reward_reads(tmp_path: Path) -> None:
    for schema, reward, response in (
        ("countdown", countdown, "<answer>4 + 3</answer>"),
        ("knights_and_knaves", knights_and_knaves, "<answer>Ada is a knight, Ben is a knave</answer>"),
    ):
        path = write(tmp_path, [ROWS[schema][0]])
        (row,) = read_rows(RowsSection(kind="jsonl", path=path, schema=schema, allow_noncommercial=True))
        sample = RewardInput(
            prompt="", response=response, answer=row["answer"], finish_reason="stop", num_tokens=1, seed=0, metadata=row
        )
        assert reward(sample) == 1


def test_non_commercial_licences_need_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path, [ROWS["r1_distill_sft"][0]])
    with pytest.raises(DataError, match=r"cc-by-nc-sa-4\.0.*allow_noncommercial=true"):
        read_rows(RowsSection(kind="jsonl", path=path, schema="r1_distill_sft"))
    # a known data set is rejected by its id alone, before any download
    with pytest.raises(DataError, match=r"K-and-K/knights-and-knaves has the licence cc-by-nc-sa-4\.0"):
        read_rows(RowsSection(kind="datasets", path="K-and-K/knights-and-knaves"))
    assert licence_of("openai/gsm8k") == "mit"
    with pytest.raises(DataError, match="schema='nothing' is unknown"):
        read_rows(RowsSection(kind="jsonl", path=path, schema="nothing"))


def test_a_shared_word_sequence_is_contamination() -> None:
    question = "A farmer has seven cows and buys three more cows at the market. How many?"
    benchmarks = BenchmarkNgrams({"farm": [question], "short": ["Two plus two?"]})
    assert benchmarks.find_shared("x " + question.upper() + " y") is not None
    assert benchmarks.find_shared("has seven, cows AND buys three more cows") == (
        "farm", "has seven cows and buys three more cows",
    )  # fmt: skip
    assert benchmarks.find_shared("has seven cows and buys three more goats") is None
    assert benchmarks.find_shared("two plus two") == ("short", "two plus two")
    assert benchmarks.find_shared("so two plus two") is None
    instruction = "Please answer in one word and think before you answer"
    with_instruction = BenchmarkNgrams({"x": [f"{instruction}: what is {i} and {i}?" for i in range(9)]})
    assert with_instruction.find_shared(f"{instruction} this") is None, (
        "an instruction that all questions share is no contamination"
    )
    assert with_instruction.find_shared("before you answer what is 3 and 3") is not None


def test_near_duplicates_equal_those_of_comparing_all_pairs() -> None:
    from rapidfuzz import fuzz

    bases = [
        f"Train number {i} leaves town {chr(65 + i)} at {i} o'clock with {7 * i} passengers, and loses {i * i} of them "
        f"at stop {3 * i}; how many passengers are left when it comes to {chr(90 - i)}?"
        for i in range(20)
    ]
    texts = []
    for i, base in enumerate(bases):
        texts += [base, base.upper() + " ", base.replace("passengers", "travellers", i % 2), base[:40] * 3]
    duplicates = near_duplicates(texts, 95.0)
    kept: list[int] = []
    for index, text in enumerate(texts):
        normalized = " ".join(text.lower().split())
        duplicate_of = next(
            (one for one in kept if fuzz.ratio(normalized, " ".join(texts[one].lower().split())) >= 95), None
        )
        assert duplicates[index] == duplicate_of, (text, texts[duplicate_of or 0])
        if duplicate_of is None:
            kept.append(index)
    assert 20 < len(kept) < 80
    assert near_duplicates(["", "", "a"], 95.0) == [None, 0, None]


def graded_answer(sample: int, text: str, *, right: bool, tokens: int) -> GradedAnswer:
    return GradedAnswer(
        task="t", question=0, sample=sample, seed=0, response=text, num_tokens=tokens, finish_reason="stop",
        right=right, status="ok", message="", shown=None, asked="",
    )  # fmt: skip


def test_output_rows_can_be_read_by_their_schema(tmp_path: Path) -> None:
    answers = [
        graded_answer(0, "wrong", right=False, tokens=1), graded_answer(1, "long \\boxed{4}", right=True, tokens=9),
        graded_answer(2, "\\boxed{4}", right=True, tokens=3), graded_answer(3, "no", right=False, tokens=2),
    ]  # fmt: skip
    row = {"prompt": "2+2?", "answer": "4", "source": "here", "prompt_text": "2+2?", "nums": [2, 2]}
    solved = Solved.of(row, answers, {"easy": 0.7, "medium": 0.3, "hard": 0.0})
    assert (solved.pass_rate, solved.difficulty) == (0.5, "medium")
    written = {name: json.loads(json.dumps(output(solved))) for name, output in OUTPUTS.items()}
    assert set(ROWS["openr1_math"][0]) <= set(written["openr1_math"])
    for schema in ("openr1_math", "conversations"):
        (parsed,) = read_rows(RowsSection(kind="jsonl", path=write(tmp_path, [written[schema]]), schema=schema))
        assert parsed["answer"] == "4"
        assert parsed["demonstration"] == ("long \\boxed{4}" if schema == "openr1_math" else "\\boxed{4}")
    assert written["problems"]["nums"] == [2, 2]
    assert written["problems"]["pass_rate"] == 0.5
    assert written["openr1_math"]["messages"][-1]["content"] == "\\boxed{4}", "the shortest right response"


@pytest.mark.parametrize(("rate", "label"), [(0.0, "hard"), (0.29, "hard"), (0.3, "medium"), (1.0, "easy")])
def test_difficulty_is_the_label_with_the_largest_bound(rate: float, label: str) -> None:
    assert difficulty_of(rate, {"easy": 0.7, "medium": 0.3, "hard": 0.0}) == label


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["near_duplicates=0"], "near_duplicates=0"),
        (["difficulty={a: 0.5}"], r"difficulty=.*one of them 0\.0"),
        (["difficulty={a: 0.0, b: 0.0}"], "difficulty=.*different"),
        (["pass_rate.above=0.8", "pass_rate.below=0.2"], r"pass_rate\.below=0\.2"),
        (["output.schema=conversations", "generate=null"], r"output\.schema=.?conversations"),
    ],
)
def test_invalid_configurations_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_as(CurationConfig, ROOT / "configs/curation/quickstart.yaml", overrides)


SUITE = """
run: {{name: toy, output_dir: {folder}/out}}
data: {{kind: jsonl, path: {folder}/rows.jsonl}}
contamination: {{tasks: [{tasks}/hasty_addition.yaml], data: {{hasty_addition: {folder}/test.jsonl}}}}
near_duplicates: 95
generate:
  model: {{path: {model}, dtype: fp32}}
  chat: false
  sampling: {{num_samples: 8, temperature: 1.0, max_new_tokens: 3}}
  scorer: {{name: "tests.own_rewards:begins_with_a_digit"}}
"""


def test_the_command_drops_unsuitable_problems_and_reuses_responses(toy_model: Any, tmp_path: Path) -> None:
    """Drop unsuitable problems, and filter the others by the pass rates of a random model.

    The rows include one problem without an answer, one contaminated problem and two duplicates.
    """
    rows = [{"prompt": f"{i}+{i * i}+{7 * i}=", "answer": str(i)} for i in range(11, 59)]
    rows += [{"prompt": prompt, "answer": "1"} for prompt in ("99+1=", " 11+121+77=", "12+144+84=")]
    rows += [{"prompt": "what is this?", "answer": None}]
    write(tmp_path, rows)
    write(tmp_path, [{"prompt": "99+1=", "answer": "100"}], "test")
    config = tmp_path / "curate.yaml"
    config.write_text(
        SUITE.format(folder=tmp_path, tasks=ROOT / "configs/eval/tasks", model=toy_model("qwen2", tied=False))
    )
    assert curate.main(["--config", str(config)]) == 0
    kept = [json.loads(line) for line in (tmp_path / "out/curated.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    stages = [one["stage"] for one in dropped]
    assert [stages.count(stage) for stage in ("no answer", "contamination", "near duplicate")] == [1, 1, 2]
    assert len(kept) + len(dropped) == len(rows)
    assert kept
    assert all(0 < row["pass_rate"] < 1 and row["num_samples"] == 8 for row in kept)
    answers_file = tmp_path / "out/generated/answers/problems.0.jsonl"
    answers = [json.loads(line) for line in answers_file.read_text().splitlines()]
    assert len(answers) == 8 * 48
    counts = {index: sum(one["right"] for one in answers if one["question"] == index) for index in range(48)}
    expected = {row["prompt"]: counts[index] / 8 for index, row in enumerate(rows[:48]) if 0 < counts[index] < 8}
    assert {row["prompt"]: row["pass_rate"] for row in kept} == expected
    assert stages.count("pass rate") == 48 - len(expected)
    with pytest.raises(ConfigError, match=r"contamination\.data\.gsm8k: contamination\.tasks has no such task"):
        candidates(load_as(CurationConfig, config, ["contamination.data={gsm8k: x}"]), tmp_path)
    every_problem = write(tmp_path, rows[:48], "all")
    overrides = [f"contamination.data={{hasty_addition: {every_problem}}}", "data.limit=48"]
    nothing_left = load_as(CurationConfig, config, overrides)
    with pytest.raises(DataError, match=r"all 48 problems of .* were dropped.*contamination"):
        candidates(nothing_left, tmp_path)
    # a second run with another range of pass rates reuses all responses
    assert curate.main(["--config", str(config), "pass_rate.below=0.5"]) == 0
    again = [json.loads(line) for line in (tmp_path / "out/curated.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in again} == {prompt for prompt, rate in expected.items() if rate < 0.5}
    assert len(answers_file.read_text().splitlines()) == 8 * 48
