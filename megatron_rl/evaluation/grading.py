"""Verdicts about responses, by worker processes with hard limits."""

from collections.abc import Sequence
from concurrent.futures import Future

from megatron_rl.config.evaluation import GradingSection, TaskConfig
from megatron_rl.config.reward import RewardSection
from megatron_rl.errors import RewardError
from megatron_rl.evaluation.answers import Answer
from megatron_rl.evaluation.generation import Response
from megatron_rl.evaluation.majority_vote import shown_answer
from megatron_rl.evaluation.questions import Question
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.types import RewardInput, RewardResult

Verdicts = Future[list[RewardResult]]


class Grading:
    """The scorers of all tasks at work."""

    def __init__(self, config: GradingSection, tasks: Sequence[TaskConfig]) -> None:
        """
        Raises:
            ConfigError: a scorer is unknown.
            RewardError: a worker does not start.
        """
        workers = RewardSection(
            num_workers=config.num_workers, timeout_s=config.timeout_s, memory_limit_gb=config.memory_limit_gb
        )
        self._pool = RewardPool(workers, {task.name: [task.scorer] for task in tasks})
        self._tasks = {task.name: task for task in tasks}

    def begin(self, task: TaskConfig, response: Response) -> Verdicts:
        """Grade a response against every answer that is right."""
        question = response.asked.question
        return self._pool.submit(
            task.name,
            [
                _graded(question, response.text, answer, response.finish_reason, response.num_tokens, response.seed)
                for answer in question.answers
            ],
        )

    def finish(self, task: TaskConfig, response: Response, verdicts: Verdicts) -> Answer:
        """The answer with its verdict; waits for it."""
        results = verdicts.result()
        failed = next((one for one in results if one.status != "ok"), None)
        right = not response.failure and any(one.status == "ok" and one.total >= 1 for one in results)
        status, message = ("ok", "") if right or failed is None else (failed.status, failed.message)
        if response.failure:
            status, message = "refused", response.failure
        return Answer(
            task=task.name,
            question=response.asked.question.index,
            sample=response.sample,
            seed=response.seed,
            response=response.text,
            num_tokens=response.num_tokens,
            finish_reason=response.finish_reason,
            right=right,
            status=status,
            message=message,
            shown=shown_answer(response.text, task.answer_shown_by),
            asked=response.asked.digest,
            likelihoods=response.likelihoods,
        )

    def wrong_golds(self, task: TaskConfig, questions: Sequence[Question]) -> list[int]:
        """Questions whose reference answers, said as plainly as can be, are not right by the scorer.

        Raises:
            RewardError: the scorer fails on all of them, as it would on whatever a model says.
        """
        pending = [
            (
                question.index,
                self._pool.submit(task.name, [self._gold(task, question, one) for one in question.answers]),
            )
            for question in questions
        ]
        found = [(index, verdicts.result()) for index, verdicts in pending]
        failed = [one for _, results in found for one in results if one.status != "ok"]
        if len(failed) == sum(len(results) for _, results in found):
            raise RewardError(
                f"task {task.name}: the scorer {task.scorer.name} fails on every reference answer: {failed[0].message}"
            )
        return [index for index, results in found if not all(one.status == "ok" and one.total >= 1 for one in results)]

    def clusters(self, task: TaskConfig, question: Question, answers: Sequence[Answer]) -> list[int | None]:
        """Of each sample of a question which ones say the same by the scorer: right ones do, and wrong ones may.

        Returns:
            the place of the first sample of the cluster; None for one without an answer.
        """
        found: list[int | None] = []
        firsts: list[int] = []
        for place, answer in enumerate(answers):
            if answer.shown is None and not answer.right:
                found.append(None)
                continue
            same = next((first for first in firsts if self._is_same(task, question, answers[first], answer)), None)
            if same is None:
                firsts.append(place)
            found.append(place if same is None else same)
        return found

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _is_same(self, task: TaskConfig, question: Question, one: Answer, other: Answer) -> bool:
        if one.right or other.right:
            return one.right and other.right
        if one.shown == other.shown:
            return True
        assert one.shown is not None
        said = _graded(question, other.response, one.shown, other.finish_reason, other.num_tokens, other.seed)
        (result,) = self._pool.submit(task.name, [said]).result()
        return result.status == "ok" and result.total >= 1

    def _gold(self, task: TaskConfig, question: Question, answer: str) -> RewardInput:
        return _graded(question, task.gold_response.replace("{gold}", answer), answer, "stop", 1, 0)


def _graded(question: Question, text: str, answer: str, finish_reason: str, num_tokens: int, seed: int) -> RewardInput:
    return RewardInput(
        prompt=question.text,
        response=text,
        answer=answer,
        finish_reason=finish_reason,
        num_tokens=num_tokens,
        seed=seed,
        metadata=question.row,
    )
