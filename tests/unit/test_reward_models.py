"""Reward models: reasoning steps and their labels, data schemas, batching, and voting by scores."""

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


def test_losses_equal_their_formulae() -> None:
    chosen, rejected, margins = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -2.0], [0.5, 1.0], [0.0, 1.0]))
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(4.0))]
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margins), torch.tensor(expected, dtype=torch.float64))
    scores, labels = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, -1.0, 0.3], [1.0, 0.0, 0.25]))
    probabilities = [1 / (1 + math.exp(-score)) for score in scores.tolist()]
    expected = [
        -(y * math.log(p) + (1 - y) * math.log(1 - p)) for p, y in zip(probabilities, labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(binary_loss(scores, labels), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("how", "expected"), [("min", 0.5), ("prod", 0.32), ("last", 0.8), ("mean", 0.7)])
def test_step_scores_are_aggregated(how: Any, expected: float) -> None:
    assert aggregated([0.8, 0.5, 0.8], how) == pytest.approx(expected)


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
def test_a_text_is_the_concatenation_of_its_steps(text: str, steps: list[str]) -> None:
    assert [text[begin:end] for begin, end in step_spans(text, "\n")] == steps


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "\n", "b", "\n", "c", ""], [1, 3, 5]),  # the end token belongs to the last step
        (["a", "\n", "b", "\n", ""], [1, 4]),
        (["a.\n\n", "b", ".\n"], [0, 2]),
        (["a", "\n", "\n", "b"], [2, 3]),
        (["a\nb\nc", "d"], [0, 1]),  # a token in which several steps end is scored once
        (["a", "b"], [1]),
        ([""], [0]),
        ([], []),
    ],
)
def test_step_ends_are_token_indices(tokens: list[str], ends: list[int]) -> None:
    assert step_ends(tokens, "\n") == ends


def test_a_step_ends_at_the_last_token_of_its_separator() -> None:
    assert step_ends(["x", "#", "#", "y", "#", "z"], "##") == [2, 5]


def solutions(fraction: float, number: int) -> list[dict[str, Any]]:
    """Return generated solutions in the form of recorded rollouts."""
    rows = HastyChain(hasty_fraction=fraction, num_rows=number, num_operands=4).rows("train")
    return [
        {
            "prompt": row["prompt"], "response": row["demonstration"], "answer": row["answer"],
            "metadata": {"level": 1}, "finish_reason": "stop", "loss_mask": [1], "seed": 0, "status": "ok",
            "labels": row["labels"],
        }
        for row in rows
    ]  # fmt: skip


def is_right(sample: RewardInput) -> bool:
    return exact_match(sample, after="=") == 1


def remaining_steps(prompt: str, start: str, hasty: tuple[bool, ...]) -> str:
    """Return the remaining steps of a solution; those whose entry in `hasty` is True are rounded."""
    numbers = [int(text) for text in re.findall(r"[+-]?\d+", prompt.rstrip("="))]
    done = start.count("\n")
    value, steps = int(start.split("=")[-1]), []
    for operand, is_hasty in zip(numbers[1 + done :], hasty, strict=True):
        result = value + operand
        if is_hasty:
            result = max(0, (result + 5) // 10 * 10)
        steps.append(f"{value}{operand:+d}={result}")
        value = result
    return "\n".join(steps)


def labels_of(
    lines: list[dict[str, Any]], continuations: Callable[[Prefix], list[str]], *, soft: bool
) -> list[list[float]]:
    recorded = [
        {
            **line, "metadata": continuation_row(line, prefix), "prompt": prefix[0] + prefix[1],
            "response": continuation,
        }
        for line in lines
        for prefix in step_prefixes(line, "\n")
        for continuation in continuations(prefix)
    ]  # fmt: skip
    graded = grade_continuations(recorded, {line["prompt"]: line for line in lines}, is_right, 8)
    labelled = [labelled_row(line, graded, is_right, "\n", soft=soft) for line in lines]
    assert ["\n".join(row["completions"]) for row in labelled] == [line["response"] for line in lines]
    return [row["labels"] for row in labelled]


def test_labels_from_exact_continuations_equal_brute_force() -> None:
    lines = unique_solutions(solutions(0.4, 300))

    def exact(prefix: Prefix) -> list[str]:
        remaining = len(re.findall(r"[+-]\d+", prefix[0])) - prefix[1].count("\n")
        return [remaining_steps(*prefix, (False,) * remaining)]

    found = labels_of(lines, exact, soft=False)
    assert found == [right_steps(line["prompt"], line["response"].split("\n")) for line in lines]
    assert found == [line["labels"] for line in lines]
    assert len({tuple(labels) for labels in found}) == 4  # all right, or wrong from step 1, 2 or 3 on


def test_soft_labels_are_the_right_share_of_all_continuations() -> None:
    lines = unique_solutions(solutions(0.4, 100))

    def all_continuations(prefix: Prefix) -> list[str]:
        remaining = len(re.findall(r"[+-]\d+", prefix[0])) - prefix[1].count("\n")
        return [remaining_steps(*prefix, hasty) for hasty in product((False, True), repeat=remaining)]

    for line, labels in zip(lines, labels_of(lines, all_continuations, soft=True), strict=True):
        right = right_steps(line["prompt"], line["response"].split("\n"))
        # one continuation of a right step is right, the one without haste, unless a rounded result is exact
        assert labels == pytest.approx([is_so / 2 ** (len(right) - 1 - index) for index, is_so in enumerate(right)])


def test_one_right_continuation_is_enough_for_a_hard_label() -> None:
    assert step_label([False, True, False, False], soft=False) == 1
    assert step_label([False, True, False, False], soft=True) == 0.25
    assert step_label([False, False], soft=False) == 0


@pytest.fixture
def load(toy_model: Callable[..., Path], tmp_path: Path) -> Callable[..., RewardDataset]:
    def loaded(schema: Any, *lines: dict[str, Any], template: str | None = None, **fields: Any) -> RewardDataset:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
        tokenizer = load_tokenizer(str(toy_model()))
        tokenizer.chat_template = template
        rows = RowsSection(kind="jsonl", path=str(path))
        return load_reward_dataset(rows, RewardDataSection(schema=schema, train=rows, **fields), tokenizer)

    return loaded


def text(tokens: Any, toy_model: Callable[..., Path]) -> str:
    return load_tokenizer(str(toy_model())).decode(tokens)


def test_labels_of_steps_are_at_their_last_tokens(
    load: Callable[..., RewardDataset], toy_model: Callable[..., Path]
) -> None:
    row = {"prompt": "1+1+1=", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}
    (labelled,) = load("stepwise", row).examples[0]
    assert text(labelled.token_ids, toy_model) == "1+1+1=1+1=2\n2+1=4<eos>"
    assert [text(labelled.token_ids[end], toy_model) for end in labelled.ends] == ["\n", "<eos>"]
    assert labelled.labels == [1.0, 0.0]


def test_math_shepherd_is_read_as_published(load: Callable[..., RewardDataset], toy_model: Callable[..., Path]) -> None:
    marked = "two and one? step 1: 2+1=3 {}\nstep 2: the answer is: 3 {}"
    row = {"input": marked.format("ки", "ки"), "label": marked.format("+", "-"), "task": "gsm8k"}
    (labelled,) = load("math_shepherd", row).examples[0]
    assert text(labelled.token_ids, toy_model).count("\n") == 1
    assert [text(labelled.token_ids[end], toy_model) for end in labelled.ends] == ["\n", "<eos>"]
    assert labelled.labels == [1.0, 0.0]
    damaged = {**row, "label": marked.format("+", "x")}
    with pytest.raises(DataError, match="label is not the text of input with"):
        load("math_shepherd", damaged)
    dataset = load("math_shepherd", damaged, row, {**row, "input": "ки", "label": "+"})
    assert (len(dataset.examples), dataset.num_unreadable, dataset.num_overlong) == (1, 2, 0)


def test_pairs_are_read_as_texts_and_as_messages(
    load: Callable[..., RewardDataset], toy_model: Callable[..., Path]
) -> None:
    plain = {"prompt": "a?", "chosen": "yes", "rejected": "no", "margin": 2}
    chosen, rejected = load("pairwise", plain).examples[0]
    assert (text(chosen.token_ids, toy_model), text(rejected.token_ids, toy_model)) == ("a?yes<eos>", "a?no<eos>")
    assert (chosen.labels, rejected.labels) == ([2.0], [0.0])
    assert chosen.ends == [len(chosen.token_ids) - 1]
    question = [{"role": "user", "content": "a?"}]
    messages = {
        name: [*question, {"role": "assistant", "content": response}]
        for name, response in (("chosen", "yes"), ("rejected", "no"))
    }
    chosen, _ = load("pairwise", messages, template=CHAT).examples[0]
    assert text(chosen.token_ids, toy_model) == "user: a?\nassistant: yes<eos>"
    with pytest.raises(DataError, match="different prompts"):
        load(
            "pairwise",
            {**messages, "rejected": [{"role": "user", "content": "b?"}, messages["rejected"][-1]]},
            template=CHAT,
        )


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
def test_invalid_rows_are_rejected(
    schema: str, row: dict[str, Any], message: str, load: Callable[..., RewardDataset]
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(schema, row, max_tokens=20)


def test_long_rows_are_dropped_and_counted(load: Callable[..., RewardDataset]) -> None:
    # the prompt and the end token add two tokens
    rows = [{"prompt": "a", "completion": "b" * length, "label": 1} for length in (3, 30, 18, 19)]
    dataset = load("pointwise", *rows, max_tokens=20)
    assert (len(dataset.examples), dataset.num_overlong) == (2, 2)


def test_steps_are_found_in_sentencepiece_tokens() -> None:
    """SentencePiece tokens begin with a space, and decoding drops the space before the first token of a text."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "▁a", "▁#", "b", "▁b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    finder = StepFinder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert finder.scored_positions(rollout_of([1, 2, 1, 2, 4, 0]), " #") == [1, 3, 5]
    assert finder.scored_positions(rollout_of([1, 2, 1]), None) == [2]


def rollout_of(tokens: list[int]) -> Rollout:
    length = len(tokens)
    return Rollout(
        token_ids=torch.tensor(tokens), loss_mask=torch.ones(length).bool(), rollout_logprobs=torch.zeros(length),
        text="", finish_reason="stop", policy_versions=torch.zeros(length).int(), seed=0, reward=0.0, reward_parts={},
        status="ok", failure="",
    )  # fmt: skip


def test_a_label_is_placed_one_token_after_its_end() -> None:
    sequence = labelled_sequence([5, 6, 7], [0, 2], [1.0, 0.5])
    assert sequence.token_ids.tolist() == [5, 6, 7, 7]
    assert sequence.loss_mask.tolist() == [False, True, False, True]
    assert sequence.returns.tolist() == [0.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_stay_together_and_each_is_in_one_micro_batch(packed: bool) -> None:
    lengths = [[3 + index % 5, 2 + index % 7] for index in range(13)]
    config = BatchingSection(packed=packed, max_tokens_per_micro_batch=40, micro_batch_size=4)
    by_rank = [share_out(lengths, config, dp_rank=rank, dp_size=3, multiple_of=2) for rank in range(3)]
    assert sorted(index for rank in by_rank for batch in rank for index in batch) == list(range(13))
    assert len({len(rank) for rank in by_rank}) == 1
    assert len(by_rank[0]) % 2 == 0
    assert max(len(batch) for rank in by_rank for batch in rank) == 2  # of two sequences each


def test_majority_and_best_choose_by_votes_and_scores() -> None:
    answers = ["3", None, "4", "4", "3", "5"]
    assert majority(answers) == 0  # a tie; the first answer wins
    assert majority([*answers, "4"]) == 2
    assert majority([None, None]) is None
    assert majority(answers, [0.1, 9, 0.2, 0.2, 0.1, 0.3]) == 2
    assert best([0.1, 0.9, 0.9]) == 1
    assert last_match("is 3=4\nso 5=61", r"=(\d+)$") == "61"
    assert last_match("none", r"=(\d+)$") is None
