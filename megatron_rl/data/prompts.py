"""Load and tokenise prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.config.data import DataSection, SourceSection
from megatron_rl.data.adapters import to_problem
from megatron_rl.data.sources import read_rows
from megatron_rl.data.templates import adds_special_tokens, render_prompts, tokenize
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """All prompts of a source."""

    prompts: Sequence[Prompt]
    num_overlong: int
    """Number of prompts dropped because they are longer than the limit."""


def load_prompts(source: SourceSection, config: DataSection, tokenizer: Any) -> PromptSet:
    """Read, render and tokenise a source.

    Raises:
        DataError: the source is unreadable or empty, a prompt is too long and data.on_overlong_prompt=error, a prompt
            has no tokens, or all prompts are longer than the limit.
    """
    problems = [to_problem(row, source, number) for number, row in enumerate(read_rows(source))]
    texts = render_prompts(problems, config, tokenizer)
    prompts, longest = [], 0
    for number, (problem, text, ids) in enumerate(
        zip(
            problems,
            texts,
            tokenize(texts, tokenizer, special_tokens=adds_special_tokens(config.chat_template, tokenizer)),
            strict=True,
        )
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
                f"prompt {number} of {source.path} has no tokens: the tokenizer returned none for {text!r}."
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
