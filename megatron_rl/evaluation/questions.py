"""Rows of a benchmark to questions with prompts."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config.evaluation import FewShotSection, TaskConfig
from megatron_rl.data.sources import read_rows
from megatron_rl.errors import DataError

LETTERS = string.ascii_uppercase


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task."""

    index: int
    """Place in the task."""
    text: str
    """Examples and question, without a chat template."""
    answers: Sequence[str]
    """Each of them is right."""
    group: str | None
    """Of the task's group_field."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns, for the scorer."""


def read_questions(task: TaskConfig) -> list[Question]:
    """All questions of a task.

    Raises:
        DataError: the data cannot be read, a column is missing, or a gold answer does not match its pattern.
    """
    rows = read_rows(task.data)
    shots = _read_shots(task.few_shot)
    return [_question(task, index, row, shots) for index, row in enumerate(rows)]


def _question(task: TaskConfig, index: int, row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> Question:
    where = f"question {index} of task {task.name}"
    return Question(
        index=index,
        text=_examples(task, row, shots, where) + filled(task.prompt, _with_choices(task, row, where), where),
        answers=_answers(task, row, where),
        group=None if task.group_field is None else str(_column(row, task.group_field, where)),
        row=row,
    )


def _answers(task: TaskConfig, row: Mapping[str, Any], where: str) -> list[str]:
    found = _column(row, task.answer_field, where)
    if task.choices_field is not None:
        place = LETTERS.index(found) if isinstance(found, str) and found in LETTERS else int(found)
        return [LETTERS[place]]
    every = [str(one) for one in found] if isinstance(found, list | tuple) else [str(found)]
    if task.answer_pattern is None:
        return every
    matches = [re.findall(task.answer_pattern, one) for one in every]
    if not all(matches):
        raise DataError(
            f"{where}: {task.answer_field} {every[0]!r} does not match answer_pattern={task.answer_pattern!r}."
        )
    return [one[-1].strip() for one in matches]


def _examples(task: TaskConfig, row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]], where: str) -> str:
    section = task.few_shot
    if section is None:
        return ""
    same = section.same
    fitting = [shot for shot in shots if same is None or shot.get(same) == _column(row, same, where)]
    if len(fitting) < section.count:
        raise DataError(
            f"{where}: {len(fitting)} examples fit it, few_shot.count={section.count}. Give more, or lower it."
        )
    return "".join(
        filled(section.template, _with_choices(task, shot, where), where) for shot in fitting[: section.count]
    )


def _read_shots(section: FewShotSection | None) -> Sequence[Mapping[str, Any]]:
    return [] if section is None else read_rows(section.rows)


def _with_choices(task: TaskConfig, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The row with {choices} as lettered lines and {letter} as the right one's."""
    if task.choices_field is None:
        return row
    choices = _column(row, task.choices_field, where)
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return {**row, "choices": lines, "letter": _answers(task, row, where)[0]}


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template with the columns that it names; other braces stay.

    Raises:
        DataError: the row lacks one, which is to say that the template names a word in braces that is none.
    """

    def value(match: re.Match[str]) -> str:
        return str(_column(row, match[1], where))

    return re.sub(r"\{([a-z_]\w*)\}", value, template)


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: column {name!r} is missing or empty. Columns: {', '.join(row)}.")
    return row[name]
