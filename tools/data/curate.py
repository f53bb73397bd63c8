"""Turn problems into verified data: python tools/data/curate.py --config FILE [key=value …], alone or under torchrun.

Reads problems, drops those that share n-grams with benchmarks or are near duplicates of others, lets a model solve the
rest, grades its responses, keeps the problems whose pass rate is within pass_rate, labels their difficulty, and writes
run.output_dir/curated.jsonl. The same command resumes an interrupted curation.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.cli import report_errors
from megatron_rl.evaluate import COLLECTIVE_TIMEOUT_MINUTES


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Turn problems into verified data.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file, as in configs/curation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance generate.engine.name=vllm")
    args = parser.parse_intermixed_args(argv)
    with report_errors() as command:
        from megatron_rl.config.curation import CurationConfig
        from megatron_rl.config.load import load_as
        from megatron_rl.config.parallel import ParallelSection
        from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

        config = load_as(CurationConfig, args.config, args.overrides)
        try:
            curate(
                config, args.config.parent, init_parallel(ParallelSection(timeout_minutes=COLLECTIVE_TIMEOUT_MINUTES))
            )
        finally:
            leave_world()
    return command.status


def curate(config: Any, config_folder: Path, parallel: Any) -> None:
    """Filter, solve and grade the problems; every rank runs this, and only rank 0 reads and writes files."""
    from megatron_rl.curation.pipeline import CurationFolder, candidates, evaluation_of, filter_by_pass_rate
    from megatron_rl.curation.rows import OUTPUTS
    from megatron_rl.distributed.collectives import raise_together
    from megatron_rl.evaluation.run import evaluate
    from megatron_rl.rollout.serialization import write_lines

    folder = CurationFolder(Path(config.run.output_dir))

    def note(text: str) -> None:
        if parallel.is_main:
            print(text, flush=True)

    with raise_together(parallel):
        if parallel.is_main:
            filtered = candidates(config, config_folder)
            write_lines(folder.candidates, filtered.kept)
            note(f"{len(filtered.kept)} candidates, dropped: {counted(filtered.dropped)}")
    if config.generate is not None:
        evaluation, task = evaluation_of(config.generate, config)
        evaluate(evaluation, [task], parallel, note)
    with raise_together(parallel):
        if parallel.is_main:
            solved = filter_by_pass_rate(config, filtered.kept)
            dropped = [*filtered.dropped, *solved.dropped]
            write_lines(folder.curated, [OUTPUTS[config.output.schema](problem) for problem in solved.kept])
            write_lines(folder.dropped, dropped)
            labels = dict(Counter(problem.difficulty for problem in solved.kept if problem.difficulty is not None))
            note(f"{len(solved.kept)} kept in {folder.curated} {json.dumps(labels)}; dropped: {counted(dropped)}")


def counted(dropped: Sequence[Any]) -> str:
    """Number of dropped problems by stage, such as ``3 by contamination``; ``0`` if none."""
    return (
        ", ".join(f"{number} by {stage}" for stage, number in Counter(problem["stage"] for problem in dropped).items())
        or "0"
    )


if __name__ == "__main__":
    sys.exit(main())
