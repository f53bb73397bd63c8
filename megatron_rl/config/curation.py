"""The configuration of tools/data/curate.py: problems to verified data."""

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
    """Rows that share n-grams with benchmarks are dropped."""

    tasks: list[str] = field(default_factory=list)
    """Files of tasks (configs/eval/tasks), relative to this one."""
    data: dict[str, str] = field(default_factory=dict)
    """Task name -> local file (.jsonl, .parquet) or folder that replaces its data set."""
    ngram: int = 8
    """Words."""

    def __post_init__(self) -> None:
        positive("contamination", self, "ngram")


@dataclass(frozen=True, kw_only=True)
class GenerateSection:
    """Who solves the problems, and who decides whether they are solved."""

    model: ModelSection
    prompt: str = "{prompt_text}"
    """Text of a question, with {column} of its row; {prompt_text} is the prompt, of messages what the user says."""
    system_prompt: str | None = None
    """System message; null: none."""
    chat: bool = True
    """Ask as a user's message where the tokenizer has a chat template; false: plain text to be continued."""
    engine: EvalEngineSection = field(default_factory=EvalEngineSection)
    sampling: TaskSamplingSection = field(
        default_factory=lambda: TaskSamplingSection(num_samples=4, temperature=0.6, top_p=0.95, max_new_tokens=16384)
    )
    scorer: RewardFunctionSection
    """A reward function of 0 and 1."""
    gold_response: str = "\\boxed{{gold}}"
    """A response that says the reference answer, {gold}, and nothing else: it has to be right by the scorer."""
    grading: GradingSection = field(default_factory=GradingSection)


@dataclass(frozen=True, kw_only=True)
class PassRateSection:
    """Problems that are solved by all samples or by none teach little."""

    above: float = 0.0
    """Keep problems whose share of right samples is more than this."""
    below: float = 1.0
    """And less than this; more than 1 keeps those that are always solved."""

    def __post_init__(self) -> None:
        require(self.above < self.below, "pass_rate.below", self.below, f"more than pass_rate.above={self.above}")


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """What is written."""

    schema: Literal["problems", "openr1_math", "conversations"] = "problems"
    """problems: for data.train of a run; the others: published schemas (docs/data.md)."""


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Read, drop what is contaminated or double, generate, verify, keep what is neither too easy nor too hard."""

    run: EvalRunSection
    data: RowsSection
    """Problems with the columns prompt and answer, or of a published schema."""
    contamination: ContaminationSection = field(default_factory=ContaminationSection)
    near_duplicates: float | None = 95.0
    """Similarity from 0 to 100 at which a problem is the same as an earlier one; null: none are dropped."""
    generate: GenerateSection | None = None
    """null: nothing is generated, and all that is left is written."""
    pass_rate: PassRateSection = field(default_factory=PassRateSection)
    difficulty: dict[str, float] = field(default_factory=dict)
    """Label -> smallest pass rate that has it; of several the one with the largest. Empty: easy from 0.7, medium from
    0.3, hard below."""
    output: OutputSection = field(default_factory=OutputSection)

    def __post_init__(self) -> None:
        valid = self.near_duplicates is None or 0 < self.near_duplicates <= 100
        require(valid, "near_duplicates", self.near_duplicates, "a similarity above 0, to 100, or null")
        everything = 0.0 in self.labels.values() and len(set(self.labels.values())) == len(self.labels)
        require(everything, "difficulty", self.difficulty, "different pass rates, one of them 0.0")
        needs_responses = self.output.schema != "problems" and self.generate is None
        require(not needs_responses, "output.schema", self.output.schema, "problems where nothing is generated")

    @property
    def labels(self) -> dict[str, float]:
        """Of difficulty."""
        return self.difficulty or LABELS
