"""Configuration of tools/data/curate.py, which turns problems into verified data."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.checks import positive, require
from megatron_rl.config.data import RowsSection
from megatron_rl.config.evaluation import EvalEngineSection, EvalRunSection, GradingSection, TaskSamplingSection
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.config.schema import ModelSection

LABELS = {"easy": 0.7, "medium": 0.3, "hard": 0.0}


@dataclass(frozen=True, kw_only=True)
class ContaminationSection:
    """Decontamination: problems that share an n-gram with a benchmark are dropped."""

    tasks: list[str] = field(default_factory=list)
    """Task files of the benchmarks (configs/eval/tasks), relative to this configuration file."""
    data: dict[str, str] = field(default_factory=dict)
    """Task name -> local file (.jsonl, .parquet) or folder that replaces the task's data set."""
    ngram: int = 8
    """Length of an n-gram in words."""

    def __post_init__(self) -> None:
        positive("contamination", self, "ngram")


@dataclass(frozen=True, kw_only=True)
class GenerateSection:
    """The model that solves the problems, and the reward function that grades its responses."""

    model: ModelSection
    prompt: str = "{prompt_text}"
    """Prompt template: text with {column} for columns of the row; {prompt_text} is the prompt as text (of a list of
    messages, the user's)."""
    system_prompt: str | None = None
    """System message; null: none."""
    chat: bool = True
    """true: send the prompt as a user message if the tokenizer has a chat template; false: send it as plain text to be
    continued."""
    engine: EvalEngineSection = field(default_factory=EvalEngineSection)
    sampling: TaskSamplingSection = field(
        default_factory=lambda: TaskSamplingSection(num_samples=4, temperature=0.6, top_p=0.95, max_new_tokens=16384)
    )
    scorer: RewardFunctionSection
    """Reward function that grades a response with 0 or 1."""
    gold_response: str = "\\boxed{{gold}}"
    """Response that consists of the reference answer, {gold}, alone; the scorer must grade it as correct (a check of
    scorer and data)."""
    grading: GradingSection = field(default_factory=GradingSection)


@dataclass(frozen=True, kw_only=True)
class PassRateSection:
    """Filter by pass rate: problems that all samples or no samples solve give little training signal."""

    above: float = 0.0
    """Keep problems whose pass rate (fraction of correct samples) is more than this."""
    below: float = 1.0
    """Keep problems whose pass rate (fraction of correct samples) is less than this; a value above 1 also keeps
    problems that every sample solves."""

    def __post_init__(self) -> None:
        require(self.above < self.below, "pass_rate.below", self.below, f"more than pass_rate.above={self.above}")


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Format of the curated data."""

    schema: Literal["problems", "openr1_math", "conversations"] = "problems"
    """Columns of the output. problems: those that data.train of a run reads; openr1_math, conversations: published
    schemas (docs/data.md)."""


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Read problems, drop contaminated and duplicate ones, generate and verify responses, filter by pass rate."""

    run: EvalRunSection
    data: RowsSection
    """Source of the problems: rows with the columns prompt and answer, or of a published schema."""
    contamination: ContaminationSection = field(default_factory=ContaminationSection)
    near_duplicates: float | None = 95.0
    """Similarity, from 0 to 100, from which a problem counts as a duplicate of an earlier one and is dropped; null: no
    problem is dropped."""
    generate: GenerateSection | None = None
    """Generation of responses; null: write all problems that remain, without responses."""
    pass_rate: PassRateSection = field(default_factory=PassRateSection)
    difficulty: dict[str, float] = field(default_factory=dict)
    """Difficulty label -> smallest pass rate of its problems; a problem gets the label with the largest bound that it
    reaches. Empty: easy from 0.7, medium from 0.3, hard below."""
    output: OutputSection = field(default_factory=OutputSection)

    def __post_init__(self) -> None:
        valid = self.near_duplicates is None or 0 < self.near_duplicates <= 100
        require(valid, "near_duplicates", self.near_duplicates, "a similarity above 0 and at most 100, or null")
        are_bounds = 0.0 in self.labels.values() and len(set(self.labels.values())) == len(self.labels)
        require(are_bounds, "difficulty", self.difficulty, "different pass rates, one of them 0.0")
        needs_responses = self.output.schema != "problems" and self.generate is None
        require(not needs_responses, "output.schema", self.output.schema, "problems without a generate section")

    @property
    def labels(self) -> dict[str, float]:
        """``difficulty`` with its default filled in."""
        return self.difficulty or LABELS
