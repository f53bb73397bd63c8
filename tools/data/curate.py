"""Problems to verified data: python tools/data/curate.py --config FILE [key=value …], alone or under torchrun.

Reads problems, drops those that share n-grams with benchmarks or are nearly the same as others, has a model solve the
rest, grades what it says, keeps what it solves neither never nor always (pass_rate), labels how hard each is, and
writes run.output_dir/curated.jsonl. Started again it goes on where it was.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.cli import reported
from megatron_rl.evaluate import PATIENCE_MINUTES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Problems to verified data.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file, as in configs/curation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as generate.engine.name=vllm")
    parsed = parser.parse_intermixed_args(arguments)
    with reported() as command:
        from megatron_rl.config.curation import CurationConfig
        from megatron_rl.config.load import load_as
        from megatron_rl.config.parallel import ParallelSection
        from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

        config = load_as(CurationConfig, parsed.config, parsed.overrides)
        try:
            curate(config, parsed.config.parent, init_parallel(ParallelSection(timeout_minutes=PATIENCE_MINUTES)))
        finally:
            leave_world()
    return command.status


def curate(config: Any, config_folder: Path, parallel: Any) -> None:
    """Every rank executes these lines; the first one reads and writes."""
    from megatron_rl.curation.pipeline import CurationFolder, candidates, evaluation_of, solved
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
            found = candidates(config, config_folder)
            write_lines(folder.candidates, found.kept)
            note(f"{len(found.kept)} candidates, dropped: {counted(found.dropped)}")
    if config.generate is not None:
        evaluation, task = evaluation_of(config.generate, config)
        evaluate(evaluation, [task], parallel, note)
    with raise_together(parallel):
        if parallel.is_main:
            rated = solved(config, found.kept)
            dropped = [*found.dropped, *rated.dropped]
            write_lines(folder.curated, [OUTPUTS[config.output.schema](one) for one in rated.kept])
            write_lines(folder.dropped, dropped)
            labels = dict(Counter(one.difficulty for one in rated.kept if one.difficulty is not None))
            note(f"{len(rated.kept)} kept in {folder.curated} {json.dumps(labels)}; dropped: {counted(dropped)}")


def counted(dropped: Sequence[Any]) -> str:
    """How many by stage."""
    return (
        ", ".join(f"{number} by {stage}" for stage, number in Counter(one["stage"] for one in dropped).items()) or "0"
    )


if __name__ == "__main__":
    sys.exit(main())
