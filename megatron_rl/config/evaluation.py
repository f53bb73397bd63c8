"""Configuration of python -m megatron_rl.evaluate: the suite, and its tasks and templates with one file each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_rl.config.checks import positive, require
from megatron_rl.config.data import RowsSection
from megatron_rl.config.load import load_as
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.config.schema import ModelSection
from megatron_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FewShotSection:
    """Few-shot examples before the question."""

    count: int
    """Number of examples; the first matching rows are used."""
    template: str
    """Template of an example: text with {column} for columns of the example's row."""
    rows: RowsSection
    """Source of the examples."""
    preamble: str = ""
    """Text before the first example, with {column} for columns of the first example's row."""
    same: str | None = None
    """Column, for instance subject, in which an example must have the same value as the question; null: any row is an
    example."""

    def __post_init__(self) -> None:
        positive("few_shot", self, "count")


@dataclass(frozen=True, kw_only=True)
class TaskSamplingSection:
    """Sampling of responses to benchmark questions."""

    num_samples: int = 1
    """Responses to each question (k of avg@k)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass to sample from; 1.0 is off."""
    max_new_tokens: int = 2048
    """Longest response, in tokens."""
    stop: list[str] = field(default_factory=list)
    """Stop strings: a response is cut before the first of them."""

    def __post_init__(self) -> None:
        positive("sampling", self, "num_samples", "max_new_tokens")
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class LikelihoodSection:
    """Multiple choice by log-likelihood: the choice with the highest one is the answer; nothing is sampled."""

    of: Literal["letters", "choices"] = "letters"
    """Continuation of the prompt whose log-likelihood is computed. letters: the letter of a choice; choices: its
    text."""
    before: str = " "
    """Text between the prompt and the continuation."""
    normalize: Literal["none", "characters"] = "none"
    """characters: divide the log-likelihood of a choice by its length in characters (acc_norm of
    lm-evaluation-harness); none: do not divide."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A benchmark task: one file in configs/eval/tasks."""

    name: str
    """Name of the task in results and reports."""
    version: int
    """Version of the task; raised with every change that can change results."""
    source: str
    """Origin of the evaluation protocol, for instance a paper or repository."""
    data: RowsSection
    """Source of the questions."""
    subsets: list[str] = field(default_factory=list)
    """Configuration names of the hub data set that make up the task; each row gets its name in the column subset, which
    a local file must have already. Empty: data.name alone."""
    num_questions: int | None = None
    """Number of questions in the published set; a different number is reported. null: unknown."""
    prompt: str
    """Prompt template: text with {column} for columns of the row; {choices} is replaced by the lettered choices, one
    per line."""
    lines: dict[str, str] = field(default_factory=dict)
    """Name in the prompt template -> column with a list of texts, which are inserted one per line."""
    question: str | None = None
    """Prompt template without instructions, inserted as {question} into the templates of a suite; null: the task cannot
    be used with templates."""
    choices_field: str | None = None
    """Column with the list of choices; answer_field then holds the index of the correct choice, from 0, or its letter.
    null: none."""
    wrong_choices: list[str] = field(default_factory=list)
    """Columns of the wrong choices; answer_field holds the correct one. The order is random for each question and the
    same in every evaluation."""
    answer_field: str = "answer"
    """Column of the reference answer; if it holds a list, every element is accepted."""
    answer_pattern: str | None = None
    """Regular expression whose first group, in the last match, is the reference answer inside the text of answer_field;
    null: the whole text."""
    answer_in_box: bool = False
    """true: the reference answer is inside the last \\boxed{} of the text of answer_field."""
    group_field: str | None = None
    """Column by whose values results are also reported, for instance subject; null: none."""
    few_shot: FewShotSection | None = None
    """Few-shot examples before the question; null: none."""
    chat: bool = True
    """true: send the prompt as a user message if the tokenizer has a chat template; false: send it as plain text to be
    continued."""
    system_prompt: str | None = None
    """System message; null: none."""
    sampling: TaskSamplingSection = field(default_factory=TaskSamplingSection)
    """Sampling of the responses."""
    likelihood: LikelihoodSection | None = None
    """Choose by log-likelihood instead of sampling; the letter of the most likely choice is the response. null: sample
    responses."""
    scorer: RewardFunctionSection
    """Reward function that grades a response with 0 or 1."""
    gold_response: str = "\\boxed{{gold}}"
    """Response that consists of the reference answer, {gold}, alone; the scorer must grade it as correct (a check of
    scorer and data)."""
    answer_shown_by: str | None = None
    """Regular expression whose first group, in the last match, is the final answer of a response, for majority voting;
    null: the content of the last \\boxed{}."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """Values of k for pass@k, each at most sampling.num_samples."""
    majority: bool = True
    """true: report maj@k (majority voting)."""

    def __post_init__(self) -> None:
        for key in ("answer_shown_by", "answer_pattern"):
            pattern = getattr(self, key)
            try:
                has_group = pattern is None or re.compile(pattern).groups > 0
            except re.error as error:
                raise ConfigError(f"{key}={pattern!r} is not a regular expression: {error}.") from error
            require(has_group, key, repr(pattern), "a regular expression with a group (…) for the answer")
        if self.likelihood is not None:
            has_choices = self.choices_field is not None or bool(self.wrong_choices)
            require(has_choices, "likelihood", "set", "null, or choices_field or wrong_choices to be set as well")
            require(
                self.sampling.num_samples == 1, "sampling.num_samples", self.sampling.num_samples, "1 with likelihood"
            )


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """A prompt template that replaces the prompt of tasks: one file in configs/eval/templates."""

    name: str
    """Name of the template; its results are reported as TASK@NAME."""
    source: str
    """Origin of the template, for instance a paper or repository."""
    text: str
    """Text of the prompt, with {question} for the task's question."""
    chat: bool = False
    """true: send the text as a user message if the tokenizer has a chat template; false: send it as plain text to be
    continued."""
    stop: list[str] = field(default_factory=list)
    """Stop strings, in place of the task's sampling.stop: a response is cut before the first of them."""
    few_shot: FewShotSection | None = None
    """Few-shot examples before the text, in place of the task's; null: none."""
    scorer: RewardFunctionSection | None = None
    """Reward function that grades a response with 0 or 1; null: the task's scorer."""
    gold_response: str | None = None
    """Response that consists of the reference answer, {gold}, alone, to check the scorer; null: the task's
    gold_response."""
    answer_shown_by: str | None = None
    """Regular expression whose first group is the final answer of a response; null: the task's answer_shown_by."""

    def __post_init__(self) -> None:
        require("{question}" in self.text, "text", repr(self.text), "a text with {question}")


@dataclass(frozen=True, kw_only=True)
class EvalRunSection:
    """Name, output folder and seed of an evaluation."""

    name: str
    """Name of the evaluation, shown in the reports."""
    output_dir: str
    """Folder for responses, results and reports."""
    seed: int = 0
    """Random seed of the sampling."""


@dataclass(frozen=True, kw_only=True)
class EvalEngineSection:
    """The inference engine that generates the responses."""

    name: Literal["embedded", "vllm", "sglang", "openai"] = "embedded"
    """Inference engine. embedded, vllm, sglang: as rollout.engine of training; openai: an endpoint that speaks the
    OpenAI protocol."""
    url: str | None = None
    """URL of the endpoint with engine.name=openai, for instance http://127.0.0.1:8000/v1; model.path is then the name
    of the model at the endpoint."""
    tensor_parallel_size: int = 1
    """Adjacent ranks that form one engine (tensor parallelism)."""
    max_num_sequences: int = 256
    """Largest number of sequences that one engine decodes at a time (vLLM's max_num_seqs); with engine.name=openai the
    number of concurrent requests."""
    timeout_s: float = 600.0
    """Longest time in seconds that an engine in a process of its own, or an endpoint, may take for a response."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the constructor of vLLM or SGLang."""

    def __post_init__(self) -> None:
        positive("engine", self, "tensor_parallel_size", "max_num_sequences")
        is_remote = self.name == "openai"
        require(
            is_remote == (self.url is not None), "engine.url", self.url, "a URL with engine.name=openai, null otherwise"
        )
        require(
            not is_remote or (self.tensor_parallel_size == 1 and not self.options),
            "engine.tensor_parallel_size and engine.options",
            (self.tensor_parallel_size, self.options),
            "1 and no options with engine.name=openai",
        )
        require(self.timeout_s > 0, "engine.timeout_s", self.timeout_s, "more than 0")


@dataclass(frozen=True, kw_only=True)
class EvalSamplingSection:
    """Sampling settings that replace those of every task in the suite."""

    num_samples: int | None = None
    """Responses to each question (k of avg@k); null: each task's own."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy decoding. null: each task's own."""
    top_p: float | None = None
    """Nucleus sampling: probability mass to sample from; null: each task's own."""
    max_new_tokens: int | None = None
    """Longest response, in tokens; null: each task's own."""


@dataclass(frozen=True, kw_only=True)
class GradingSection:
    """The worker processes that grade responses."""

    num_workers: int = 1
    """Grading worker processes on each rank."""
    timeout_s: float = 20.0
    """Hard time limit for grading one response, in seconds; beyond it the worker is killed and the response counts as
    wrong."""
    memory_limit_gb: float = 4.0
    """Address-space limit of a grading worker, in GiB."""

    def __post_init__(self) -> None:
        positive("grading", self, "num_workers")
        require(self.timeout_s > 0, "grading.timeout_s", self.timeout_s, "more than 0 seconds")
        require(self.memory_limit_gb > 0, "grading.memory_limit_gb", self.memory_limit_gb, "more than 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A benchmark suite: the tasks, and the model and engine that are evaluated."""

    run: EvalRunSection
    model: ModelSection
    tasks: list[str]
    """Task files, relative to this configuration file."""
    engine: EvalEngineSection = field(default_factory=EvalEngineSection)
    sampling: EvalSamplingSection = field(default_factory=EvalSamplingSection)
    grading: GradingSection = field(default_factory=GradingSection)
    templates: list[str] = field(default_factory=list)
    """Template files, relative to this configuration file; every task is evaluated with each of them. Empty: every task
    uses its own prompt."""
    temperatures: list[float] = field(default_factory=list)
    """Temperatures; every task is evaluated at each of them. Empty: every task uses its own."""
    pass_at: list[int] = field(default_factory=list)
    """Values of k for pass@k, in place of those of the tasks; empty: each task's own."""
    limit: int | None = None
    """Number of questions per task, the first ones; the report mentions it. null: all."""
    data: dict[str, str] = field(default_factory=dict)
    """Task name -> local file (.jsonl, .parquet) or folder that replaces the task's data set."""
    examples: dict[str, str] = field(default_factory=dict)
    """Task or template name -> local file (.jsonl, .parquet) or folder that replaces the rows of its few-shot
    examples."""
    console: Literal["plain", "silent"] = "plain"
    """plain: print progress lines with the time left; silent: print nothing."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one file")
        different = len(set(self.temperatures)) == len(self.temperatures)
        require(different, "temperatures", self.temperatures, "every temperature once")
        positive("", self, "limit")


PromptVariant = TypeVar("PromptVariant", TaskConfig, TemplateConfig)


def load_evaluation(path: str | Path, overrides: list[str]) -> tuple[EvalConfig, list[TaskConfig]]:
    """Return a suite and its tasks, one for each template and temperature, with the suite's replacements applied.

    Args:
        path: YAML file of the suite.
        overrides: key=value texts.

    Raises:
        ConfigError: a file is missing or wrong, or two tasks or templates have the same name.
    """
    config = load_as(EvalConfig, path, overrides)
    folder = Path(path).parent
    tasks = [_with_examples(load_as(TaskConfig, folder / name), config.examples) for name in config.tasks]
    templates = [_with_examples(load_as(TemplateConfig, folder / name), config.examples) for name in config.templates]
    for kind, variants in (("task", tasks), ("template", templates)):
        names = [variant.name for variant in variants]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ConfigError(f"{path}: several {kind}s have the name {duplicates[0]!r}. List it once, or rename one.")
    names = [task.name for task in tasks]
    unknown = sorted(set(config.data) - set(names))
    if unknown:
        raise ConfigError(f"data.{unknown[0]}: the suite has no task of that name. Tasks: {', '.join(names)}.")
    all_variants: list[TaskConfig | TemplateConfig] = [*tasks, *templates]
    with_examples = [variant.name for variant in all_variants if variant.few_shot is not None]
    unknown = sorted(set(config.examples) - set(with_examples))
    if unknown:
        raise ConfigError(
            f"examples.{unknown[0]}: the suite has no task or template of that name with few-shot examples. "
            f"With examples: {', '.join(with_examples) or 'none'}."
        )
    return config, [
        variant
        for task in tasks
        for variant in _variants(_with_suite_settings(task, config), templates, config.temperatures)
    ]


def _with_examples(variant: PromptVariant, examples: Mapping[str, str]) -> PromptVariant:
    """Replace the few-shot rows of a task or template by its local file, if ``examples`` names one."""
    if variant.few_shot is None or variant.name not in examples:
        return variant
    rows = local_rows(variant.few_shot.rows, examples[variant.name])
    return replace(variant, few_shot=replace(variant.few_shot, rows=rows))


def _variants(
    task: TaskConfig, templates: Sequence[TemplateConfig], temperatures: Sequence[float]
) -> Iterator[TaskConfig]:
    """Yield the task with every template and at every temperature, named TASK@TEMPLATE@TEMPERATURE."""
    by_template = [_with_template(task, template) for template in templates] or [task]
    for variant in by_template:
        if not temperatures or task.likelihood is not None:  # likelihoods do not depend on the temperature
            yield variant
            continue
        for temperature in temperatures:
            sampling = replace(variant.sampling, temperature=temperature)
            yield replace(variant, name=f"{variant.name}@{temperature:g}", sampling=sampling)


def _with_template(task: TaskConfig, template: TemplateConfig) -> TaskConfig:
    require(
        task.question is not None and task.likelihood is None,
        f"templates with task {task.name}: question",
        task.question,
        "the question without instructions, with {columns}, in a task without likelihood",
    )
    assert task.question is not None
    return replace(
        task,
        name=f"{task.name}@{template.name}",
        prompt=template.text.replace("{question}", task.question),
        chat=template.chat,
        system_prompt=task.system_prompt if template.chat else None,
        few_shot=template.few_shot,
        scorer=template.scorer or task.scorer,
        gold_response=template.gold_response or task.gold_response,
        answer_shown_by=template.answer_shown_by or task.answer_shown_by,
        sampling=replace(task.sampling, stop=list(template.stop)),
    )


def _with_suite_settings(task: TaskConfig, config: EvalConfig) -> TaskConfig:
    """Replace the sampling, data and pass@k settings of a task by those of the suite."""
    overrides = {name: value for name, value in vars(config.sampling).items() if value is not None}
    sampling = task.sampling if task.likelihood is not None else replace(task.sampling, **overrides)
    data = task.data
    if task.name in config.data:
        data = local_rows(data, config.data[task.name])
    if config.limit is not None:
        data = replace(data, limit=config.limit)
    pass_at = sorted({k for k in config.pass_at or task.pass_at if k <= sampling.num_samples} | {1})
    return replace(task, sampling=sampling, data=data, pass_at=pass_at)


def local_rows(data: RowsSection, path: str) -> RowsSection:
    """Return the source with a local file (.jsonl, .parquet) or folder in place of its data set."""
    kinds = {".jsonl": "jsonl", ".parquet": "parquet"}
    return replace(data, kind=kinds.get(Path(path).suffix, "datasets"), path=path, name=None)
