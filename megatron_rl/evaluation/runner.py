"""Generation and grading of one benchmark's responses, written to disk as they are graded."""

import time
from collections import deque
from collections.abc import Callable, Mapping

from megatron_rl.errors import DataError, MegatronRLError
from megatron_rl.evaluation.answers import AnswerFile, AnswerKey, GradedAnswer
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.benchmark import Benchmark
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.generation import RenderedQuestion, Response
from megatron_rl.evaluation.grading import Grader, PendingGrades
from megatron_rl.reporting.stats import mean
from megatron_rl.rollout.engines.sampling import sample_seed

PROGRESS_S = 10.0
"""Seconds between progress lines."""
Note = Callable[[str], None]
"""Prints a line."""


def generate_and_grade(
    benchmark: Benchmark,
    seed: int,
    backend: EvalBackend,
    grader: Grader,
    done: Mapping[AnswerKey, GradedAnswer],
    folder: EvalFolder,
    note: Note,
) -> None:
    """Generate and grade this backend's share of the missing samples; write each answer as soon as it is graded.

    Args:
        benchmark: task and questions.
        seed: of the evaluation.
        backend: this rank's backend.
        grader: of the suite.
        done: answers of earlier starts.
        folder: of the evaluation.
        note: prints a line.
    """
    task = benchmark.task
    requests = missing_samples(benchmark, seed, done, backend.index, backend.count)
    total = sum(len(samples) for _, samples in requests)
    if not total:
        return
    if not backend.receives_responses:
        for _ in backend.generate(task, requests):
            raise AssertionError("only the first rank of an engine receives responses")
        return
    progress = Progress(task.name, total, backend.count, note)
    pending: deque[tuple[Response, PendingGrades]] = deque()
    failure: MegatronRLError | None = None
    file: AnswerFile | None = None

    def write_graded(*, wait: bool) -> None:
        while file is not None and pending and (wait or pending[0][1].done()):
            answer = grader.collect(task, *pending.popleft())
            file.write(answer)
            progress.count(answer)

    try:
        file = AnswerFile(folder.answers_of(task.name, backend.index))
    except DataError as error:
        failure = error
    try:
        any_succeeded = any(one.status == "ok" for key, one in done.items() if key[0] == task.name)
        for response in backend.generate(task, requests, any_succeeded=any_succeeded):
            if failure is not None:
                continue  # generate to the end, because the other ranks of the engine wait for this one
            try:
                pending.append((response, grader.submit(task, response)))
                write_graded(wait=False)
            except MegatronRLError as error:  # raised after the engine has generated everything
                failure = error
    finally:
        if failure is None:
            write_graded(wait=True)
        if file is not None:
            file.close()
    if failure is not None:
        raise failure


def missing_samples(
    benchmark: Benchmark, seed: int, done: Mapping[AnswerKey, GradedAnswer], backend_index: int, num_backends: int
) -> list[tuple[RenderedQuestion, list[tuple[int, int]]]]:
    """Return one backend's questions with the (sample, seed) pairs that have no graded answer yet.

    Args:
        benchmark: task and questions.
        seed: of the evaluation.
        done: answers of earlier starts.
        backend_index: of the backend.
        num_backends: number of backends that share the questions.
    """
    missing: list[tuple[RenderedQuestion, list[tuple[int, int]]]] = []
    for rendered in benchmark.rendered[backend_index::num_backends]:
        index = rendered.question.index
        samples = [
            (sample, sample_seed(seed, index, sample))
            for sample in range(benchmark.task.sampling.num_samples)
            if (answer := done.get(benchmark.key(rendered, sample))) is None or answer.status != "ok"
        ]
        if samples:
            missing.append((rendered, samples))
    return missing


class Progress:
    """Prints the progress of a benchmark every PROGRESS_S seconds and at its end."""

    def __init__(self, name: str, total: int, num_backends: int, note: Note) -> None:
        self._name, self._total, self._num_backends, self._note = name, total, num_backends, note
        self._grades: list[float] = []
        self._start = self._last_printed = time.monotonic()

    def count(self, answer: GradedAnswer) -> None:
        """Count one graded answer and print a line if it is due."""
        self._grades.append(float(answer.right))
        now, done = time.monotonic(), len(self._grades)
        if now - self._last_printed < PROGRESS_S and done < self._total:
            return
        self._last_printed = now
        left = (now - self._start) / done * (self._total - done)
        share = f" of this engine's share (one of {self._num_backends})" if self._num_backends > 1 else ""
        self._note(
            f"{self._name}: {done}/{self._total} answers{share}, {mean(self._grades):.1%} right, {left:.0f} s left"
        )
