"""Data sources, adapters, chat templates, generated tasks and the order of prompts."""

import json
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.data import DataSection, SourceSection
from megatron_rl.data.generated import TASKS
from megatron_rl.data.order import Order
from megatron_rl.data.prompts import load_prompts
from megatron_rl.data.sources import read_rows
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import DataError
from megatron_rl.rewards.arithmetic import evaluate

GSM8K = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "It is\n#### 1,001"},
]


@pytest.fixture
def tokenizer(toy_model: Callable[..., Path]) -> Any:
    return load_tokenizer(str(toy_model()))


def test_a_custom_tokenizer_is_not_replaced_by_that_of_the_family(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("1 +Z")["input_ids"]) == ["1", " ", "+", "<unk>"]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> SourceSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSection(kind="jsonl", path=str(path))


def section(source: SourceSection, **options: Any) -> DataSection:
    return DataSection(train=source, **options)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_gsm8k_columns_are_read_from_local_files(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    data = datasets.Dataset.from_list(GSM8K)
    path = tmp_path / f"gsm8k.{kind}"
    if kind == "jsonl":
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        datasets.DatasetDict({"train": data}).save_to_disk(path)
    source = SourceSection(kind=kind, path=str(path), prompt_field="question", answer_pattern=r"#### (.*)")
    prompts = load_prompts(source, section(source), tokenizer).prompts
    assert [p.answer for p in prompts] == ["4", "1,001"]
    assert prompts[0].text == "Two and two?"
    assert tokenizer.decode(prompts[0].token_ids) == "<unk>wo and two?"


def test_datasets_reads_a_folder_of_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    assert read_rows(SourceSection(kind="datasets", path=str(tmp_path))) == [{"prompt": "a", "answer": "b"}]


def custom_source(source: SourceSection) -> list[dict[str, str]]:
    return [{"prompt": source.options["word"], "answer": "x"}]


def test_a_custom_source_is_loaded_by_name() -> None:
    source = SourceSection(kind="tests.unit.test_data:custom_source", options={"word": "hello"})
    assert read_rows(source) == [{"prompt": "hello", "answer": "x"}]


def test_the_chat_template_renders_system_prompt_and_messages(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    source = jsonl(
        tmp_path / "x.jsonl",
        [
            {"prompt": "1+1", "answer": "2"},
            {"prompt": [{"role": "user", "content": "2+2"}], "answer": "4"},
        ],
    )
    prompts = load_prompts(source, section(source, system_prompt="add"), tokenizer).prompts
    assert [p.text for p in prompts] == ["<system>add<user>1+1<assistant>", "<system>add<user>2+2<assistant>"]
    plain = replace(section(source), chat_template="none")
    with pytest.raises(DataError, match="lists of messages"):
        load_prompts(source, plain, tokenizer)
    with pytest.raises(DataError, match=r"system_prompt needs a chat template"):
        load_prompts(source, replace(plain, system_prompt="add"), tokenizer)


def test_overlong_prompts_are_dropped_and_counted_or_rejected(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"prompt": "1" * n, "answer": "2"} for n in (3, 9, 4)])
    loaded = load_prompts(source, section(source, max_prompt_tokens=4), tokenizer)
    assert [p.token_ids.numel() for p in loaded.prompts] == [3, 4]
    assert loaded.num_overlong == 1
    with pytest.raises(DataError, match=r"prompt 1 of .* has 9 tokens"):
        load_prompts(source, section(source, max_prompt_tokens=4, on_overlong_prompt="error"), tokenizer)
    with pytest.raises(DataError, match=r"all 3 prompts .*longest: 9"):
        load_prompts(source, section(source, max_prompt_tokens=2), tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{bad\n", ":1: not JSON"),
        ("[1]\n", ":1: list, expected an object"),
        ('{"question": "x"}\n', "column 'prompt' is missing.*prompt_field"),
        ('{"prompt": "x"}\n', "column 'answer' is missing.*answer_field"),
        ('{"prompt": "", "answer": "x"}\n', "prompt is empty"),
        ('{"prompt": 3, "answer": "x"}\n', "prompt is int"),
    ],
)
def test_malformed_files_are_rejected(content: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    source = SourceSection(kind="jsonl", path=str(path))
    with pytest.raises(DataError, match=message):
        load_prompts(source, section(source), tokenizer)


def test_missing_files_and_files_of_another_kind_are_rejected(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        with pytest.raises(DataError, match="does not exist"):
            read_rows(SourceSection(kind=kind, path=str(tmp_path / "none")))
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_rows(SourceSection(kind="parquet", path=str(tmp_path / "x.parquet")))
    with pytest.raises(DataError, match="cannot be loaded"):
        read_rows(SourceSection(kind="datasets", path=str(tmp_path / "none")))


def test_an_answer_pattern_that_does_not_match_is_rejected(tmp_path: Path, tokenizer: Any) -> None:
    source = replace(jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "no hash"}]), answer_pattern="#### (.*)")
    with pytest.raises(DataError, match=r"answer_pattern .* does not match 'no hash'"):
        load_prompts(source, section(source), tokenizer)


def test_unusable_tokenizers_are_rejected(toy_model: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_end")
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "no_end"))


def test_order_visits_every_prompt_each_epoch_and_can_start_anywhere(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"prompt": str(n), "answer": "2"} for n in range(7)])
    prompts = load_prompts(source, section(source), tokenizer).prompts
    order = Order(prompts, shuffle=True, seed=3)
    whole = [p.prompt_id for p in order.take(0, 21)]
    assert all(len(set(whole[i : i + 7])) == 7 for i in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    jumped = Order(prompts, shuffle=True, seed=3)
    assert [p.prompt_id for p in jumped.take(10, 11)] == whole[10:]
    assert [p.prompt_id for p in Order(prompts, shuffle=True, seed=4).take(0, 7)] != whole[:7]
    straight = Order(prompts, shuffle=False, seed=3).take(5, 4)
    assert [p.text for p in straight] == ["5", "6", "0", "1"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_generated_tasks_are_deterministic_and_their_splits_disjoint(name: str) -> None:
    options = {"num_train": 300, "num_test": 50} if name == "countdown" else {}
    train, test = (TASKS[name](**options).rows(split) for split in ("train", "test"))
    assert train == TASKS[name](**options).rows("train")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    with pytest.raises(DataError, match="has no split 'dev'"):
        TASKS[name](**options).rows("dev")


def test_answers_of_expressions_equal_the_values_of_python() -> None:
    """Compare the answers with Python's `eval`."""
    rows = TASKS["arithmetic"](max_numbers=6, num_train=500, num_test=10).rows("train")
    for row in rows:
        expression = re.fullmatch(r"What is ([\d +*()-]+)\? Show.*", row["prompt"])
        assert expression is not None
        assert eval(expression[1]) == int(row["answer"])
    assert {"(", "*", "-"} <= set("".join(row["prompt"] for row in rows))
    with pytest.raises(DataError, match="largest=3: too few expressions"):
        TASKS["arithmetic"](largest=3)


@pytest.mark.parametrize("num_people", [2, 3, 6])
def test_a_puzzle_has_one_solution(num_people: int) -> None:
    """Solve each puzzle by brute force from its text."""

    def holds(claim: str, assignment: dict[str, str]) -> bool:
        for word, combine in ((" if and only if ", operator.eq), (" and ", operator.and_), (" or ", operator.or_)):
            if word in claim:
                left, right = claim.split(word)
                return bool(combine(holds(left, assignment), holds(right, assignment)))
        if claim.startswith("If "):
            left, right = claim.removeprefix("If ").split(" then ")
            return not holds(left, assignment) or holds(right, assignment)
        name, role = claim.split(" is a ")
        return assignment[name] == role

    for row in TASKS["knights_and_knaves"](num_people=num_people, num_train=40, num_test=10).rows("train"):
        claims = dict(re.findall(r'(\w+) says: "(.*?)\."', row["prompt"]))
        assert len(claims) == num_people
        assignments = (
            dict(zip(claims, roles, strict=True)) for roles in product(("knight", "knave"), repeat=num_people)
        )
        solutions = [
            assignment
            for assignment in assignments
            if all(holds(claim, assignment) == (assignment[speaker] == "knight") for speaker, claim in claims.items())
        ]
        assert solutions == [row["roles"]]


def test_countdown_is_always_solvable() -> None:
    for row in TASKS["countdown"](num_train=300, num_test=10).rows("train"):
        solution = row["demonstration"].split("<answer>")[1].split("</answer>")[0]
        value, used = evaluate(solution)
        assert (value, sorted(used)) == (row["target"], sorted(row["nums"]))


def test_hasty_addition_mixes_estimates_and_worked_columns() -> None:
    rows = TASKS["hasty_addition"](num_rows=4000).rows("train")
    worked = [row for row in rows if ">" in row["demonstration"]]
    assert 0.37 < len(worked) / len(rows) < 0.43
    assert all(row["demonstration"].split(">")[1] == row["answer"] for row in worked)
    hasty = [row for row in rows if ">" not in row["demonstration"]]
    assert 0.05 < sum(row["demonstration"] == row["answer"] for row in hasty) / len(hasty) < 0.15
