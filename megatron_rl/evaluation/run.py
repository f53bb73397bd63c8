"""Evaluation of a model on a suite of benchmarks. Every rank executes the same lines."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megatron_rl.config.evaluation import EvalConfig, TaskConfig
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import barrier, raise_together
from megatron_rl.evaluation.answers import GradedAnswer, by_question, read_answers
from megatron_rl.evaluation.backend_setup import check_world, start_backend
from megatron_rl.evaluation.backends import EvalBackend
from megatron_rl.evaluation.benchmark import Benchmark, check_reference_answers, read_benchmark
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.grading import Grader
from megatron_rl.evaluation.model import fingerprint
from megatron_rl.evaluation.report_html import render
from megatron_rl.evaluation.results import TaskResult, task_result
from megatron_rl.evaluation.runner import Note, generate_and_grade
from megatron_rl.rollout.serialization import write_lines
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import ParallelContext
from megatron_rl.weights.open import find_model_folder


def evaluate(
    config: EvalConfig, tasks: Sequence[TaskConfig], parallel: ParallelContext, note: Note
) -> list[TaskResult]:
    """Generate, grade and report; keep the graded answers of an earlier start. Collective.

    Args:
        config: of the evaluation.
        tasks: benchmarks of the suite.
        parallel: layout of this rank.
        note: prints a line on the first rank; does nothing on the others.

    Returns:
        the results on the first rank; empty on the others.

    Raises:
        MegatronRLError: on every rank; says what is wrong and what to change.
    """
    is_remote = config.engine.name == "openai"
    with raise_together(parallel):
        check_world(config, parallel.world_size)
        model_folder = None if is_remote else str(find_model_folder(Path(config.model.path)))
        tokenizer = None if model_folder is None else load_tokenizer(model_folder)
        benchmarks = [read_benchmark(task, config, tokenizer) for task in tasks]
        folder = EvalFolder(Path(config.run.output_dir))
        model_id = f"{config.model.path} at {config.engine.url}" if is_remote else fingerprint(config.model.path)
        if parallel.is_main:
            prepare_folder(folder, config, benchmarks, model_id)
        grader = Grader(config.grading, tasks)
    with closing(grader):
        benchmarks = check_references(benchmarks, grader, parallel)
        rendered = [(one.task, one.rendered) for one in benchmarks]
        backend = start_backend(config, model_folder, rendered, tokenizer, parallel)
        with closing(backend):
            generate_all(benchmarks, config.run.seed, backend, grader, folder, parallel, note)
        with raise_together(parallel):
            return summarize_results(config, benchmarks, folder, grader, model_id) if parallel.is_main else []


def prepare_folder(folder: EvalFolder, config: EvalConfig, benchmarks: Sequence[Benchmark], model_id: str) -> None:
    """Create or resume the output folder and write questions.jsonl.

    Args:
        folder: of the evaluation.
        config: of the evaluation.
        benchmarks: of the suite.
        model_id: the model's fingerprint, or its name and endpoint.

    Raises:
        ConfigError: the folder holds answers of another evaluation, or cannot be written.
    """
    folder.prepare(config, [one.task for one in benchmarks], model_id)
    write_lines(folder.questions, [line for one in benchmarks for line in one.as_lines()])


def check_references(benchmarks: Sequence[Benchmark], grader: Grader, parallel: ParallelContext) -> list[Benchmark]:
    """Grade the reference answers before generation; the benchmarks with notes about wrong ones. Collective."""
    with raise_together(parallel):  # a scorer that fails would grade all responses as wrong
        if not parallel.is_main:
            return list(benchmarks)
        return [check_reference_answers(one, grader) for one in benchmarks]


def generate_all(
    benchmarks: Sequence[Benchmark],
    seed: int,
    backend: EvalBackend,
    grader: Grader,
    folder: EvalFolder,
    parallel: ParallelContext,
    note: Note,
) -> None:
    """Generate and grade the responses that have no graded answer yet, on all ranks; collective."""
    with raise_together(parallel):
        done = read_answers(folder.answers)
    for benchmark in benchmarks:
        with raise_together(parallel):
            generate_and_grade(benchmark, seed, backend, grader, done, folder, note)
        barrier(parallel)


def summarize_results(
    config: EvalConfig, benchmarks: Sequence[Benchmark], folder: EvalFolder, grader: Grader, model_id: str
) -> list[TaskResult]:
    """Compute the results of all benchmarks from the graded answers and write results.json and the reports."""
    graded = read_answers(folder.answers)
    answers = {
        one.task.name: by_question(
            [graded[one.key(rendered, n)] for rendered in one.rendered for n in range(one.task.sampling.num_samples)]
        )
        for one in benchmarks
    }
    results = [summarize_benchmark(one, answers[one.task.name], grader) for one in benchmarks]
    tasks = [one.task for one in benchmarks]
    written = folder.write_results(config, tasks, results, model=model_id, versions=versions(config))
    write_atomically(folder.html, render(written, {one.task.name: one.rendered for one in benchmarks}, answers))
    return results


def summarize_benchmark(
    benchmark: Benchmark, answers: Mapping[int, Sequence[GradedAnswer]], grader: Grader
) -> TaskResult:
    """Compute the results of one benchmark, all of whose answers are graded."""
    task = benchmark.task
    has_majority = task.majority and task.sampling.num_samples > 1
    clusters = {
        question.index: grader.cluster_answers(task, question, answers[question.index])
        for question in benchmark.questions
        if has_majority
    }
    groups = {question.index: question.group for question in benchmark.questions}
    return task_result(task, answers, clusters, groups, benchmark.notes)


def versions(config: EvalConfig) -> dict[str, str]:
    """Return the versions of the packages that influence scores."""
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
