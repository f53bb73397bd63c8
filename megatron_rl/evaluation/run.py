"""A suite of tasks put to a model. Every rank executes these same lines."""

import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.collective import barrier, raise_together
from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.conversion.command import find_model_folder
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import ConfigError, DataError, MegatronRLError
from megatron_rl.evaluation.answerers import Answerer, EndpointAnswerer, EngineAnswerer
from megatron_rl.evaluation.answers import Answer, AnswerFile, Key, by_question, read_answers
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.grading import Grading, Verdicts
from megatron_rl.evaluation.metrics import mean
from megatron_rl.evaluation.model import end_tokens, fingerprint, load_engine
from megatron_rl.evaluation.page import render
from megatron_rl.evaluation.questions import Question, read_questions
from megatron_rl.evaluation.responder import Asked, Response, as_asked
from megatron_rl.evaluation.results import TaskResult, task_result
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.rollout.engine import EngineSetup, engine_place
from megatron_rl.rollout.engines.start import start_engine
from megatron_rl.rollout.sampling import sample_seed
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import torch_dtype

PROGRESS_S = 10.0
Note = Callable[[str], None]


@dataclass(frozen=True)
class Exam:
    """A task with its questions."""

    task: TaskConfig
    questions: Sequence[Question]
    asked: Sequence[Asked]
    notes: Sequence[str]

    def key(self, asked: Asked, sample: int) -> Key:
        """Of an answer to one of its questions."""
        return self.task.name, asked.question.index, sample, asked.digest


def evaluate(
    config: EvalConfig, tasks: Sequence[TaskConfig], parallel: ParallelContext, note: Note
) -> list[TaskResult]:
    """Ask, grade and report; what an earlier start has answered already is kept. Collective.

    Args:
        note: shows a line; does nothing on ranks other than the first.

    Returns:
        the results, on the first rank; empty on the others.

    Raises:
        MegatronRLError: on every rank; what is wrong and what to change.
    """
    is_remote = config.engine.name == "openai"
    with raise_together(parallel):
        check_world(config, parallel.world_size)
        described = None if is_remote else str(find_model_folder(Path(config.model.path)))
        tokenizer = None if described is None else load_tokenizer(described)
        exams = [read_exam(task, config, tokenizer) for task in tasks]
        folder = EvalFolder(Path(config.run.output_dir))
        mark = f"{config.model.path} at {config.engine.url}" if described is None else fingerprint(config.model.path)
        if parallel.is_main:
            folder.begin(config, tasks, mark)
        grading = Grading(config.grading, tasks)
    with closing(grading):
        with raise_together(parallel):  # before anything is sampled: a scorer that fails would make all answers wrong
            if parallel.is_main:
                exams = [with_golds_graded(exam, grading) for exam in exams]
        answerer: Answerer
        if described is None:
            answerer = EndpointAnswerer(
                config.engine, config.model.path, index=parallel.rank, count=parallel.world_size
            )
        else:
            answerer = engine_answerer(config, described, exams, tokenizer, parallel)
        with closing(answerer):
            with raise_together(parallel):
                done = read_answers(folder.answers)
            for exam in exams:
                with raise_together(parallel):
                    answer(exam, config, answerer, grading, done, folder, note)
                barrier(parallel)
        with raise_together(parallel):
            if not parallel.is_main:
                return []
            return concluded_all(config, exams, folder, grading, mark)


def with_golds_graded(exam: Exam, grading: Grading) -> Exam:
    """The task with a note about reference answers that its own scorer does not take.

    Raises:
        RewardError: it takes none, as it fails.
    """
    wrong = grading.wrong_golds(exam.task, exam.questions)
    if not wrong:
        return exam
    shown = ", ".join(map(str, wrong[:10])) + (", …" if len(wrong) > 10 else "")
    note = (
        f"{len(wrong)} reference answers are not right by the scorer {exam.task.scorer.name} themselves "
        f"(questions {shown})"
    )
    return replace(exam, notes=[*exam.notes, note])


def engine_answerer(
    config: EvalConfig, described: str, exams: Sequence[Exam], tokenizer: Any, parallel: ParallelContext
) -> EngineAnswerer:
    """This rank's part of an engine, with the model's weights; collective.

    Args:
        described: folder with config.json and tokenizer.
    """
    with raise_together(parallel):
        spec = read_model_spec(described)
        check_engine_size(spec, config.engine.tensor_parallel_size)
        longest = longest_sequence(exams, spec)
    assert config.engine.name != "openai"
    setup = EngineSetup(
        folder=described,
        spec=spec,
        place=engine_place(parallel, config.engine.tensor_parallel_size),
        device=parallel.device,
        dtype=torch_dtype(config.model.dtype),
        max_num_sequences=config.engine.max_num_sequences,
        max_model_len=longest,
        local_rank=parallel.local_rank,
        timeout_s=config.engine.timeout_s,
        options=config.engine.options,
    )
    engine = start_engine(config.engine.name, setup, parallel, seed=config.run.seed)
    try:
        with raise_together(parallel):
            load_engine(engine, spec, config.model.path)
    except MegatronRLError:
        engine.close()
        raise
    return EngineAnswerer(
        engine,
        tokenizer,
        ends=end_tokens(described),
        max_model_len=longest,
        max_requests=setup.max_num_sequences,
    )


def concluded_all(
    config: EvalConfig, exams: Sequence[Exam], folder: EvalFolder, grading: Grading, mark: str
) -> list[TaskResult]:
    """Results and reports from all answers."""
    found = read_answers(folder.answers)
    answers = {
        exam.task.name: by_question(
            [found[exam.key(asked, n)] for asked in exam.asked for n in range(exam.task.sampling.num_samples)]
        )
        for exam in exams
    }
    results = [concluded(exam, answers[exam.task.name], grading) for exam in exams]
    tasks = [exam.task for exam in exams]
    written = folder.finish(config, tasks, results, model=mark, versions=versions(config))
    write_atomically(folder.html, render(written, {exam.task.name: exam.asked for exam in exams}, answers))
    return results


def read_exam(task: TaskConfig, config: EvalConfig, tokenizer: Any) -> Exam:
    """A task with its questions as the model sees them.

    Raises:
        DataError, ConfigError: as of ``read_questions`` and ``as_asked``.
    """
    questions = read_questions(task)
    notes = []
    if task.num_questions is not None and len(questions) != task.num_questions:
        why = f"limit={config.limit}" if config.limit is not None else "the data differ from the published set"
        notes.append(f"{len(questions)} questions, of which the published set has {task.num_questions} ({why})")
    if tokenizer is None:  # the endpoint has its own
        asked = [Asked(question=one, prompt=one.text, token_ids=()) for one in questions]
    else:
        asked = as_asked(task, questions, tokenizer)
    return Exam(task, questions, asked, notes)


def check_world(config: EvalConfig, world_size: int) -> None:
    """
    Raises:
        ConfigError: the ranks do not divide into engines.
    """
    size = config.engine.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} does not divide by engine.tensor_parallel_size={size}. "
            f"Start a multiple of {size} ranks or change the key."
        )


def longest_sequence(exams: Sequence[Exam], spec: ModelSpec) -> int:
    """Tokens of prompt and response that an engine must be ready for.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    positions, longest = spec.max_position_embeddings, 0
    for exam in exams:
        lengths = [one.num_tokens for one in exam.asked]
        if max(lengths) >= positions:
            place = lengths.index(max(lengths))
            raise DataError(
                f"question {exam.questions[place].index} of task {exam.task.name} has {max(lengths)} tokens, the model "
                f"{positions} positions. Use fewer examples, or another model."
            )
        room = 1 if exam.task.likelihood is not None else exam.task.sampling.max_new_tokens
        longest = max(longest, min(positions, max(lengths) + room))
    return longest


def answer(
    exam: Exam,
    config: EvalConfig,
    answerer: Answerer,
    grading: Grading,
    done: Mapping[Key, Answer],
    folder: EvalFolder,
    note: Note,
) -> None:
    """This one's share of what is not answered yet, written as it comes."""
    task = exam.task
    wanted = missing(exam, config.run.seed, done, answerer.index, answerer.count)
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
        for response in answerer.respond(task, wanted):
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
    exam: Exam, seed: int, done: Mapping[Key, Answer], engine: int, num_engines: int
) -> list[tuple[Asked, list[tuple[int, int]]]]:
    """Questions of one engine with the (sample, seed) of each that is not answered yet."""
    found: list[tuple[Asked, list[tuple[int, int]]]] = []
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


def concluded(exam: Exam, answers: Mapping[int, Sequence[Answer]], grading: Grading) -> TaskResult:
    """Results of a task whose answers are all there."""
    task = exam.task
    wanted = task.majority and task.sampling.num_samples > 1
    clusters = {
        question.index: grading.clusters(task, question, answers[question.index])
        for question in exam.questions
        if wanted
    }
    groups = {question.index: question.group for question in exam.questions}
    return task_result(task, answers, clusters, groups, exam.notes)


def versions(config: EvalConfig) -> dict[str, str]:
    """Of what decides the numbers."""
    names = ["torch", "transformers", "math-verify"]
    names += [config.engine.name] if config.engine.name in ("vllm", "sglang") else []
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


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
