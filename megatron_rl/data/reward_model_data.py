"""Read labelled responses, in the schemas of public data sets, and tokenise them to train reward models.

pairwise: UltraFeedback-binarized, Anthropic HH-RLHF, and the preference data that TRL's RewardTrainer reads. pointwise:
TRL's unpaired preferences. stepwise: trl-lib/math_shepherd and trl-lib/prm800k. math_shepherd: the original
peiyi9979/Math-Shepherd.
"""

import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_rl.config.data import RowsSection
from megatron_rl.config.reward_training import RewardDataSection
from megatron_rl.data.sources import read_rows
from megatron_rl.data.templates import adds_special_tokens, apply_chat_template
from megatron_rl.errors import DataError

SHEPHERD_MARK = "ки"  # ends each step in Math-Shepherd's input column
SHEPHERD_LABELS = {"+": 1.0, "-": 0.0}


@dataclass(frozen=True, kw_only=True)
class LabelledResponse:
    """A tokenised prompt with its response and labels."""

    token_ids: Sequence[int]
    ends: Sequence[int]
    """Positions of the labelled tokens, ascending."""
    labels: Sequence[float]
    """Label at each end, 0 (wrong) to 1 (right). In a pair: the margin for the chosen response, 0 for the other."""


Example = tuple[LabelledResponse, ...]
"""One training example: one response, or a pair of the chosen and the rejected response."""


class UnreadableRow(DataError):
    """A damaged row of a published data set; such rows are skipped and counted."""


class RawExample(NamedTuple):
    """A prompt and the parts of a response, with a label for the end of each part."""

    prompt: str | Sequence[Mapping[str, str]]
    parts: Sequence[str]
    labels: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class RewardDataset:
    """All examples of a source."""

    examples: Sequence[Example]
    num_overlong: int
    """Number of rows dropped because they are longer than the limit."""
    num_unreadable: int = 0
    """Number of rows dropped because the ends of their steps cannot be determined."""


def load_reward_dataset(source: RowsSection, config: RewardDataSection, tokenizer: Any) -> RewardDataset:
    """Read and tokenise a source.

    Raises:
        DataError: the source is unreadable or empty, a column is missing or has another type, a label is invalid, or no
            row is usable within the limit.
    """
    reader = READERS[config.schema]
    examples: list[Example] = []
    rows = read_rows(source)
    unreadable: list[str] = []
    for number, row in enumerate(rows):
        where = f"row {number} of {source.path or source.kind} (data.schema={config.schema})"
        try:
            raw_examples = reader(row, config, where)
        except UnreadableRow as error:
            unreadable.append(str(error))
            continue
        example = tuple(_tokenise(raw, config, tokenizer, where) for raw in raw_examples)
        if max(len(response.token_ids) for response in example) <= config.max_tokens:
            examples.append(example)
    num_overlong = len(rows) - len(unreadable) - len(examples)
    if not examples:
        raise DataError(
            f"none of {len(rows)} rows of {source.path} can be used: {num_overlong} are longer than data.max_tokens="
            f"{config.max_tokens}, {len(unreadable)} cannot be read"
            + (f" (first: {unreadable[0]})" if unreadable else "")
            + ". Raise the limit, or choose another data.schema."
        )
    return RewardDataset(examples=examples, num_overlong=num_overlong, num_unreadable=len(unreadable))


def _pairwise(row: Mapping[str, Any], config: RewardDataSection, where: str) -> list[RawExample]:
    chosen, rejected = _column(row, "chosen", where), _column(row, "rejected", where)
    margin = row.get("margin", 0.0)
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"{where}: margin is {margin!r}, expected a number.")
    pair = [_raw_example(row, response, where, label) for response, label in ((chosen, float(margin)), (rejected, 0.0))]
    if pair[0].prompt != pair[1].prompt:
        raise DataError(f"{where}: chosen and rejected answer different prompts. Both must answer the same prompt.")
    return pair


def _pointwise(row: Mapping[str, Any], config: RewardDataSection, where: str) -> list[RawExample]:
    return [_raw_example(row, _column(row, "completion", where), where, _label(_column(row, "label", where), where))]


def _stepwise(row: Mapping[str, Any], config: RewardDataSection, where: str) -> list[RawExample]:
    steps, labels = _column(row, "completions", where), _column(row, "labels", where)
    are_lists = isinstance(steps, list | tuple) and isinstance(labels, list | tuple)
    if not are_lists or len(steps) != len(labels) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(
            f"{where}: completions {steps!r} and labels {labels!r}: expected texts and the same number of labels."
        )
    parts = [step + config.step_separator for step in steps[:-1]] + [steps[-1]]
    return [RawExample(_column(row, "prompt", where), parts, [_label(label, where) for label in labels])]


def _math_shepherd(row: Mapping[str, Any], config: RewardDataSection, where: str) -> list[RawExample]:
    text, marked = _column(row, "input", where), _column(row, "label", where)
    steps, labels, position = text.split(SHEPHERD_MARK)[:-1], [], 0
    for step in steps:
        end = position + len(step)
        mark = marked[end : end + 1]
        if mark not in SHEPHERD_LABELS or marked[position:end] != step:
            raise UnreadableRow(f"{where}: label is not the text of input with + or - in place of {SHEPHERD_MARK!r}")
        labels.append(SHEPHERD_LABELS[mark])
        position = end + 1
    first_step = re.search(r"Step 1\s*:", steps[0], re.IGNORECASE) if steps else None
    if first_step is None:
        raise UnreadableRow(f"{where}: there is no 'Step 1:' before the first {SHEPHERD_MARK!r}")
    parts = [steps[0][first_step.start() :], *steps[1:]]
    parts = [part.strip() + config.step_separator for part in parts[:-1]] + [parts[-1].strip()]
    return [RawExample(text[: first_step.start()].strip(), parts, labels)]


READERS: dict[str, Callable[[Mapping[str, Any], RewardDataSection, str], list[RawExample]]] = {
    "pairwise": _pairwise,
    "pointwise": _pointwise,
    "stepwise": _stepwise,
    "math_shepherd": _math_shepherd,
}


def _raw_example(row: Mapping[str, Any], response: Any, where: str, label: float) -> RawExample:
    """Make an example of one part from a text, or from messages of which the last is the response.

    The prompt is the messages before the last if there are any, else the prompt column. A text may contain its prompt.
    """
    prompt = row.get("prompt") or ""
    if isinstance(response, str):
        return RawExample(prompt, [response], [label])
    messages = list(response) if isinstance(response, Sequence) else []
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(f"{where}: expected a text, or messages of which the last is the assistant's.")
    before = list(messages[:-1])
    if before or not prompt:
        return RawExample(before, [messages[-1]["content"]], [label])
    return RawExample(prompt, [messages[-1]["content"]], [label])


def _tokenise(raw: RawExample, config: RewardDataSection, tokenizer: Any, where: str) -> LabelledResponse:
    """Tokenise an example; the response ends with the end-of-sequence token, like a finished response of a policy."""
    prompt = raw.prompt
    if prompt and config.chat_template == "auto" and tokenizer.chat_template is not None:
        prompt = apply_chat_template(prompt, tokenizer)
    if not isinstance(prompt, str) and prompt:
        raise DataError(
            f"{where}: the prompt is a list of messages, but no chat template is applied to it "
            "(the tokenizer has none, or data.chat_template is not auto)."
        )
    special = adds_special_tokens(config.chat_template, tokenizer)
    ids = list(tokenizer.encode(prompt or "", add_special_tokens=special))
    if ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers append the end token to every text
        ids.pop()
    response = tokenizer("".join(raw.parts), add_special_tokens=False, return_offsets_mapping=True)
    # a part ends at the token that contains its last character
    last = [end - 1 for end in accumulate(map(len, raw.parts))]
    begins = [begin for begin, _ in response["offset_mapping"]]
    ends = [len(ids) + bisect_right(begins, character) - 1 for character in last]
    if not response["input_ids"] or len(set(ends)) < len(ends):
        raise DataError(f"{where}: a response or step has no tokens of its own.")
    ids += response["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    ends[-1] = len(ids) - 1
    return LabelledResponse(token_ids=array("i", ids), ends=ends, labels=raw.labels)


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: column {name!r} is missing or empty. Columns: {', '.join(row)}.")
    return row[name]


def _label(value: Any, where: str) -> float:
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise DataError(f"{where}: label {value!r}: expected true, false, or a number from 0 to 1.")
    return float(value)
