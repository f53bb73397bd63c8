"""LLM judge that sorts responses into the categories of a rubric."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.analysis.behaviour import ResponseRecord
from megatron_rl.analysis.reflection import JudgeRubric, category_of
from megatron_rl.config.data import RowsSection
from megatron_rl.config.evaluation import TaskConfig, TaskSamplingSection
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.errors import DataError
from megatron_rl.evaluation.answers import drop_partial_line
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.generation import RenderedQuestion, render_questions
from megatron_rl.evaluation.questions import Question

MAX_CHARACTERS = 12_000
"""Characters of a response that the judge sees; a longer response is cut at its beginning."""


class LLMJudge:
    """Queries a judge model once for each question and response, and caches its responses in a file."""

    def __init__(self, file: Path, name: str) -> None:
        """
        Args:
            file: cache of the judge's responses, JSON lines of [digest, text].
            name: name of the judge model; the cache is separate for each model.

        Raises:
            DataError: the file is damaged.
        """
        self._file, self._name = file, name
        drop_partial_line(file)
        self._cache: dict[str, str] = {}
        for number, line in enumerate(file.read_text("utf-8").splitlines() if file.exists() else [], start=1):
            try:
                digest, text = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{file}:{number} is damaged: {error}. Remove the line; the judge is then queried again."
                ) from error
            self._cache[digest] = text

    def pending_questions(
        self, records: Sequence[ResponseRecord], rubric: JudgeRubric, tokenizer: Any
    ) -> tuple[TaskConfig, list[RenderedQuestion]]:
        """Return the judge's prompts that are not in the cache, each once, with the task that samples them.

        Args:
            records: responses to judge.
            rubric: prompt and categories.
            tokenizer: of the judge; None for an endpoint, which applies its own.
        """
        prompts = {self._digest(text): text for text in (_prompt(one, rubric) for one in records)}
        missing = [text for digest, text in prompts.items() if digest not in self._cache]
        task = _task(rubric)
        questions = [Question(index=index, text=text, answers=[""], group=None) for index, text in enumerate(missing)]
        if tokenizer is not None:
            return task, render_questions(task, questions, tokenizer)
        return task, [RenderedQuestion(question=one, prompt=one.text, token_ids=()) for one in questions]

    def query(
        self, task: TaskConfig, rendered: Sequence[RenderedQuestion], backend: EvalBackend, note: Callable[[str], None]
    ) -> None:
        """Generate the judge's responses and append each to the cache as it completes.

        Args:
            task: of ``pending_questions``.
            rendered: of ``pending_questions``.
            backend: that generates.
            note: prints a line.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for number, response in enumerate(backend.generate(task, [(one, [(0, 0)]) for one in rendered]), start=1):
                if response.failure:
                    note(f"not judged: {response.failure}")
                    continue
                digest = self._digest(response.rendered.question.text)
                self._cache[digest] = response.text
                file.write(json.dumps([digest, response.text]) + "\n")
                file.flush()
                if number % 100 == 0:
                    note(f"{number} of {len(rendered)} responses judged")

    def with_categories(
        self, records: Sequence[ResponseRecord], name: str, rubric: JudgeRubric
    ) -> list[ResponseRecord]:
        """Return the responses with the judge's category under the rubric's name, if it assigned one."""
        return [
            _with_category(one, name, category_of(self._cache.get(self._digest(_prompt(one, rubric)), ""), rubric))
            for one in records
        ]

    def _digest(self, prompt: str) -> str:
        return hashlib.sha256(f"{self._name}\0{prompt}".encode()).hexdigest()[:24]


def _with_category(one: ResponseRecord, name: str, category: int | None) -> ResponseRecord:
    assigned: Mapping[str, int] = {} if category is None else {name: category}
    return replace(one, judge_categories={**one.judge_categories, **assigned})


def _prompt(one: ResponseRecord, rubric: JudgeRubric) -> str:
    # split at {response} before filling in the question, because a question or response may contain braces
    before, after = rubric.prompt.split("{response}")
    return before.replace("{question}", one.question) + one.response[-MAX_CHARACTERS:] + after


def _task(rubric: JudgeRubric) -> TaskConfig:
    """Return a task for sampling the judge; its data are not read and its scorer is not called."""
    return TaskConfig(
        name="judge",
        version=1,
        source="megatron_rl/analysis/reflection.py",
        data=RowsSection(kind="jsonl", path="-"),
        prompt="{text}",
        sampling=TaskSamplingSection(max_new_tokens=rubric.max_new_tokens),
        scorer=RewardFunctionSection(name="exact_match"),
    )
