"""Questions of a benchmark from the rows of its data set."""

import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rl.config.evaluation import FewShotSection, TaskConfig
from megatron_rl.data.sources import read_rows
from megatron_rl.errors import DataError
from megatron_rl.evaluation.majority_vote import last_match
from megatron_rl.rewards.math import last_boxed

LETTERS = string.ascii_uppercase
CHOICES = "listed choices"
"""Column that is added to a row for its choices."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task."""

    index: int
    """Index in the task."""
    text: str
    """Few-shot examples and question, without a chat template."""
    answers: Sequence[str]
    """Accepted reference answers; a response is right if it matches any of them."""
    group: str | None
    """Value of the task's group_field; None without one."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row, for the scorer."""
    choices: Sequence[str] = ()
    """Choices of a multiple-choice question; empty for other questions."""


def read_questions(task: TaskConfig) -> list[Question]:
    """Read all questions of a task.

    Raises:
        DataError: the data cannot be read, a column is missing, or a reference answer does not match its pattern.
    """
    rows = [_with_choices(task, row, f"question {index} of task {task.name}") for index, row in enumerate(_rows(task))]
    shots = [] if task.few_shot is None else [_with_choices(task, row, "an example") for row in _shots(task.few_shot)]
    return [_question(task, index, row, shots) for index, row in enumerate(rows)]


def _rows(task: TaskConfig) -> list[Mapping[str, Any]]:
    """Read the rows of all subsets, up to data.limit from each."""
    if not task.subsets:
        return list(read_rows(task.data))
    if task.data.kind != "datasets":
        rows = read_rows(replace(task.data, limit=None))
        unknown = sorted({str(row.get("subset")) for row in rows} - set(task.subsets))
        if unknown:
            raise DataError(
                f"task {task.name}: the column 'subset' holds {unknown[0]!r}, which is none of the task's subsets. "
                f"Expected one of {', '.join(task.subsets)}."
            )
        return [
            row for name in task.subsets for row in [one for one in rows if one["subset"] == name][: task.data.limit]
        ]
    return [{**row, "subset": name} for name in task.subsets for row in read_rows(replace(task.data, name=name))]


def _shots(section: FewShotSection) -> list[Mapping[str, Any]]:
    return list(read_rows(section.rows))


def _question(task: TaskConfig, index: int, row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> Question:
    where = f"question {index} of task {task.name}"
    return Question(
        index=index,
        text=_examples(task, row, shots, where) + fill_template(task.prompt, row, where),
        answers=_answers(task, row, where),
        group=None if task.group_field is None else str(_column(row, task.group_field, where)),
        row=row,
        choices=row.get(CHOICES, ()),
    )


def _answers(task: TaskConfig, row: Mapping[str, Any], where: str) -> list[str]:
    if "letter" in row and (task.choices_field is not None or task.wrong_choices):
        return [row["letter"]]
    value = _column(row, task.answer_field, where)
    answers = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
    if task.answer_in_box:
        boxes = [last_boxed(one) or last_match(one, r"\\boxed\s+([^\s$]+)") for one in answers]
        if None in boxes:
            raise DataError(f"{where}: {task.answer_field} has no \\boxed{{}}: {answers[0][-80:]!r}.")
        return [str(one).strip() for one in boxes]
    if task.answer_pattern is None:
        return answers
    matches = [last_match(one, task.answer_pattern) for one in answers]
    if None in matches:
        raise DataError(
            f"{where}: {task.answer_field} {answers[0][-80:]!r} does not match answer_pattern={task.answer_pattern!r}."
        )
    return [str(one) for one in matches]


def _examples(task: TaskConfig, row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]], where: str) -> str:
    section = task.few_shot
    if section is None:
        return ""
    same = section.same
    matching = [shot for shot in shots if same is None or shot.get(same) == _column(row, same, where)]
    if len(matching) < section.count:
        raise DataError(
            f"{where}: few_shot.count={section.count}, but only {len(matching)} examples match the question. Add "
            "examples, or lower few_shot.count."
        )
    examples = matching[: section.count]
    return fill_template(section.preamble, examples[0], where) + "".join(
        fill_template(section.template, shot, where) for shot in examples
    )


def _with_choices(task: TaskConfig, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Add columns: those of task.lines (lists as lines), choices (lettered lines), letter (of the right choice)."""
    row = {**row, **{name: "\n".join(_column(row, column, where)) for name, column in task.lines.items()}}
    if task.choices_field is not None:
        choices = list(_column(row, task.choices_field, where))
        answer = _column(row, task.answer_field, where)
        right = LETTERS.index(answer) if isinstance(answer, str) and answer in LETTERS else int(answer)
    elif task.wrong_choices:
        choices = [_column(row, name, where) for name in (task.answer_field, *task.wrong_choices)]
        order = list(range(len(choices)))
        random.Random(str(choices[0])).shuffle(order)
        choices, right = [choices[one] for one in order], order.index(0)
    else:
        return row
    if len(choices) > len(LETTERS):
        raise DataError(f"{where}: {len(choices)} choices, but there are letters for at most {len(LETTERS)}.")
    if not 0 <= right < len(choices):
        raise DataError(
            f"{where}: {task.answer_field}={right}: expected the index of a choice, 0 to {len(choices) - 1}."
        )
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return {**row, "choices": lines, "letter": LETTERS[right], CHOICES: [str(choice) for choice in choices]}


def fill_template(template: str, row: Mapping[str, Any], where: str) -> str:
    """Replace {column} in a template by the row's value; other braces stay.

    Args:
        template: text with column names in braces.
        row: columns of the question or example.
        where: name of the row in errors.

    Raises:
        DataError: a lower-case word in braces is not a column.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in row and not match[1].islower():
            return match[0]
        return str(_column(row, match[1], where))

    return re.sub(r"\{([A-Za-z_][\w ]*)\}", value, template)


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: column {name!r} is missing or empty. Columns: {', '.join(row)}.")
    return row[name]
