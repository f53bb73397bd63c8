"""Stages of a run, each with prompts of its own. Which one a step is in depends on the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.data import DataSection, StageSection
from megatron_rl.data.order import Order
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


@dataclass(frozen=True)
class Stage:
    """What holds from a step on."""

    number: int
    from_step: int
    order: Order[Prompt]
    max_new_tokens: int


class Curriculum:
    """The stages of a run, at least one."""

    def __init__(self, prompts: Sequence[Prompt], config: DataSection, *, max_new_tokens: int, seed: int) -> None:
        """
        Args:
            max_new_tokens: longest response where a stage does not say.

        Raises:
            DataError: a stage has no prompt, or asks for a column that a prompt does not have.
        """
        sections = config.curriculum or [StageSection(from_step=1)]
        self._stages = [
            Stage(
                number,
                section.from_step,
                Order(_chosen(prompts, section, number), shuffle=config.shuffle, seed=seed),
                section.max_new_tokens or max_new_tokens,
            )
            for number, section in enumerate(sections, start=1)
        ]

    def at(self, step: int) -> Stage:
        """The stage of a step."""
        return [stage for stage in self._stages if stage.from_step <= step][-1]


def _chosen(prompts: Sequence[Prompt], section: StageSection, number: int) -> list[Prompt]:
    chosen = [prompt for prompt in prompts if all(_fits(prompt, *one) for one in section.where.items())]
    if not chosen:
        raise DataError(
            f"data.curriculum: none of {len(prompts)} prompts is in stage {number}, where {dict(section.where)}. "
            "Widen it."
        )
    return chosen


def _fits(prompt: Prompt, column: str, wanted: Sequence[Any]) -> bool:
    """
    Raises:
        DataError: the prompt has no such column, or something else than numbers in it.
    """
    if column not in prompt.metadata:
        raise DataError(
            f"data.curriculum: prompt {prompt.prompt_id} has no column {column!r}. "
            f"Columns: {', '.join(prompt.metadata)}."
        )
    value = prompt.metadata[column]
    if isinstance(wanted[0], str):
        return value in wanted
    size = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    if not isinstance(size, int | float):
        raise DataError(
            f"data.curriculum: {column} of prompt {prompt.prompt_id} is {value!r}, expected a number between "
            f"{wanted[0]} and {wanted[1]}. Give the texts that it may have instead."
        )
    return bool(wanted[0] <= size <= wanted[1])
