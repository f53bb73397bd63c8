"""Answers as they are kept: a line each, written when it is graded. A killed evaluation loses only what it was at."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_rl.errors import DataError

Key = tuple[str, int, int, str]
"""Task, question, sample, and digest of what was asked."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One graded sample."""

    task: str
    question: int
    sample: int
    seed: int
    response: str
    num_tokens: int
    finish_reason: str
    right: bool
    status: str
    """ok, reward_error, reward_timeout, or refused by the server; all but the first count as wrong."""
    message: str
    """What went wrong, or what the scorer says; empty otherwise."""
    shown: str | None
    """The answer in the response; None: there is none."""
    asked: str
    """Digest of prompt and reference answers: a place in a task can come to hold another question."""
    likelihoods: Sequence[float] = ()
    """Of each choice, as they were compared; empty for a sampled answer."""

    @property
    def key(self) -> Key:
        return self.task, self.question, self.sample, self.asked


class AnswerFile:
    """Appends answers to a file of one engine."""

    def __init__(self, path: Path) -> None:
        """Open it; a line that a kill has cut in two is removed.

        Raises:
            DataError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole_lines_only(path)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error}. Free space, or choose another run.output_dir."
            ) from error

    def write(self, answer: Answer) -> None:
        """Append an answer; it is there even if this process is killed at once.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self._file.write(json.dumps(asdict(answer)) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._file.name} cannot be written: {error}. Free space and start again.") from error

    def close(self) -> None:
        self._file.close()


def whole_lines_only(path: Path) -> None:
    """Remove a last line that a kill has cut in two; nothing happens without a file."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_answers(folder: Path) -> dict[Key, Answer]:
    """All answers in a folder; of a sample whose grading failed and that was asked again, the one with a verdict.

    Raises:
        DataError: a line is damaged that is not a file's last one.
    """
    found: dict[Key, Answer] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for answer in _lines(path):
            if answer.key not in found or found[answer.key].status != "ok":
                found[answer.key] = answer
    return found


def _lines(path: Path) -> Iterator[Answer]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last one is empty, or cut in two
        try:
            yield Answer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is damaged: {error}. Remove the line; its answer is sampled again."
            ) from error


def by_question(answers: Iterable[Answer]) -> Mapping[int, list[Answer]]:
    """Answers of one task by question, in the order of their samples."""
    found: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=lambda one: (one.question, one.sample)):
        found.setdefault(answer.question, []).append(answer)
    return found
