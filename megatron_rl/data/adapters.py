"""Convert a row of a data source to a problem: prompt, answer, demonstration and metadata."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.data import SourceSection
from megatron_rl.errors import DataError

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The content of a row, before any chat template."""

    prompt: str | Sequence[Message]
    answer: str | None
    demonstration: str | None
    metadata: Mapping[str, Any]


def to_problem(row: Mapping[str, Any], source: SourceSection, number: int) -> Problem:
    """Return the problem in a row.

    Args:
        number: number of the row, for error messages.

    Raises:
        DataError: a column is missing or empty, or the answer does not match its pattern.
    """
    where = f"row {number} of {source.path or source.kind}"
    prompt = _column(row, source.prompt_field, "prompt_field", where)
    if not isinstance(prompt, str) and not _is_messages(prompt):
        raise DataError(
            f"{where}: {source.prompt_field} is {type(prompt).__name__}: expected text or a list of messages."
        )
    if not prompt:
        raise DataError(f"{where}: {source.prompt_field} is empty.")
    answer = None
    if source.answer_field is not None:
        answer = str(_column(row, source.answer_field, "answer_field", where))
        if source.answer_pattern is not None:
            answer = _extract(answer, source.answer_pattern, where)
    demonstration = None
    if source.demonstration_field is not None:
        demonstration = str(_column(row, source.demonstration_field, "demonstration_field", where))
    used_columns = {source.prompt_field, source.answer_field, source.demonstration_field}
    return Problem(
        prompt=prompt,
        answer=answer,
        demonstration=demonstration,
        metadata={key: value for key, value in row.items() if key not in used_columns},
    )


def _column(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(
            f"{where}: column {name!r} is missing or null. Columns: {', '.join(row)}. Set {key} of the data source."
        )
    return row[name]


def _extract(answer: str, pattern: str, where: str) -> str:
    match = re.search(pattern, answer)
    if match is None or not match.groups():
        raise DataError(f"{where}: answer_pattern {pattern!r} with one group does not match {answer[-80:]!r}.")
    return match.group(1).strip()


def _is_messages(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value)
