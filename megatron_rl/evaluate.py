"""Evaluate: python -m megatron_rl.evaluate --config FILE [key=value …], alone or under torchrun.

Heavy imports are inside ``main``, because every grading worker imports the main module again.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_rl.cli import report_errors

# ranks that have finished wait in a collective for those that still generate, and for the first one to write the report
COLLECTIVE_TIMEOUT_MINUTES = 7 * 24 * 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.evaluate", description="Evaluate a model on a suite of benchmarks."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of a suite, as in configs/eval")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance engine.name=vllm")
    parsed = parser.parse_intermixed_args(arguments)
    with report_errors() as command:
        from megatron_rl.config.evaluation import load_evaluation

        config, tasks = load_evaluation(parsed.config, parsed.overrides)
        from megatron_rl.config.parallel import ParallelSection
        from megatron_rl.evaluation.report import results_table
        from megatron_rl.evaluation.run import evaluate
        from megatron_rl.mcore.runtime.parallel import joined_world

        def note(text: str) -> None:
            if command.is_main and config.console != "silent":
                print(text, flush=True)

        with joined_world(ParallelSection(timeout_minutes=COLLECTIVE_TIMEOUT_MINUTES)) as parallel:
            results = evaluate(config, tasks, parallel, note)
        if command.is_main:
            print(results_table(results), flush=True)
            print(f"report: {config.run.output_dir}/report.html", flush=True)
    return command.status


if __name__ == "__main__":
    sys.exit(main())
