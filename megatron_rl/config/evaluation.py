"""The configuration of python -m megatron_rl.evaluate, and of the tasks that it names, one file each."""

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
    """Examples before the question."""

    count: int
    """How many, the first ones."""
    template: str
    """Text of an example, with {column} of its row."""
    rows: RowsSection
    """Where they come from."""
    preamble: str = ""
    """Text before the first example, with {column} of its row."""
    same: str | None = None
    """Only rows that have what the question's row has in this column, for instance subject; null: any."""

    def __post_init__(self) -> None:
        positive("few_shot", self, "count")


@dataclass(frozen=True, kw_only=True)
class TaskSamplingSection:
    """How answers are sampled."""

    num_samples: int = 1
    """Answers to each question (k of avg@k)."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus."""
    max_new_tokens: int = 2048
    """Longest answer."""
    stop: list[str] = field(default_factory=list)
    """Texts before which an answer ends."""

    def __post_init__(self) -> None:
        positive("sampling", self, "num_samples", "max_new_tokens")
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0, to 1")


@dataclass(frozen=True, kw_only=True)
class LikelihoodSection:
    """The most likely choice is the answer; nothing is sampled."""

    of: Literal["letters", "choices"] = "letters"
    """What stands behind the prompt: the letters of the choices, or the choices themselves."""
    before: str = " "
    """Text between prompt and choice."""
    normalize: Literal["none", "characters"] = "none"
    """Divide the log-likelihood of a choice by its length; acc_norm of lm-evaluation-harness is characters."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A benchmark: one file in configs/eval/tasks."""

    name: str
    """Under which its results stand."""
    version: int
    """Raised whenever anything changes that changes results."""
    source: str
    """Where the protocol comes from."""
    data: RowsSection
    """The questions."""
    subsets: list[str] = field(default_factory=list)
    """Configurations of the hub data set that make up the task, each row with its name in the column subset; in a local
    file that column says which one a row is of. Empty: data.name alone."""
    num_questions: int | None = None
    """As many as the published set has; another number is reported. null: unknown."""
    prompt: str
    """Text of a question, with {column} of its row; {choices} are lettered lines of choices_field."""
    lines: dict[str, str] = field(default_factory=dict)
    """Name in the prompt -> column with a list of texts, which stand there as lines."""
    question: str | None = None
    """The same without instructions, for the templates of a suite; null: the task takes none."""
    choices_field: str | None = None
    """Column with a list of choices; the answer column is then the place of the right one, or its letter."""
    wrong_choices: list[str] = field(default_factory=list)
    """Columns of wrong choices, among which the answer column is the right one; their order is drawn for each
    question, the same in every evaluation."""
    answer_field: str = "answer"
    """Column of the reference answer; a list means that any of them is right."""
    answer_pattern: str | None = None
    """Regular expression whose first group, last match, is the answer inside that column."""
    answer_in_box: bool = False
    """The answer is in the last \\boxed{} of that column."""
    group_field: str | None = None
    """Column by which results are also given, for instance subject."""
    few_shot: FewShotSection | None = None
    """Examples before the question; null: none."""
    chat: bool = True
    """Ask as a user's message where the tokenizer has a chat template; false: plain text to be continued."""
    system_prompt: str | None = None
    """System message; null: none."""
    sampling: TaskSamplingSection = field(default_factory=TaskSamplingSection)
    likelihood: LikelihoodSection | None = None
    """Take the most likely choice in the place of sampling; its letter is the response. null: sample."""
    scorer: RewardFunctionSection
    """A reward function of 0 and 1."""
    gold_response: str = "\\boxed{{gold}}"
    """A response that says the reference answer, {gold}, and nothing else: it has to be right by the scorer."""
    answer_shown_by: str | None = None
    """Regular expression whose first group, last match, is a response's answer, for majority votes; null: what is in
    the last \\boxed{}."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """k of pass@k, each at most num_samples."""
    majority: bool = True
    """Report maj@k."""

    def __post_init__(self) -> None:
        for key in ("answer_shown_by", "answer_pattern"):
            pattern = getattr(self, key)
            try:
                has_group = pattern is None or re.compile(pattern).groups > 0
            except re.error as error:
                raise ConfigError(f"{key}={pattern!r} is no regular expression: {error}.") from error
            require(has_group, key, repr(pattern), "a regular expression with a group (…) for the answer")
        if self.likelihood is not None:
            has_choices = self.choices_field is not None or bool(self.wrong_choices)
            require(has_choices, "likelihood", "set", "null, or choices_field or wrong_choices beside it")
            require(
                self.sampling.num_samples == 1, "sampling.num_samples", self.sampling.num_samples, "1 by likelihood"
            )


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """Another way to ask the questions of tasks: one file in configs/eval/templates."""

    name: str
    source: str
    """Where it comes from."""
    text: str
    """What the model sees, with {question}."""
    chat: bool = False
    """Ask as a user's message where the tokenizer has a chat template; false: the text is all."""
    stop: list[str] = field(default_factory=list)
    """Texts before which an answer ends."""
    few_shot: FewShotSection | None = None
    """Examples before the text; null: none."""
    scorer: RewardFunctionSection | None = None
    """In the place of the task's; null: the task's."""
    gold_response: str | None = None
    """In the place of the task's; null: the task's."""
    answer_shown_by: str | None = None
    """In the place of the task's; null: the task's."""

    def __post_init__(self) -> None:
        require("{question}" in self.text, "text", repr(self.text), "a text with {question}")


@dataclass(frozen=True, kw_only=True)
class EvalRunSection:
    """What this evaluation is called and where it writes."""

    name: str
    """Shown in the reports."""
    output_dir: str
    """Folder for answers and reports."""
    seed: int = 0
    """Of the sampling."""


@dataclass(frozen=True, kw_only=True)
class EvalEngineSection:
    """Who answers."""

    name: Literal["embedded", "vllm", "sglang", "openai"] = "embedded"
    """Inference engine, as rollout.engine of training; openai: an endpoint of that protocol."""
    url: str | None = None
    """Of the endpoint, for instance http://127.0.0.1:8000/v1; model.path is then the model's name there."""
    tensor_parallel_size: int = 1
    """Neighbouring ranks that make up one engine."""
    max_num_sequences: int = 256
    """Sequences decoded at a time by an engine."""
    timeout_s: float = 600.0
    """Longest time that an engine in other processes may take for an answer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed on to vLLM's or SGLang's own constructor."""

    def __post_init__(self) -> None:
        positive("engine", self, "tensor_parallel_size", "max_num_sequences")
        is_remote = self.name == "openai"
        require(
            is_remote == (self.url is not None), "engine.url", self.url, "a url with engine.name=openai, and only then"
        )
        require(
            not is_remote or (self.tensor_parallel_size == 1 and not self.options),
            "engine.tensor_parallel_size and engine.options",
            (self.tensor_parallel_size, self.options),
            "nothing with engine.name=openai",
        )
        require(self.timeout_s > 0, "engine.timeout_s", self.timeout_s, "more than 0")


@dataclass(frozen=True, kw_only=True)
class EvalSamplingSection:
    """What replaces the tasks' own sampling; null: theirs."""

    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class GradingSection:
    """The workers that grade."""

    num_workers: int = 1
    """Processes on each rank."""
    timeout_s: float = 20.0
    """Hard limit for one answer, in seconds; the worker is killed beyond it, and the answer counts as wrong."""
    memory_limit_gb: float = 4.0
    """Address-space limit of a worker, in GiB."""

    def __post_init__(self) -> None:
        positive("grading", self, "num_workers")
        require(self.timeout_s > 0, "grading.timeout_s", self.timeout_s, "more than 0 seconds")
        require(self.memory_limit_gb > 0, "grading.memory_limit_gb", self.memory_limit_gb, "more than 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A suite of tasks and who is asked."""

    run: EvalRunSection
    model: ModelSection
    tasks: list[str]
    """Files of tasks, relative to this one."""
    engine: EvalEngineSection = field(default_factory=EvalEngineSection)
    sampling: EvalSamplingSection = field(default_factory=EvalSamplingSection)
    grading: GradingSection = field(default_factory=GradingSection)
    templates: list[str] = field(default_factory=list)
    """Files of templates, relative to this one; every task is asked by each of them. Empty: by its own prompt."""
    temperatures: list[float] = field(default_factory=list)
    """Every task is asked at each of them. Empty: at its own."""
    pass_at: list[int] = field(default_factory=list)
    """k of pass@k in the place of the tasks' own; empty: theirs."""
    limit: int | None = None
    """Only the first so many questions of each task; the report says so."""
    data: dict[str, str] = field(default_factory=dict)
    """Task name -> local file (.jsonl, .parquet) or folder that replaces its data set."""
    examples: dict[str, str] = field(default_factory=dict)
    """Task or template name -> local file or folder that replaces the rows of its few_shot."""
    console: Literal["plain", "silent"] = "plain"
    """Progress with the time left, in lines."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one file")
        different = len(set(self.temperatures)) == len(self.temperatures)
        require(different, "temperatures", self.temperatures, "different ones")
        positive("", self, "limit")


PromptVariant = TypeVar("PromptVariant", TaskConfig, TemplateConfig)


def load_evaluation(path: str | Path, overrides: list[str]) -> tuple[EvalConfig, list[TaskConfig]]:
    """A suite and its tasks as they are asked, with all that the suite replaces.

    Raises:
        ConfigError: a file is missing or wrong, or two tasks have one name.
    """
    config = load_as(EvalConfig, path, overrides)
    folder = Path(path).parent
    own = [_with_examples(load_as(TaskConfig, folder / name), config.examples) for name in config.tasks]
    templates = [_with_examples(load_as(TemplateConfig, folder / name), config.examples) for name in config.templates]
    for kind, found in (("task", own), ("template", templates)):
        names = [one.name for one in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{path}: several {kind}s are called {twice[0]!r}. Name each once, or rename one.")
    names = [task.name for task in own]
    unknown = sorted(set(config.data) - set(names))
    if unknown:
        raise ConfigError(f"data.{unknown[0]}: there is no such task here. Tasks: {', '.join(names)}.")
    askings: list[TaskConfig | TemplateConfig] = [*own, *templates]
    with_examples = [one.name for one in askings if one.few_shot is not None]
    unknown = sorted(set(config.examples) - set(with_examples))
    if unknown:
        raise ConfigError(
            f"examples.{unknown[0]}: nothing of that name has examples here. Those that have: "
            f"{', '.join(with_examples) or 'none'}."
        )
    return config, [
        asked for task in own for asked in _variants(_adapted(task, config), templates, config.temperatures)
    ]


def _with_examples(asked: PromptVariant, examples: Mapping[str, str]) -> PromptVariant:
    """The task or template with local examples, where some are named."""
    if asked.few_shot is None or asked.name not in examples:
        return asked
    return replace(asked, few_shot=replace(asked.few_shot, rows=local(asked.few_shot.rows, examples[asked.name])))


def _variants(
    task: TaskConfig, templates: Sequence[TemplateConfig], temperatures: Sequence[float]
) -> Iterator[TaskConfig]:
    """The task by every template and at every temperature, named TASK@TEMPLATE@TEMPERATURE."""
    by_template = [_by_template(task, template) for template in templates] or [task]
    for one in by_template:
        if not temperatures or task.likelihood is not None:  # likelihoods are the same at each
            yield one
            continue
        for temperature in temperatures:
            sampling = replace(one.sampling, temperature=temperature)
            yield replace(one, name=f"{one.name}@{temperature:g}", sampling=sampling)


def _by_template(task: TaskConfig, template: TemplateConfig) -> TaskConfig:
    require(
        task.question is not None and task.likelihood is None,
        f"templates with task {task.name}: question",
        task.question,
        "the bare question, with {columns}, in a task that is not by likelihood",
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


def _adapted(task: TaskConfig, config: EvalConfig) -> TaskConfig:
    """The task with the suite's sampling and data in the place of its own."""
    given = {name: value for name, value in vars(config.sampling).items() if value is not None}
    sampling = task.sampling if task.likelihood is not None else replace(task.sampling, **given)
    data = task.data
    if task.name in config.data:
        data = local(data, config.data[task.name])
    if config.limit is not None:
        data = replace(data, limit=config.limit)
    pass_at = sorted({k for k in config.pass_at or task.pass_at if k <= sampling.num_samples} | {1})
    return replace(task, sampling=sampling, data=data, pass_at=pass_at)


def local(data: RowsSection, path: str) -> RowsSection:
    """The same rows from a local file (.jsonl, .parquet) or folder."""
    kinds = {".jsonl": "jsonl", ".parquet": "parquet"}
    return replace(data, kind=kinds.get(Path(path).suffix, "datasets"), path=path, name=None)
