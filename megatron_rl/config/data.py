"""Data sources, prompts and curriculum."""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RowsSection:
    """Where rows come from."""

    kind: str
    """jsonl | parquet | datasets | task, or package.module:symbol of a source."""
    path: str | None = None
    """File, folder or hub id; for kind=task the task's name."""
    name: str | None = None
    """Configuration of a hub data set, for instance "main" of openai/gsm8k."""
    split: str = "train"
    """Split of a data set or of a generated task."""
    revision: str | None = None
    """Of a data set on the hub, a tag or commit; null: the newest."""
    limit: int | None = None
    """Use only the first so many rows."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a generated task or of an own source."""
    schema: str | None = None
    """Published schema of the rows (docs/data.md), which then have the columns prompt, answer, demonstration, source
    and licence as well; null: rows are as they are."""
    allow_noncommercial: bool = False
    """Read a data set whose licence forbids commercial use."""

    def __post_init__(self) -> None:
        positive("data source", self, "limit")
        require(
            self.path is not None or ":" in self.kind,
            "data source path",
            self.path,
            f"a path for kind={self.kind}",
            "Set data.train.path (and data.validation.path).",
        )


@dataclass(frozen=True, kw_only=True)
class SourceSection(RowsSection):
    """Where prompts come from and which columns hold what."""

    prompt_field: str = "prompt"
    """Column of the prompt: a string, or a list of {role, content} messages."""
    answer_field: str | None = "answer"
    """Column of the reference answer; null when the reward needs none."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer inside the answer column."""
    demonstration_field: str | None = None
    """Column of the demonstration to imitate (supervised fine-tuning)."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One stage of a curriculum, from a step on until the next stage begins."""

    from_step: int
    """First step; 1 for the first stage."""
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Column -> [least, most] of numbers, or the texts that it may have; a list in a column counts by its length."""
    max_new_tokens: int | None = None
    """Longest response; null: rollout.max_new_tokens."""

    def __post_init__(self) -> None:
        positive("data.curriculum", self, "from_step", "max_new_tokens")
        for column, wanted in self.where.items():
            numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in wanted]
            is_range = all(numbers) and len(wanted) == 2 and wanted[0] <= wanted[1]
            require(
                bool(wanted) and (is_range or all(isinstance(value, str) for value in wanted)),
                f"data.curriculum where.{column}",
                wanted,
                "[least, most], or a list of texts",
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Prompts for training and evaluation."""

    train: SourceSection
    """Training prompts."""
    validation: SourceSection | None = None
    """Held-out prompts for evaluation during the run."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens."""
    on_overlong_prompt: Literal["drop", "error"] = "drop"
    """Drop longer prompts (counted and reported) or stop."""
    chat_template: Literal["auto", "rendered", "none"] = "auto"
    """auto: the tokenizer's chat template when it has one; rendered: it has been applied already, as in the prompts of
    recorded rollouts; none: prompts are plain text."""
    system_prompt: str | None = None
    """System message put before every prompt; needs a chat template."""
    shuffle: bool = True
    """New order every epoch, from the run's seed."""
    curriculum: list[StageSection] = field(default_factory=list)
    """Stages in which prompts are chosen and responses bounded; empty: all prompts from the beginning."""

    def __post_init__(self) -> None:
        positive("data", self, "max_prompt_tokens")
        steps = [stage.from_step for stage in self.curriculum]
        require(
            not steps or (steps[0] == 1 and all(a < b for a, b in itertools.pairwise(steps))),
            "data.curriculum from_step",
            steps,
            "1 in the first stage, more in each that follows",
        )
