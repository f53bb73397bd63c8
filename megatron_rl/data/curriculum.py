"""Stages of a run, each with its own prompts. The stage of a step depends only on the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.data import DataSection, StageSection
from megatron_rl.data.order import Order
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum, from a step on."""

    number: int
    from_step: int
    order: Order[Prompt]
    max_new_tokens: int


class Curriculum:
    """The stages of a run, at least one."""

    def __init__(self, prompts: Sequence[Prompt], config: DataSection, *, max_new_tokens: int, seed: int) -> None:
        """
        Args:
            max_new_tokens: longest response, for stages that do not set their own.

        Raises:
            DataError: a stage has no prompts, or filters by a column that a prompt does not have.
        """
        sections = config.curriculum or [StageSection(from_step=1)]
        self._stages = [
            Stage(
                number,
                section.from_step,
                Order(_select(prompts, section, number), shuffle=config.shuffle, seed=seed),
                section.max_new_tokens or max_new_tokens,
            )
            for number, section in enumerate(sections, start=1)
        ]

    def at(self, step: int) -> Stage:
        """The stage of a step."""
        return [stage for stage in self._stages if stage.from_step <= step][-1]


def _select(prompts: Sequence[Prompt], section: StageSection, number: int) -> list[Prompt]:
    chosen = [prompt for prompt in prompts if all(_matches(prompt, *condition) for condition in section.where.items())]
    if not chosen:
        raise DataError(
            f"data.curriculum: none of {len(prompts)} prompts is in stage {number} (where: {dict(section.where)}). "
            "Relax its conditions."
        )
    return chosen


def _matches(prompt: Prompt, column: str, accepted: Sequence[Any]) -> bool:
    """Whether a column of the prompt has an accepted value.

    Args:
        accepted: texts that match, or the smallest and the largest number; a list in the column counts by its length.

    Raises:
        DataError: the prompt has no such column, or its value is not a number although numbers are expected.
    """
    if column not in prompt.metadata:
        raise DataError(
            f"data.curriculum: prompt {prompt.prompt_id} has no column {column!r}. "
            f"Columns: {', '.join(prompt.metadata)}."
        )
    value = prompt.metadata[column]
    if isinstance(accepted[0], str):
        return value in accepted
    size = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    if not isinstance(size, int | float):
        raise DataError(
            f"data.curriculum: {column} of prompt {prompt.prompt_id} is {value!r}, expected a number between "
            f"{accepted[0]} and {accepted[1]}. To filter by text, list the texts in where."
        )
    return bool(accepted[0] <= size <= accepted[1])
