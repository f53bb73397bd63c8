"""Graded answers on disk: one line each, written as soon as it is graded; a kill loses only what is in progress."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_rl.errors import DataError

AnswerKey = tuple[str, int, int, str]
"""Task, question index, sample index, and digest of the rendered question."""


@dataclass(frozen=True, kw_only=True)
class GradedAnswer:
    """One response with its grade; a line of answers/TASK.N.jsonl."""

    task: str
    question: int
    sample: int
    seed: int
    response: str
    num_tokens: int
    finish_reason: str
    right: bool
    status: str
    """ok, reward_error, reward_timeout, or refused (rejected by the server); all but ok count as wrong."""
    message: str
    """Error of the scorer or the server; empty if status is ok."""
    shown: str | None
    """Answer extracted from the response; None if it has none."""
    asked: str
    """``RenderedQuestion.digest``: the same index of a task can hold another question after the data change."""
    likelihoods: Sequence[float] = ()
    """Log-likelihood of each choice, normalized as the task compares them; empty for a sampled answer."""

    @property
    def key(self) -> AnswerKey:
        """What identifies this answer among those of an evaluation."""
        return self.task, self.question, self.sample, self.asked


class AnswerFile:
    """File to which one engine appends its graded answers."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending, without a last line that a kill left incomplete.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_partial_line(path)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error}. Free space, or choose another run.output_dir."
            ) from error

    def write(self, answer: GradedAnswer) -> None:
        """Append an answer and flush it, so that it survives a kill of this process.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            self._file.write(json.dumps(asdict(answer)) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._file.name} cannot be written: {error}. Free space and start again.") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def drop_partial_line(path: Path) -> None:
    """Truncate a last line that a kill left incomplete; do nothing if the file does not exist."""
    if path.exists():
        content = path.read_bytes()
        size = content.rfind(b"\n") + 1
        if size < len(content):
            os.truncate(path, size)


def read_answers(folder: Path) -> dict[AnswerKey, GradedAnswer]:
    """Return all answers in a folder; a sample that was repeated after a failure has the answer that was graded.

    Raises:
        DataError: a line is damaged, other than a file's incomplete last one.
    """
    answers: dict[AnswerKey, GradedAnswer] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for answer in _lines(path):
            if answer.key not in answers or answers[answer.key].status != "ok":
                answers[answer.key] = answer
    return answers


def _lines(path: Path) -> Iterator[GradedAnswer]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last one is empty or incomplete
        try:
            yield GradedAnswer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is damaged: {error}. Remove the line; the sample is then generated again."
            ) from error


def by_question(answers: Iterable[GradedAnswer]) -> Mapping[int, list[GradedAnswer]]:
    """Group the answers of one task by question, in the order of their samples."""
    grouped: dict[int, list[GradedAnswer]] = {}
    for answer in sorted(answers, key=lambda one: (one.question, one.sample)):
        grouped.setdefault(answer.question, []).append(answer)
    return grouped
