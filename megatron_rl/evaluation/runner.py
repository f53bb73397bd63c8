"""Questions of a task to answers on disk."""

import time
from collections import deque
from collections.abc import Callable, Mapping

from megatron_rl.errors import DataError, MegatronRLError
from megatron_rl.evaluation.answers import Answer, AnswerFile, Key
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.benchmark import Benchmark
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.generation import RenderedQuestion, Response
from megatron_rl.evaluation.grading import Grading, Verdicts
from megatron_rl.reporting.stats import mean
from megatron_rl.rollout.engines.sampling import sample_seed

PROGRESS_S = 10.0
Note = Callable[[str], None]


def answer(
    exam: Benchmark,
    seed: int,
    answerer: EvalBackend,
    grading: Grading,
    done: Mapping[Key, Answer],
    folder: EvalFolder,
    note: Note,
) -> None:
    """This one's share of what is not answered yet, written as it comes."""
    task = exam.task
    wanted = missing(exam, seed, done, answerer.index, answerer.count)
    total = sum(len(samples) for _, samples in wanted)
    if not total:
        return
    if not answerer.gives:
        for _ in answerer.respond(task, wanted):
            raise AssertionError("only the first rank of an engine gets answers")
        return
    progress = Progress(task.name, total, answerer.count, note)
    pending: deque[tuple[Response, Verdicts]] = deque()
    failure: MegatronRLError | None = None
    file: AnswerFile | None = None

    def written(*, wait: bool) -> None:
        while file is not None and pending and (wait or pending[0][1].done()):
            found = grading.finish(task, *pending.popleft())
            file.write(found)
            progress.count(found)

    try:
        file = AnswerFile(folder.answers_of(task.name, answerer.index))
    except DataError as error:
        failure = error
    try:
        some_answered = any(one.status == "ok" for key, one in done.items() if key[0] == task.name)
        for response in answerer.respond(task, wanted, some_answered=some_answered):
            if failure is not None:
                continue  # the other ranks of the engine go on to the end, and would wait for this one
            try:
                pending.append((response, grading.begin(task, response)))
                written(wait=False)
            except MegatronRLError as error:  # raised when the engine has come to its end
                failure = error
    finally:
        if failure is None:
            written(wait=True)
        if file is not None:
            file.close()
    if failure is not None:
        raise failure


def missing(
    exam: Benchmark, seed: int, done: Mapping[Key, Answer], engine: int, num_engines: int
) -> list[tuple[RenderedQuestion, list[tuple[int, int]]]]:
    """Questions of one engine with the (sample, seed) of each that is not answered yet."""
    found: list[tuple[RenderedQuestion, list[tuple[int, int]]]] = []
    for asked in exam.asked[engine::num_engines]:
        index = asked.question.index
        samples = [
            (sample, sample_seed(seed, index, sample))
            for sample in range(exam.task.sampling.num_samples)
            if (found_before := done.get(exam.key(asked, sample))) is None or found_before.status != "ok"
        ]
        if samples:
            found.append((asked, samples))
    return found


class Progress:
    """Says now and then how far a task is."""

    def __init__(self, name: str, total: int, num_engines: int, note: Note) -> None:
        self._name, self._total, self._engines, self._note = name, total, num_engines, note
        self._verdicts: list[float] = []
        self._begun = self._told = time.monotonic()

    def count(self, found: Answer) -> None:
        """One more."""
        self._verdicts.append(float(found.right))
        now, done = time.monotonic(), len(self._verdicts)
        if now - self._told < PROGRESS_S and done < self._total:
            return
        self._told = now
        left = (now - self._begun) / done * (self._total - done)
        shares = f" of this engine's share (one of {self._engines})" if self._engines > 1 else ""
        self._note(
            f"{self._name}: {done}/{self._total} answers{shares}, {mean(self._verdicts):.1%} right, {left:.0f} s left"
        )
