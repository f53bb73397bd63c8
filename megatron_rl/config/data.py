"""Configuration of data sources, prompts and curriculum."""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RowsSection:
    """A source of rows."""

    kind: str
    """jsonl, parquet: a file; datasets: a Hugging Face data set; task: a generated task; or package.module:symbol of a
    function that returns rows."""
    path: str | None = None
    """File, folder or Hugging Face hub id; with kind=task the name of the task."""
    name: str | None = None
    """Configuration name of a hub data set, for instance "main" of openai/gsm8k."""
    split: str = "train"
    """Split of a data set or of a generated task."""
    revision: str | None = None
    """Tag or commit of a hub data set; null: the newest."""
    limit: int | None = None
    """Number of rows to read, the first ones; null: all."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a generated task (kind=task) or of the function named by kind=package.module:symbol."""
    schema: str | None = None
    """Published schema of the rows (docs/data.md), from which the columns prompt, answer, demonstration, source and
    licence are added; null: rows are read unchanged."""
    allow_noncommercial: bool = False
    """true: also read data sets whose licence forbids commercial use; false: reject them."""

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
    """A source of prompts, and the columns to read from it."""

    prompt_field: str = "prompt"
    """Column of the prompt: a string, or a list of {role, content} messages."""
    answer_field: str | None = "answer"
    """Column of the reference answer; null: the reward needs no reference answer."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the reference answer inside the text of answer_field; null: the whole
    text."""
    demonstration_field: str | None = None
    """Column of the demonstration to imitate, for supervised fine-tuning (rollout.source=demonstrations); null:
    none."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One stage of a curriculum; it lasts until the next stage begins."""

    from_step: int
    """First step of the stage; 1 for the first stage."""
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Filter of the prompts: column -> [smallest, largest] value of a number or length of a list, or the list of texts
    that are allowed."""
    max_new_tokens: int | None = None
    """Longest response of the stage, in tokens; null: rollout.max_new_tokens."""

    def __post_init__(self) -> None:
        positive("data.curriculum", self, "from_step", "max_new_tokens")
        for column, allowed in self.where.items():
            numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in allowed]
            is_range = all(numbers) and len(allowed) == 2 and allowed[0] <= allowed[1]
            require(
                bool(allowed) and (is_range or all(isinstance(value, str) for value in allowed)),
                f"data.curriculum where.{column}",
                allowed,
                "[smallest, largest], or a list of texts",
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Prompts for training and validation."""

    train: SourceSection
    """Source of the training prompts (verl's train_files)."""
    validation: SourceSection | None = None
    """Source of the held-out prompts for validation during the run (verl's val_files); null: none."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens (verl's max_prompt_length)."""
    on_overlong_prompt: Literal["drop", "error"] = "drop"
    """What happens to prompts longer than max_prompt_tokens. drop: they are dropped, counted and reported; error: the
    run stops."""
    chat_template: Literal["auto", "rendered", "none"] = "auto"
    """auto: apply the tokenizer's chat template if it has one; rendered: the chat template has been applied already, as
    in the prompts of recorded rollouts; none: prompts are plain text."""
    system_prompt: str | None = None
    """System message put before every prompt; needs a chat template. null: none."""
    shuffle: bool = True
    """true: shuffle prompts anew every epoch, seeded by run.seed; false: keep the order of the source."""
    curriculum: list[StageSection] = field(default_factory=list)
    """Curriculum: stages that filter prompts and limit response lengths; empty: all prompts from the first step."""

    def __post_init__(self) -> None:
        positive("data", self, "max_prompt_tokens")
        steps = [stage.from_step for stage in self.curriculum]
        require(
            not steps or (steps[0] == 1 and all(a < b for a, b in itertools.pairwise(steps))),
            "data.curriculum from_step",
            steps,
            "1 in the first stage, and a larger step in each later stage",
        )
