"""The output folder of an evaluation.

evaluation.yaml          the resolved suite and tasks, with the model's fingerprint
questions.jsonl          the rendered questions, with all columns of each question's row
answers/TASK.N.jsonl     the graded answers of engine N, in completion order
results.json             the scores, and everything that they depend on
report.md  report.html   the same, for people to read
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.answers import GradedAnswer, read_answers
from megatron_rl.evaluation.report import markdown
from megatron_rl.evaluation.results import TaskResult
from megatron_rl.rollout.serialization import read_lines
from megatron_rl.run_folder import write_atomically

# keys of a task that may differ when an evaluation is resumed: they change the report, not the graded answers
IGNORED_TASK_KEYS = ("pass_at", "majority", "num_questions", "source", "question")


class EvalFolder:
    """Paths in the output folder, its preparation and its results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = path / "answers"
        self.config = path / "evaluation.yaml"
        self.questions = path / "questions.jsonl"
        self.results = path / "results.json"
        self.markdown = path / "report.md"
        self.html = path / "report.html"

    def answers_of(self, task: str, engine: int) -> Path:
        """Path of one engine's graded answers to a task."""
        return self.answers / f"{task}.{engine}.jsonl"

    def prepare(self, config: EvalConfig, tasks: Sequence[TaskConfig], model: str) -> None:
        """Create the folder, or check that it belongs to the same evaluation and can be resumed.

        Args:
            config: of the evaluation.
            tasks: of the suite.
            model: the model's fingerprint.

        Raises:
            ConfigError: the folder holds answers of another evaluation, or cannot be written.
        """
        current = _as_plain(config, tasks, model)
        try:
            if self.config.exists():
                self._check_same(current, yaml.safe_load(self.config.read_text()))
            self.answers.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, yaml.safe_dump(current, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise ConfigError(
                f"run.output_dir={self.path}: {error.strerror or error}. Choose another run.output_dir."
            ) from error

    def write_results(
        self,
        config: EvalConfig,
        tasks: Sequence[TaskConfig],
        results: Sequence[TaskResult],
        *,
        model: str,
        versions: Mapping[str, str],
    ) -> dict[str, Any]:
        """Write results.json and report.md; return the content of results.json."""
        content = {
            "name": config.run.name,
            "model": config.model.path,
            "fingerprint": model,
            "engine": config.engine.name,
            "versions": dict(versions),
            "tasks": {result.task: result.as_json() for result in results},
            "evaluation": _as_plain(config, tasks, model),
        }
        write_atomically(self.results, json.dumps(content, indent=2, default=str))
        write_atomically(self.markdown, markdown(content))
        return content

    def _check_same(self, current: Mapping[str, Any], previous: Mapping[str, Any]) -> None:
        before, now = _answer_settings(previous), _answer_settings(current)
        # adding or removing a task does not change the answers of the others
        common = [key for key in before if key in now]
        differing = sorted(key for key in common if (before[key] or None) != (now[key] or None))
        if differing:
            raise ConfigError(
                f"run.output_dir={self.path} holds answers to another evaluation: {', '.join(differing)} differ. "
                "Choose another run.output_dir, or restore these settings."
            )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Shorten paths to as many of their last parts as distinguish them; number equal paths."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}. {path}" for number, path in enumerate(paths, start=1)]


def read_questions_of(folder: EvalFolder) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows of questions.jsonl by task and question index.

    Raises:
        DataError: the file cannot be read.
    """
    return {(row["task"], row["question"]): row for row in read_lines(folder.questions)}


def current_answers(folder: EvalFolder) -> dict[tuple[str, int], list[GradedAnswer]]:
    """Return the answers to the questions of questions.jsonl, without those of earlier versions of a question.

    Returns:
        (task, question index) -> answers, in the order of the questions and of their samples.

    Raises:
        DataError: questions or answers cannot be read.
    """
    digests = {key: question["asked"] for key, question in read_questions_of(folder).items()}
    current: dict[tuple[str, int], list[GradedAnswer]] = {key: [] for key in digests}
    for answer in sorted(read_answers(folder.answers).values(), key=lambda one: one.sample):
        if digests.get((answer.task, answer.question)) == answer.asked:
            current[answer.task, answer.question].append(answer)
    return current


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json of a finished evaluation.

    Args:
        path: the evaluation's folder, or the file itself.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        results: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Give the folder of a finished evaluation.") from error
    return results


def _as_plain(config: EvalConfig, tasks: Sequence[TaskConfig], model: str) -> dict[str, Any]:
    plain = asdict(config)
    plain["tasks"] = {task.name: asdict(task) for task in tasks}
    return {**plain, "fingerprint": model}


def _answer_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings on which answers depend, by dotted keys."""
    settings = {
        "the model's fingerprint": plain["fingerprint"],
        "model.dtype": plain["model"]["dtype"],
        "engine.name": plain["engine"]["name"],
        "engine.options": plain["engine"]["options"],
        "run.seed": plain["run"]["seed"],
    }
    for name, task in plain["tasks"].items():
        for key, value in task.items():
            if key not in IGNORED_TASK_KEYS:
                settings[f"tasks.{name}.{key}"] = without_ignored(value)
    return settings


def without_ignored(value: Any) -> Any:
    """Drop from a task's setting what changes no question: unset keys, which a later version may have added, the
    row limit and the licence consent."""
    if not isinstance(value, Mapping):
        return value
    ignored = ("limit", "allow_noncommercial")
    return {
        key: without_ignored(inner)
        for key, inner in value.items()
        if key not in ignored and inner not in (None, "", False, [], {})
    }
