"""A suite of tasks put to a model. Every rank executes these same lines."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import barrier, raise_together
from megatron_rl.evaluation.answers import Answer, by_question, read_answers
from megatron_rl.evaluation.backend_setup import check_world, start_backend
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.benchmark import Benchmark, read_benchmark, with_golds_graded
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.grading import Grading
from megatron_rl.evaluation.model import fingerprint
from megatron_rl.evaluation.report_html import render
from megatron_rl.evaluation.results import TaskResult, task_result
from megatron_rl.evaluation.runner import Note, answer
from megatron_rl.rollout.serialization import write_lines
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import ParallelContext
from megatron_rl.weights.open import find_model_folder


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
        exams = [read_benchmark(task, config, tokenizer) for task in tasks]
        folder = EvalFolder(Path(config.run.output_dir))
        mark = f"{config.model.path} at {config.engine.url}" if described is None else fingerprint(config.model.path)
        if parallel.is_main:
            begin(folder, config, exams, mark)
        grading = Grading(config.grading, tasks)
    with closing(grading):
        exams = checked(exams, grading, parallel)
        answerer = start_backend(config, described, [(one.task, one.asked) for one in exams], tokenizer, parallel)
        with closing(answerer):
            answer_all(exams, config.run.seed, answerer, grading, folder, parallel, note)
        with raise_together(parallel):
            return concluded_all(config, exams, folder, grading, mark) if parallel.is_main else []


def begin(folder: EvalFolder, config: EvalConfig, exams: Sequence[Benchmark], mark: str) -> None:
    """Make the folder, or go on in it, with what is asked.

    Args:
        mark: the model's fingerprint.

    Raises:
        ConfigError: it holds answers to something else, or cannot be written.
    """
    folder.begin(config, [exam.task for exam in exams], mark)
    write_lines(folder.questions, [line for exam in exams for line in exam.as_lines()])


def checked(exams: Sequence[Benchmark], grading: Grading, parallel: ParallelContext) -> list[Benchmark]:
    """The tasks with notes about their reference answers, before anything is sampled; collective."""
    with raise_together(parallel):  # a scorer that fails would make all answers wrong
        return [with_golds_graded(exam, grading) for exam in exams] if parallel.is_main else list(exams)


def answer_all(
    exams: Sequence[Benchmark],
    seed: int,
    answerer: EvalBackend,
    grading: Grading,
    folder: EvalFolder,
    parallel: ParallelContext,
    note: Note,
) -> None:
    """What is not answered yet, by all ranks; collective."""
    with raise_together(parallel):
        done = read_answers(folder.answers)
    for exam in exams:
        with raise_together(parallel):
            answer(exam, seed, answerer, grading, done, folder, note)
        barrier(parallel)


def concluded_all(
    config: EvalConfig, exams: Sequence[Benchmark], folder: EvalFolder, grading: Grading, mark: str
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


def concluded(exam: Benchmark, answers: Mapping[int, Sequence[Answer]], grading: Grading) -> TaskResult:
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
