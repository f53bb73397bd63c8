"""Benchmarks during training: the policy in the rollout engine generates the responses to a suite of tasks."""

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
from megatron_rl.evaluation.grading import Grader
from megatron_rl.evaluation.model import eos_token_ids
from megatron_rl.evaluation.results import TaskResult
from megatron_rl.evaluation.run import check_references, generate_all, prepare_folder, summarize_results
from megatron_rl.evaluation.runner import Note
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.types import ParallelContext


@dataclass(frozen=True)
class BenchmarkSuite:
    """The benchmarks of a training run."""

    config: EvalConfig
    benchmarks: Sequence[Benchmark]

    def max_sequence_length(self, max_positions: int) -> int:
        """Return the number of tokens of the longest prompt with its response, at most ``max_positions``.

        Args:
            max_positions: context length of the model.

        Raises:
            DataError: a prompt fills the context, so that no token is left for a response.
        """
        return longest_sequence([(one.task, one.rendered) for one in self.benchmarks], max_positions)


def read_benchmark_suite(config: RunConfig, tokenizer: Any) -> BenchmarkSuite | None:
    """Read the suite that ``benchmarks.suite`` names, with the run's model and engine; None without one.

    Raises:
        ConfigError, DataError: a file or data set is missing or invalid.
    """
    if config.benchmarks.suite is None:
        return None
    model = [f"model.path={json.dumps(config.model.path)}", f"model.dtype={config.model.dtype}"]
    suite, tasks = load_evaluation(config.benchmarks.suite, model)
    engine = EvalEngineSection(name=config.rollout.engine)
    suite = replace(suite, engine=engine)
    return BenchmarkSuite(suite, [read_benchmark(task, suite, tokenizer) for task in tasks])


class BenchmarkEvaluator:
    """Evaluates the current policy on the suite."""

    def __init__(
        self,
        suite: BenchmarkSuite,
        supervisor: EngineSupervisor,
        config: RunConfig,
        tokenizer: Any,
        parallel: ParallelContext,
        note: Note,
        *,
        max_positions: int,
    ) -> None:
        """
        Args:
            suite: benchmarks to evaluate.
            supervisor: of the engines that hold the policy.
            config: of the run.
            tokenizer: of the policy.
            parallel: layout of this rank.
            note: prints a line on the first rank.
            max_positions: context length of the model.
        """
        self._config, self._benchmarks = suite.config, suite.benchmarks
        self._supervisor, self._parallel, self._note = supervisor, parallel, note
        self._folder = Path(config.run.output_dir) / "benchmarks"
        self._backend = EngineBackend(
            supervisor.engine,
            tokenizer,
            eos_token_ids=[*eos_token_ids(config.model.path), *config.rollout.stop_token_ids],
            max_model_len=suite.max_sequence_length(max_positions),
            max_requests=config.rollout.max_num_sequences,
        )

    def evaluate(self, step: int) -> dict[str, Reduction]:
        """Evaluate the suite; write answers and reports to benchmarks/step_N; collective.

        The engines must hold the policy of this step.

        Returns:
            ``benchmark/TASK/…`` metrics on the first rank; empty on the others.

        Raises:
            EngineDied: engines died too often.
            RewardError: a grading worker does not start, or a scorer fails on every reference answer.
        """
        folder = EvalFolder(self._folder / f"step_{step:06d}")
        model_id = f"step {step}"
        run = replace(self._config.run, name=f"{self._config.run.name}, step {step}", output_dir=str(folder.path))
        config = replace(self._config, run=run)
        with raise_together(self._parallel):
            if self._parallel.is_main:
                # an earlier attempt at this step may have used other weights
                shutil.rmtree(folder.path, ignore_errors=True)
                prepare_folder(folder, config, self._benchmarks, model_id)
            grader = Grader(config.grading, [one.task for one in self._benchmarks])
        with closing(grader):
            benchmarks = check_references(self._benchmarks, grader, self._parallel)
            self._generate(step, folder, grader)
            with raise_together(self._parallel):
                if not self._parallel.is_main:
                    return {}
                results = summarize_results(config, benchmarks, folder, grader, model_id)
        accuracies = [f"{one.task} {one.scores[f'avg@{one.num_samples}']:.1%}" for one in results]
        self._note(f"benchmarks, step {step}: {', '.join(accuracies)}; {folder.html}")
        return metrics_of(results)

    def _generate(self, step: int, folder: EvalFolder, grader: Grader) -> None:
        """Generate and grade all responses; after an engine died, restart it and generate only the missing ones."""
        while True:
            try:
                generate_all(
                    self._benchmarks,
                    self._config.run.seed,
                    self._backend,
                    grader,
                    folder,
                    self._parallel,
                    lambda _: None,
                )
            except EngineDied:
                if not self._supervisor.restart_dead():
                    raise
                self._supervisor.push(step)
            else:
                return


def metrics_of(results: Sequence[TaskResult]) -> dict[str, Reduction]:
    """Return ``benchmark/TASK/SCORE`` metrics of all scores that are not NaN."""
    return {
        f"benchmark/{one.task}/{name}": Mean(value)
        for one in results
        for name, value in one.scores.items()
        if not math.isnan(value)
    }
