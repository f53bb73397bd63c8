"""A model that says something about responses: an engine's, or one behind an endpoint."""

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
from megatron_rl.evaluation.answers import whole_lines_only
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.generation import RenderedQuestion, render_questions
from megatron_rl.evaluation.questions import Question

MOST_CHARACTERS = 12_000
"""Of a response; of a longer one the judge sees the end."""


class LLMJudge:
    """Asks once about each question and response, and keeps what was said."""

    def __init__(self, file: Path, name: str) -> None:
        """
        Args:
            file: where its answers are kept, and looked up.
            name: of the judge; another one is asked anew.

        Raises:
            DataError: the file is damaged.
        """
        self._file, self._name = file, name
        whole_lines_only(file)
        self._said: dict[str, str] = {}
        for number, line in enumerate(file.read_text("utf-8").splitlines() if file.exists() else [], start=1):
            try:
                digest, said = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number} is damaged: {error}. Remove the line; it is asked again.") from error
            self._said[digest] = said

    def asked(
        self, said: Sequence[ResponseRecord], verdict: JudgeRubric, tokenizer: Any
    ) -> tuple[TaskConfig, list[RenderedQuestion]]:
        """What has to be asked still, each question once.

        Args:
            tokenizer: of the judge; None: an endpoint's, which it has itself.
        """
        prompts = {self._digest(text): text for text in (_prompt(one, verdict) for one in said)}
        open_ = [text for digest, text in prompts.items() if digest not in self._said]
        task = _task(verdict)
        questions = [Question(index=place, text=text, answers=[""], group=None) for place, text in enumerate(open_)]
        if tokenizer is not None:
            return task, render_questions(task, questions, tokenizer)
        return task, [RenderedQuestion(question=one, prompt=one.text, token_ids=()) for one in questions]

    def ask(
        self, task: TaskConfig, asked: Sequence[RenderedQuestion], answerer: EvalBackend, note: Callable[[str], None]
    ) -> None:
        """Ask, and write each answer as it comes."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for number, response in enumerate(answerer.respond(task, [(one, [(0, 0)]) for one in asked]), start=1):
                if response.failure:
                    note(f"not judged: {response.failure}")
                    continue
                digest = self._digest(response.asked.question.text)
                self._said[digest] = response.text
                file.write(json.dumps([digest, response.text]) + "\n")
                file.flush()
                if number % 100 == 0:
                    note(f"{number} of {len(asked)} responses judged")

    def judged(self, said: Sequence[ResponseRecord], name: str, verdict: JudgeRubric) -> list[ResponseRecord]:
        """The responses with the judge's category under a name, where it said one."""
        return [
            _with(one, name, category_of(self._said.get(self._digest(_prompt(one, verdict)), ""), verdict))
            for one in said
        ]

    def _digest(self, prompt: str) -> str:
        return hashlib.sha256(f"{self._name}\0{prompt}".encode()).hexdigest()[:24]


def _with(one: ResponseRecord, name: str, category: int | None) -> ResponseRecord:
    found: Mapping[str, int] = {} if category is None else {name: category}
    return replace(one, judged={**one.judged, **found})


def _prompt(one: ResponseRecord, verdict: JudgeRubric) -> str:
    # the question first: a response may hold braces of its own
    before, after = verdict.prompt.split("{response}")
    return before.replace("{question}", one.question) + one.response[-MOST_CHARACTERS:] + after


def _task(verdict: JudgeRubric) -> TaskConfig:
    """Nothing is read from its data, and nothing graded."""
    return TaskConfig(
        name="judge",
        version=1,
        source="megatron_rl/analysis/reflection.py",
        data=RowsSection(kind="jsonl", path="-"),
        prompt="{text}",
        sampling=TaskSamplingSection(max_new_tokens=verdict.max_new_tokens),
        scorer=RewardFunctionSection(name="exact_match"),
    )
