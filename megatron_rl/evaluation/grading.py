"""Grading of responses by the tasks' scorers, in worker processes with hard time and memory limits."""

from collections.abc import Sequence
from concurrent.futures import Future

from megatron_rl.config.evaluation import GradingSection, TaskConfig
from megatron_rl.config.reward import RewardSection
from megatron_rl.errors import RewardError
from megatron_rl.evaluation.answers import GradedAnswer
from megatron_rl.evaluation.generation import Response
from megatron_rl.evaluation.majority_vote import shown_answer
from megatron_rl.evaluation.questions import Question
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.types import RewardInput, RewardResult

PendingGrades = Future[list[RewardResult]]
"""One result for each reference answer of the question."""


class Grader:
    """Grades responses with the scorers of all tasks."""

    def __init__(self, config: GradingSection, tasks: Sequence[TaskConfig]) -> None:
        """Start the workers.

        Raises:
            ConfigError: a scorer is unknown.
            RewardError: a worker does not start.
        """
        workers = RewardSection(
            num_workers=config.num_workers, timeout_s=config.timeout_s, memory_limit_gb=config.memory_limit_gb
        )
        self._pool = RewardPool(workers, {task.name: [task.scorer] for task in tasks})
        self._tasks = {task.name: task for task in tasks}

    def submit(self, task: TaskConfig, response: Response) -> PendingGrades:
        """Start grading a response against each reference answer of its question."""
        question = response.rendered.question
        return self._pool.submit(
            task.name,
            [
                _reward_input(
                    question, response.text, answer, response.finish_reason, response.num_tokens, response.seed
                )
                for answer in question.answers
            ],
        )

    def collect(self, task: TaskConfig, response: Response, pending: PendingGrades) -> GradedAnswer:
        """Wait for the grades of a response and return it as a graded answer; it is right if any reference matches."""
        results = pending.result()
        failed = next((result for result in results if result.status != "ok"), None)
        right = not response.failure and any(result.status == "ok" and result.total >= 1 for result in results)
        status, message = ("ok", "") if right or failed is None else (failed.status, failed.message)
        if response.failure:
            status, message = "refused", response.failure
        return GradedAnswer(
            task=task.name,
            question=response.rendered.question.index,
            sample=response.sample,
            seed=response.seed,
            response=response.text,
            num_tokens=response.num_tokens,
            finish_reason=response.finish_reason,
            right=right,
            status=status,
            message=message,
            shown=shown_answer(response.text, task.answer_shown_by),
            asked=response.rendered.digest,
            likelihoods=response.likelihoods,
        )

    def misgraded_references(self, task: TaskConfig, questions: Sequence[Question]) -> list[int]:
        """Return the indices of questions whose reference answers, in ``task.gold_response``, are graded as wrong.

        Raises:
            RewardError: the scorer fails on all of them, as it would on every response.
        """
        pending = [
            (
                question.index,
                self._pool.submit(
                    task.name, [self._reference_input(task, question, answer) for answer in question.answers]
                ),
            )
            for question in questions
        ]
        graded = [(index, grades.result()) for index, grades in pending]
        failed = [result for _, results in graded for result in results if result.status != "ok"]
        if len(failed) == sum(len(results) for _, results in graded):
            raise RewardError(
                f"task {task.name}: the scorer {task.scorer.name} fails on every reference answer: {failed[0].message}"
            )
        return [
            index
            for index, results in graded
            if not all(result.status == "ok" and result.total >= 1 for result in results)
        ]

    def cluster_answers(
        self, task: TaskConfig, question: Question, answers: Sequence[GradedAnswer]
    ) -> list[int | None]:
        """Cluster the samples of a question by answers that the scorer grades as equal; all right answers are equal.

        Returns:
            for each sample, the index of the first sample of its cluster; None if it has no answer.
        """
        clusters: list[int | None] = []
        firsts: list[int] = []
        for index, answer in enumerate(answers):
            if answer.shown is None and not answer.right:
                clusters.append(None)
                continue
            same = next((first for first in firsts if self._is_same(task, question, answers[first], answer)), None)
            if same is None:
                firsts.append(index)
            clusters.append(index if same is None else same)
        return clusters

    def close(self) -> None:
        """Stop the workers."""
        self._pool.close()

    def _is_same(self, task: TaskConfig, question: Question, one: GradedAnswer, other: GradedAnswer) -> bool:
        if one.right or other.right:
            return one.right and other.right
        if one.shown == other.shown:
            return True
        assert one.shown is not None
        sample = _reward_input(question, other.response, one.shown, other.finish_reason, other.num_tokens, other.seed)
        (result,) = self._pool.submit(task.name, [sample]).result()
        return result.status == "ok" and result.total >= 1

    def _reference_input(self, task: TaskConfig, question: Question, answer: str) -> RewardInput:
        return _reward_input(question, task.gold_response.replace("{gold}", answer), answer, "stop", 1, 0)


def _reward_input(
    question: Question, text: str, answer: str, finish_reason: str, num_tokens: int, seed: int
) -> RewardInput:
    return RewardInput(
        prompt=question.text,
        response=text,
        answer=answer,
        finish_reason=finish_reason,
        num_tokens=num_tokens,
        seed=seed,
        metadata=question.row,
    )
