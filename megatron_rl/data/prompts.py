"""Tokenised prompts and the order in which a run uses them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.config.schema import DataSection, SourceSection
from megatron_rl.data.adapters import to_problem
from megatron_rl.data.sources import read_rows
from megatron_rl.data.templates import render_prompts, tokenize
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """All prompts of a source."""

    prompts: Sequence[Prompt]
    num_overlong: int
    """Dropped because they are longer than the limit."""


def load_prompts(source: SourceSection, config: DataSection, tokenizer: Any) -> PromptSet:
    """Read, render and tokenise a source.

    Raises:
        DataError: unreadable or empty source, an over-long prompt when those are errors,
            or no prompt within the limit.
    """
    problems = [to_problem(row, source, number) for number, row in enumerate(read_rows(source))]
    texts = render_prompts(problems, config, tokenizer)
    templated = config.chat_template == "auto" and tokenizer.chat_template is not None
    prompts, longest = [], 0
    for number, (problem, text, ids) in enumerate(
        zip(problems, texts, tokenize(texts, tokenizer, special_tokens=not templated), strict=True)
    ):
        longest = max(longest, len(ids))
        if len(ids) > config.max_prompt_tokens:
            if config.on_overlong_prompt == "error":
                raise DataError(
                    f"prompt {number} of {source.path} has {len(ids)} tokens, data.max_prompt_tokens="
                    f"{config.max_prompt_tokens}. Raise the limit or set data.on_overlong_prompt=drop."
                )
            continue
        if not ids:
            raise DataError(
                f"prompt {number} of {source.path} has no tokens: the tokenizer turned {text!r} into nothing."
            )
        prompts.append(
            Prompt(
                prompt_id=f"{source.split}/{number}",
                token_ids=torch.tensor(ids),
                text=text,
                answer=problem.answer,
                demonstration=problem.demonstration,
                metadata=problem.metadata,
            )
        )
    if not prompts:
        raise DataError(
            f"all {len(texts)} prompts of {source.path} are longer than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} (longest: {longest}). Raise the limit."
        )
    return PromptSet(prompts=prompts, num_overlong=len(texts) - len(prompts))


class PromptOrder:
    """Endless passes over the prompts, a new order in each; any place can be jumped to."""

    def __init__(self, prompts: Sequence[Prompt], *, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[Prompt]:
        """The prompts at places start, start + 1, … counted from the beginning of the run."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> Prompt:
        epoch, offset = divmod(place, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._prompts[self._order[offset]]

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._prompts), generator=generator).tolist()
