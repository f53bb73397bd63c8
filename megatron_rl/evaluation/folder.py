"""The folder of an evaluation.

evaluation.yaml          the suite and its tasks, resolved, with the model's fingerprint
questions.jsonl          what is asked, with all columns of each question's row
answers/TASK.N.jsonl     every answer with its verdict, as engine N finished them
results.json             what they come to, and all that they depend on
report.md  report.html   the same to read
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.answers import Answer, read_answers
from megatron_rl.evaluation.report import markdown
from megatron_rl.evaluation.results import TaskResult
from megatron_rl.rollout.serialization import read_lines
from megatron_rl.run_folder import write_atomically

# of a task, what may change between a start and the next one: how much of it is asked, and what is reported
FREE_OF_TASK = ("pass_at", "majority", "num_questions", "source", "question")


class EvalFolder:
    """Names of the files, and what is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = path / "answers"
        self.config = path / "evaluation.yaml"
        self.questions = path / "questions.jsonl"
        self.results = path / "results.json"
        self.markdown = path / "report.md"
        self.html = path / "report.html"

    def answers_of(self, task: str, engine: int) -> Path:
        """The file of one engine's answers."""
        return self.answers / f"{task}.{engine}.jsonl"

    def begin(self, config: EvalConfig, tasks: Sequence[TaskConfig], model: str) -> None:
        """Make the folder, or go on in it.

        Raises:
            ConfigError: it holds answers to something else, or cannot be written.
        """
        wanted = _described(config, tasks, model)
        try:
            if self.config.exists():
                self._check_same(wanted, yaml.safe_load(self.config.read_text()))
            self.answers.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise ConfigError(
                f"run.output_dir={self.path}: {error.strerror or error}. Choose another run.output_dir."
            ) from error

    def finish(
        self,
        config: EvalConfig,
        tasks: Sequence[TaskConfig],
        results: Sequence[TaskResult],
        *,
        model: str,
        versions: Mapping[str, str],
    ) -> dict[str, Any]:
        """Write the results; they as they are written."""
        found = {
            "name": config.run.name,
            "model": config.model.path,
            "fingerprint": model,
            "engine": config.engine.name,
            "versions": dict(versions),
            "tasks": {result.task: result.as_json() for result in results},
            "evaluation": _described(config, tasks, model),
        }
        write_atomically(self.results, json.dumps(found, indent=2, default=str))
        write_atomically(self.markdown, markdown(found))
        return found

    def _check_same(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        before, now = _decisive(found), _decisive(wanted)
        # a task that is added or left out changes no answer to another one
        both = [key for key in before if key in now]
        differing = sorted(key for key in both if (before[key] or None) != (now[key] or None))
        if differing:
            raise ConfigError(
                f"run.output_dir={self.path} holds answers to another evaluation: {', '.join(differing)} differ. "
                "Choose another run.output_dir, or ask for the same."
            )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as it takes to tell them apart; the same paths get numbers."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}. {path}" for number, path in enumerate(paths, start=1)]


def read_questions_of(folder: EvalFolder) -> dict[tuple[str, int], dict[str, Any]]:
    """What was asked, by task and question.

    Raises:
        DataError: it cannot be read.
    """
    return {(one["task"], one["question"]): one for one in read_lines(folder.questions)}


def current_answers(folder: EvalFolder) -> dict[tuple[str, int], list[Answer]]:
    """Answers to what is asked now, by task and question, in the order of the questions and of their samples.

    Raises:
        DataError: questions or answers cannot be read.
    """
    asked = {place: question["asked"] for place, question in read_questions_of(folder).items()}
    found: dict[tuple[str, int], list[Answer]] = {place: [] for place in asked}
    for answer in sorted(read_answers(folder.answers).values(), key=lambda one: one.sample):
        if asked.get((answer.task, answer.question)) == answer.asked:
            found[answer.task, answer.question].append(answer)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """The results of a finished evaluation.

    Raises:
        DataError: there are none, or they are damaged.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Give the folder of a finished evaluation.") from error
    return found


def _described(config: EvalConfig, tasks: Sequence[TaskConfig], model: str) -> dict[str, Any]:
    plain = asdict(config)
    plain["tasks"] = {task.name: asdict(task) for task in tasks}
    return {**plain, "fingerprint": model}


def _decisive(described: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on, by dotted keys."""
    found = {
        "the model's fingerprint": described["fingerprint"],
        "model.dtype": described["model"]["dtype"],
        "engine.name": described["engine"]["name"],
        "engine.options": described["engine"]["options"],
        "run.seed": described["run"]["seed"],
    }
    for name, task in described["tasks"].items():
        for key, value in task.items():
            if key not in FREE_OF_TASK:
                found[f"tasks.{name}.{key}"] = essential(value)
    return found


def essential(value: Any) -> Any:
    """A value of a task without what changes no question: unset keys, which a later version may have added, and how
    much of the data is read."""
    if not isinstance(value, Mapping):
        return value
    free = ("limit", "allow_noncommercial")
    return {
        key: essential(one) for key, one in value.items() if key not in free and one not in (None, "", False, [], {})
    }
