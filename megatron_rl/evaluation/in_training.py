"""Benchmarks during a run: a suite of tasks, answered by the training engine."""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig
from megatron_rl.config.evaluation import EvalConfig, EvalEngineSection, load_evaluation
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import EngineDied
from megatron_rl.evaluation.backend_setup import longest_sequence
from megatron_rl.evaluation.backends import EngineBackend
from megatron_rl.evaluation.benchmark import Benchmark, read_benchmark
from megatron_rl.evaluation.folder import EvalFolder
from megatron_rl.evaluation.grading import Grading
from megatron_rl.evaluation.model import end_tokens
from megatron_rl.evaluation.results import TaskResult
from megatron_rl.evaluation.run import answer_all, begin, checked, concluded_all
from megatron_rl.evaluation.runner import Note
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.types import ParallelContext


@dataclass(frozen=True)
class BenchmarkSuite:
    """What is asked during a run."""

    config: EvalConfig
    exams: Sequence[Benchmark]

    def longest(self, positions: int) -> int:
        """Tokens of prompt and response that the engine must be ready for.

        Raises:
            DataError: a prompt leaves no room for an answer.
        """
        return longest_sequence([(exam.task, exam.asked) for exam in self.exams], positions)


def read_benchmark_suite(config: RunConfig, tokenizer: Any) -> BenchmarkSuite | None:
    """The suite of benchmarks.suite; None without one. Its model, engine and folder are the run's.

    Raises:
        ConfigError, DataError: a file or data set is missing or wrong.
    """
    if config.benchmarks.suite is None:
        return None
    model = [f"model.path={json.dumps(config.model.path)}", f"model.dtype={config.model.dtype}"]
    suite, tasks = load_evaluation(config.benchmarks.suite, model)
    engine = EvalEngineSection(name=config.rollout.engine)
    suite = replace(suite, engine=engine)
    return BenchmarkSuite(suite, [read_benchmark(task, suite, tokenizer) for task in tasks])


class BenchmarkEvaluator:
    """Puts the suite to the policy as it is at a step."""

    def __init__(
        self,
        suite: BenchmarkSuite,
        keeper: EngineSupervisor,
        config: RunConfig,
        tokenizer: Any,
        parallel: ParallelContext,
        note: Note,
        *,
        positions: int,
    ) -> None:
        """
        Args:
            positions: that the model has.
        """
        self._config, self._exams = suite.config, suite.exams
        self._keeper, self._parallel, self._note = keeper, parallel, note
        self._folder = Path(config.run.output_dir) / "benchmarks"
        self._answerer = EngineBackend(
            keeper.engine,
            tokenizer,
            ends=[*end_tokens(config.model.path), *config.rollout.stop_token_ids],
            max_model_len=suite.longest(positions),
            max_requests=config.rollout.max_num_sequences,
        )

    def evaluate(self, step: int) -> dict[str, Reduction]:
        """``benchmark/TASK/…`` metrics on the first rank, with answers and reports in benchmarks/step_N; collective.

        The engines have the policy of the step.

        Raises:
            EngineDied: engines died too often.
            RewardError: a scorer fails.
        """
        folder = EvalFolder(self._folder / f"step_{step:06d}")
        mark = f"step {step}"
        run = replace(self._config.run, name=f"{self._config.run.name}, step {step}", output_dir=str(folder.path))
        config = replace(self._config, run=run)
        with raise_together(self._parallel):
            if self._parallel.is_main:
                # of an attempt that was given up, whose weights were perhaps others
                shutil.rmtree(folder.path, ignore_errors=True)
                begin(folder, config, self._exams, mark)
            grading = Grading(config.grading, [exam.task for exam in self._exams])
        with closing(grading):
            exams = checked(self._exams, grading, self._parallel)
            self._answer(step, folder, grading)
            with raise_together(self._parallel):
                if not self._parallel.is_main:
                    return {}
                results = concluded_all(config, exams, folder, grading, mark)
        shown = [f"{one.task} {one.scores[f'avg@{one.num_samples}']:.1%}" for one in results]
        self._note(f"benchmarks, step {step}: {', '.join(shown)}; {folder.html}")
        return metrics_of(results)

    def _answer(self, step: int, folder: EvalFolder, grading: Grading) -> None:
        """All of it; an engine that dies meanwhile is started again, and only asked what is missing."""
        while True:
            try:
                answer_all(
                    self._exams, self._config.run.seed, self._answerer, grading, folder, self._parallel, lambda _: None
                )
            except EngineDied:
                if not self._keeper.restart_dead():
                    raise
                self._keeper.push(step)
            else:
                return


def metrics_of(results: Sequence[TaskResult]) -> dict[str, Reduction]:
    """What is known of each task."""
    return {
        f"benchmark/{one.task}/{name}": Mean(value)
        for one in results
        for name, value in one.scores.items()
        if not math.isnan(value)
    }
