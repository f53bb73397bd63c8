"""Steps, their labels, the schemas of judged data, and choosing by scores."""

import json
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.algorithms.losses import binary_loss, pairwise_loss
from megatron_rl.algorithms.reasoning_steps import aggregated, step_ends, step_label, step_spans
from megatron_rl.batching.reward_model import labelled_sequence, share_out
from megatron_rl.config.batching import BatchingSection
from megatron_rl.config.data import RowsSection
from megatron_rl.config.reward_training import RewardDataSection
from megatron_rl.curation.process_labels import (
    Prefix,
    continuation_row,
    grade_continuations,
    labelled_row,
    step_prefixes,
    unique_solutions,
)
from megatron_rl.data.generated.hasty_chain import HastyChain, right_steps
from megatron_rl.data.reward_model_data import RewardDataset, load_reward_dataset
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import DataError
from megatron_rl.evaluation.majority_vote import best, last_match, majority
from megatron_rl.rewards.exact import exact_match
from megatron_rl.rewards.types import RewardInput
from megatron_rl.trainer.reward_scores import StepFinder
from megatron_rl.types import Rollout

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def test_losses_are_those_of_their_formulae() -> None:
    chosen, rejected, margins = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -2.0], [0.5, 1.0], [0.0, 1.0]))
    wanted = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(4.0))]
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margins), torch.tensor(wanted, dtype=torch.float64))
    scores, labels = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, -1.0, 0.3], [1.0, 0.0, 0.25]))
    chance = [1 / (1 + math.exp(-score)) for score in scores.tolist()]
    wanted = [-(y * math.log(p) + (1 - y) * math.log(1 - p)) for p, y in zip(chance, labels.tolist(), strict=True)]
    torch.testing.assert_close(binary_loss(scores, labels), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize(("how", "wanted"), [("min", 0.5), ("prod", 0.32), ("last", 0.8), ("mean", 0.7)])
def test_steps_make_a_solution(how: Any, wanted: float) -> None:
    assert aggregated([0.8, 0.5, 0.8], how) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\nb\nc", ["a\n", "b\n", "c"]),
        ("a\nb\n", ["a\n", "b\n"]),
        ("a\n\n \nb", ["a\n\n \n", "b"]),
        ("\n\na\nb \n \n", ["\n\na\n", "b \n \n"]),
        ("a", ["a"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_a_text_is_the_sum_of_its_steps(text: str, steps: list[str]) -> None:
    assert [text[begin:end] for begin, end in step_spans(text, "\n")] == steps


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "\n", "b", "\n", "c", ""], [1, 3, 5]),  # the end token belongs to the last step
        (["a", "\n", "b", "\n", ""], [1, 4]),
        (["a.\n\n", "b", ".\n"], [0, 2]),
        (["a", "\n", "\n", "b"], [2, 3]),
        (["a\nb\nc", "d"], [0, 1]),  # a token in which several steps end is judged once
        (["a", "b"], [1]),
        ([""], [0]),
        ([], []),
    ],
)
def test_steps_end_at_tokens(tokens: list[str], ends: list[int]) -> None:
    assert step_ends(tokens, "\n") == ends


def test_a_separator_of_several_tokens_ends_with_its_last() -> None:
    assert step_ends(["x", "#", "#", "y", "#", "z"], "##") == [2, 5]


def solutions(fraction: float, number: int) -> list[dict[str, Any]]:
    """As recorded rollouts have them."""
    found = HastyChain(hasty_fraction=fraction, num_rows=number, num_operands=4).rows("train")
    return [
        {
            "prompt": row["prompt"], "response": row["demonstration"], "answer": row["answer"],
            "metadata": {"level": 1}, "finish_reason": "stop", "loss_mask": [1], "seed": 0, "status": "ok",
            "labels": row["labels"],
        }
        for row in found
    ]  # fmt: skip


def is_right(sample: RewardInput) -> bool:
    return exact_match(sample, after="=") == 1


def rests_of(prompt: str, begun: str, hasty: tuple[bool, ...]) -> str:
    """The other steps of a solution, of which some are hasty."""
    numbers = [int(text) for text in re.findall(r"[+-]?\d+", prompt.rstrip("="))]
    done = begun.count("\n")
    value, steps = int(begun.split("=")[-1]), []
    for operand, is_hasty in zip(numbers[1 + done :], hasty, strict=True):
        found = value + operand
        if is_hasty:
            found = max(0, (found + 5) // 10 * 10)
        steps.append(f"{value}{operand:+d}={found}")
        value = found
    return "\n".join(steps)


def labels_of(lines: list[dict[str, Any]], rests: Callable[[Prefix], list[str]], *, soft: bool) -> list[list[float]]:
    recorded = [
        {
            **line, "metadata": continuation_row(line, prefix), "prompt": prefix[0] + prefix[1], "response": rest,
        }
        for line in lines
        for prefix in step_prefixes(line, "\n")
        for rest in rests(prefix)
    ]  # fmt: skip
    graded = grade_continuations(recorded, {line["prompt"]: line for line in lines}, is_right, 8)
    made = [labelled_row(line, graded, is_right, "\n", soft=soft) for line in lines]
    assert ["\n".join(row["completions"]) for row in made] == [line["response"] for line in lines]
    return [row["labels"] for row in made]


def test_labels_by_exact_continuations_are_those_of_brute_force() -> None:
    lines = unique_solutions(solutions(0.4, 300))

    def exact(prefix: Prefix) -> list[str]:
        remaining = len(re.findall(r"[+-]\d+", prefix[0])) - prefix[1].count("\n")
        return [rests_of(*prefix, (False,) * remaining)]

    found = labels_of(lines, exact, soft=False)
    assert found == [right_steps(line["prompt"], line["response"].split("\n")) for line in lines]
    assert found == [line["labels"] for line in lines]
    assert len({tuple(labels) for labels in found}) == 4  # right to the end, or up to any step


def test_soft_labels_are_shares_of_all_continuations() -> None:
    lines = unique_solutions(solutions(0.4, 100))

    def every(prefix: Prefix) -> list[str]:
        remaining = len(re.findall(r"[+-]\d+", prefix[0])) - prefix[1].count("\n")
        return [rests_of(*prefix, hasty) for hasty in product((False, True), repeat=remaining)]

    for line, labels in zip(lines, labels_of(lines, every, soft=True), strict=True):
        right = right_steps(line["prompt"], line["response"].split("\n"))
        # of the continuations of a right step one is right, that without haste, unless a hasty number is exact
        assert labels == pytest.approx([is_so / 2 ** (len(right) - 1 - place) for place, is_so in enumerate(right)])


def test_one_right_end_is_enough_for_a_hard_label() -> None:
    assert step_label([False, True, False, False], soft=False) == 1
    assert step_label([False, True, False, False], soft=True) == 0.25
    assert step_label([False, False], soft=False) == 0


@pytest.fixture
def load(toy_model: Callable[..., Path], tmp_path: Path) -> Callable[..., RewardDataset]:
    def loaded(schema: Any, *found: dict[str, Any], template: str | None = None, **fields: Any) -> RewardDataset:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        tokenizer = load_tokenizer(str(toy_model()))
        tokenizer.chat_template = template
        rows = RowsSection(kind="jsonl", path=str(path))
        return load_reward_dataset(rows, RewardDataSection(schema=schema, train=rows, **fields), tokenizer)

    return loaded


def text(tokens: Any, toy_model: Callable[..., Path]) -> str:
    return load_tokenizer(str(toy_model())).decode(tokens)


def test_steps_are_judged_at_their_last_token(
    load: Callable[..., RewardDataset], toy_model: Callable[..., Path]
) -> None:
    row = {"prompt": "1+1+1=", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}
    (judged,) = load("stepwise", row).examples[0]
    assert text(judged.token_ids, toy_model) == "1+1+1=1+1=2\n2+1=4<eos>"
    assert [text(judged.token_ids[end], toy_model) for end in judged.ends] == ["\n", "<eos>"]
    assert judged.labels == [1.0, 0.0]


def test_math_shepherd_is_read_as_published(load: Callable[..., RewardDataset], toy_model: Callable[..., Path]) -> None:
    marked = "two and one? step 1: 2+1=3 {}\nstep 2: the answer is: 3 {}"
    row = {"input": marked.format("ки", "ки"), "label": marked.format("+", "-"), "task": "gsm8k"}
    (judged,) = load("math_shepherd", row).examples[0]
    assert text(judged.token_ids, toy_model).count("\n") == 1
    assert [text(judged.token_ids[end], toy_model) for end in judged.ends] == ["\n", "<eos>"]
    assert judged.labels == [1.0, 0.0]
    damaged = {**row, "label": marked.format("+", "x")}
    with pytest.raises(DataError, match="label is not the text of input with"):
        load("math_shepherd", damaged)
    found = load("math_shepherd", damaged, row, {**row, "input": "ки", "label": "+"})
    assert (len(found.examples), found.num_unreadable, found.num_overlong) == (1, 2, 0)


def test_pairs_come_as_texts_and_as_messages(
    load: Callable[..., RewardDataset], toy_model: Callable[..., Path]
) -> None:
    plain = {"prompt": "a?", "chosen": "yes", "rejected": "no", "margin": 2}
    chosen, rejected = load("pairwise", plain).examples[0]
    assert (text(chosen.token_ids, toy_model), text(rejected.token_ids, toy_model)) == ("a?yes<eos>", "a?no<eos>")
    assert (chosen.labels, rejected.labels) == ([2.0], [0.0])
    assert chosen.ends == [len(chosen.token_ids) - 1]
    asked = [{"role": "user", "content": "a?"}]
    talk = {
        name: [*asked, {"role": "assistant", "content": said}] for name, said in (("chosen", "yes"), ("rejected", "no"))
    }
    chosen, _ = load("pairwise", talk, template=CHAT).examples[0]
    assert text(chosen.token_ids, toy_model) == "user: a?\nassistant: yes<eos>"
    with pytest.raises(DataError, match="different prompts"):
        load("pairwise", {**talk, "rejected": [{"role": "user", "content": "b?"}, talk["rejected"][-1]]}, template=CHAT)


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        (
            "stepwise",
            {"prompt": "a", "completions": ["b"], "labels": [True, False]},
            "labels [True, False]: expected texts",
        ),
        ("stepwise", {"prompt": "a", "completions": ["b"]}, "column 'labels' is missing"),
        ("stepwise", {"prompt": "a", "completions": 3, "labels": 3}, "completions 3 and labels 3"),
        ("stepwise", {"prompt": "a", "completions": ["b", ""], "labels": [1, 1]}, "no tokens of its own"),
        ("pointwise", {"prompt": "a", "completion": "b", "label": 3}, "label 3: expected true, false, or a number"),
        ("pointwise", {"prompt": "a", "completion": [{"role": "user", "content": "b"}], "label": 1}, "assistant's"),
        ("pairwise", {"chosen": "a", "rejected": "b", "margin": "c"}, "margin is 'c'"),
        ("pointwise", {"prompt": "a", "completion": "b" * 50, "label": 1}, "1 are longer than data.max_tokens=20"),
    ],
)
def test_bad_rows_are_named(schema: str, row: dict[str, Any], message: str, load: Callable[..., RewardDataset]) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(schema, row, max_tokens=20)


def test_long_rows_are_dropped_and_counted(load: Callable[..., RewardDataset]) -> None:
    # with prompt and end token two more
    rows = [{"prompt": "a", "completion": "b" * length, "label": 1} for length in (3, 30, 18, 19)]
    found = load("pointwise", *rows, max_tokens=20)
    assert (len(found.examples), found.num_overlong) == (2, 2)


def test_steps_are_found_where_tokens_hold_spaces() -> None:
    """As SentencePiece's do: the space before the first token of a text is dropped when it is decoded."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "▁a", "▁#", "b", "▁b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    finder = StepFinder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert finder.scored_positions(said([1, 2, 1, 2, 4, 0]), " #") == [1, 3, 5]
    assert finder.scored_positions(said([1, 2, 1]), None) == [2]


def said(tokens: list[int]) -> Rollout:
    length = len(tokens)
    return Rollout(
        token_ids=torch.tensor(tokens), loss_mask=torch.ones(length).bool(), rollout_logprobs=torch.zeros(length),
        text="", finish_reason="stop", policy_versions=torch.zeros(length).int(), seed=0, reward=0.0, reward_parts={},
        status="ok", failure="",
    )  # fmt: skip


def test_a_token_is_judged_by_what_has_read_it() -> None:
    sequence = labelled_sequence([5, 6, 7], [0, 2], [1.0, 0.5])
    assert sequence.token_ids.tolist() == [5, 6, 7, 7]
    assert sequence.loss_mask.tolist() == [False, True, False, True]
    assert sequence.returns.tolist() == [0.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_stay_together_and_every_one_has_its_place(packed: bool) -> None:
    lengths = [[3 + place % 5, 2 + place % 7] for place in range(13)]
    config = BatchingSection(packed=packed, max_tokens_per_micro_batch=40, micro_batch_size=4)
    found = [share_out(lengths, config, dp_rank=rank, dp_size=3, multiple_of=2) for rank in range(3)]
    assert sorted(place for rank in found for batch in rank for place in batch) == list(range(13))
    assert len({len(rank) for rank in found}) == 1
    assert len(found[0]) % 2 == 0
    assert max(len(batch) for rank in found for batch in rank) == 2  # of two sequences each


def test_votes() -> None:
    answers = ["3", None, "4", "4", "3", "5"]
    assert majority(answers) == 0  # the one that came first
    assert majority([*answers, "4"]) == 2
    assert majority([None, None]) is None
    assert majority(answers, [0.1, 9, 0.2, 0.2, 0.1, 0.3]) == 2
    assert best([0.1, 0.9, 0.9]) == 1
    assert last_match("is 3=4\nso 5=61", r"=(\d+)$") == "61"
    assert last_match("none", r"=(\d+)$") is None
