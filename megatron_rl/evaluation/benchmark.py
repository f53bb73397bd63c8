"""A task with its questions as a model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.evaluation.answers import Key
from megatron_rl.evaluation.generation import RenderedQuestion, choices_behind, render_questions
from megatron_rl.evaluation.grading import Grading
from megatron_rl.evaluation.questions import Question, read_questions


@dataclass(frozen=True)
class Benchmark:
    """A task with its questions."""

    task: TaskConfig
    questions: Sequence[Question]
    asked: Sequence[RenderedQuestion]
    notes: Sequence[str]

    def as_lines(self) -> list[dict[str, Any]]:
        """What is asked, for questions.jsonl."""
        return [
            {
                "task": self.task.name,
                "question": one.question.index,
                "text": one.question.text,
                "answers": list(one.question.answers),
                "group": one.question.group,
                "asked": one.digest,
                "row": dict(one.question.row),
            }
            for one in self.asked
        ]

    def key(self, asked: RenderedQuestion, sample: int) -> Key:
        """Of an answer to one of its questions."""
        return self.task.name, asked.question.index, sample, asked.digest


def read_benchmark(task: TaskConfig, config: EvalConfig, tokenizer: Any) -> Benchmark:
    """A task with its questions as the model sees them.

    Raises:
        DataError, ConfigError: as of ``read_questions`` and ``render_questions``; an endpoint is asked for likelihoods
            in a chat.
    """
    questions = read_questions(task)
    notes = []
    if task.num_questions is not None and len(questions) != task.num_questions:
        why = f"limit={config.limit}" if config.limit is not None else "the data differ from the published set"
        notes.append(f"{len(questions)} questions, of which the published set has {task.num_questions} ({why})")
    if tokenizer is None:  # the endpoint has its own
        if task.likelihood is not None and task.chat:
            raise ConfigError(
                f"task {task.name}: an endpoint says how likely plain text is, not messages. Set chat=false in the "
                "task, or use an engine."
            )
        asked = [
            RenderedQuestion(question=one, prompt=one.text, token_ids=(), choices=choices_behind(task, one))
            for one in questions
        ]
    else:
        asked = render_questions(task, questions, tokenizer)
    return Benchmark(task, questions, asked, notes)


def with_golds_graded(exam: Benchmark, grading: Grading) -> Benchmark:
    """The task with a note about reference answers that its own scorer does not take.

    Raises:
        RewardError: it takes none, as it fails.
    """
    wrong = grading.wrong_golds(exam.task, exam.questions)
    if not wrong:
        return exam
    shown = ", ".join(map(str, wrong[:10])) + (", …" if len(wrong) > 10 else "")
    note = (
        f"{len(wrong)} reference answers are not right by the scorer {exam.task.scorer.name} themselves "
        f"(questions {shown})"
    )
    return replace(exam, notes=[*exam.notes, note])
