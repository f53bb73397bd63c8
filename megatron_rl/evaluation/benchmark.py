"""A benchmark: a task with its rendered questions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.evaluation.answers import AnswerKey
from megatron_rl.evaluation.generation import RenderedQuestion, choice_texts, render_questions
from megatron_rl.evaluation.grading import Grader
from megatron_rl.evaluation.questions import Question, read_questions


@dataclass(frozen=True)
class Benchmark:
    """A task with its questions."""

    task: TaskConfig
    questions: Sequence[Question]
    rendered: Sequence[RenderedQuestion]
    """The same questions as prompts of the evaluated model."""
    notes: Sequence[str]
    """Warnings for the report, such as a missing part of the data set."""

    def as_lines(self) -> list[dict[str, Any]]:
        """Return the rows of questions.jsonl."""
        return [
            {
                "task": self.task.name,
                "question": rendered.question.index,
                "text": rendered.question.text,
                "answers": list(rendered.question.answers),
                "group": rendered.question.group,
                "asked": rendered.digest,
                "row": dict(rendered.question.row),
            }
            for rendered in self.rendered
        ]

    def key(self, rendered: RenderedQuestion, sample: int) -> AnswerKey:
        """Return the key of one graded answer to a question."""
        return self.task.name, rendered.question.index, sample, rendered.digest


def read_benchmark(task: TaskConfig, config: EvalConfig, tokenizer: Any) -> Benchmark:
    """Read the questions of a task and render them.

    Args:
        task: the benchmark's configuration.
        config: the evaluation's configuration, whose limit appears in the notes.
        tokenizer: of the model; None for an endpoint, which renders prompts itself.

    Raises:
        DataError, ConfigError: see ``read_questions`` and ``render_questions``; also if an endpoint would have to
            return likelihoods of chat messages.
    """
    questions = read_questions(task)
    notes = []
    if task.num_questions is not None and len(questions) != task.num_questions:
        reason = f"limit={config.limit}" if config.limit is not None else "the data differ from the published set"
        notes.append(f"{len(questions)} questions; the published set has {task.num_questions} ({reason})")
    if tokenizer is None:  # the endpoint applies its own
        if task.likelihood is not None and task.chat:
            raise ConfigError(
                f"task {task.name}: an endpoint reports log-probabilities of plain text, not of chat messages. Set "
                "chat=false in the task, or use another engine.name."
            )
        rendered = [
            RenderedQuestion(question=one, prompt=one.text, token_ids=(), choices=choice_texts(task, one))
            for one in questions
        ]
    else:
        rendered = render_questions(task, questions, tokenizer)
    return Benchmark(task, questions, rendered, notes)


def check_reference_answers(benchmark: Benchmark, grader: Grader) -> Benchmark:
    """Grade the reference answers; return the benchmark with a note if its own scorer grades some of them as wrong.

    Raises:
        RewardError: the scorer fails on every reference answer.
    """
    wrong = grader.misgraded_references(benchmark.task, benchmark.questions)
    if not wrong:
        return benchmark
    shown = ", ".join(map(str, wrong[:10])) + (", …" if len(wrong) > 10 else "")
    note = (
        f"the scorer {benchmark.task.scorer.name} grades the reference answers of {len(wrong)} questions as wrong "
        f"(questions {shown})"
    )
    return replace(benchmark, notes=[*benchmark.notes, note])
