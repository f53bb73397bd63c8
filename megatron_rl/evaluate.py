"""Evaluate: python -m megatron_rl.evaluate --config FILE [key=value …], alone or under torchrun.

Nothing heavy is imported at the top: grading workers import the main module again.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_rl.cli import reported

# ranks wait for those that still answer, and for the first one to report
PATIENCE_MINUTES = 7 * 24 * 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.evaluate", description="Put the questions of benchmarks to a model."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of a suite, as in configs/eval")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.name=vllm")
    parsed = parser.parse_intermixed_args(arguments)
    with reported() as command:
        from megatron_rl.config.evaluation import load_evaluation

        config, tasks = load_evaluation(parsed.config, parsed.overrides)
        from megatron_rl.config.parallel import ParallelSection
        from megatron_rl.evaluation.report import results_table
        from megatron_rl.evaluation.run import evaluate
        from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

        def note(text: str) -> None:
            if command.is_main and config.console != "silent":
                print(text, flush=True)

        try:
            results = evaluate(config, tasks, init_parallel(ParallelSection(timeout_minutes=PATIENCE_MINUTES)), note)
        finally:
            leave_world()
        if command.is_main:
            print(results_table(results), flush=True)
            print(f"report: {config.run.output_dir}/report.html", flush=True)
    return command.status


if __name__ == "__main__":
    sys.exit(main())
