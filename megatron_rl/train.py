"""Train: python -m megatron_rl.train --config FILE [key=value …], alone or under torchrun.

Nothing heavy is imported at the top: reward workers import the main module again.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_rl.errors import MegatronRLError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.train", description="Reinforcement learning (or fine-tuning) of a language model."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; may name a base: file")
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and print the configuration, then stop")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the run folder's latest checkpoint; never: refuse a used folder; PATH: from there",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optimizer.lr=1e-6")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parsed = parse_arguments(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        from megatron_rl.config import load_config

        config = load_config(parsed.config, parsed.overrides)
        if parsed.dry_run:
            from megatron_rl.dry_run import dry_run

            dry_run(config, parsed.resume, show=is_main)
            return 0
        from megatron_rl.loop import run

        run(config, parsed.resume)
        if is_main:
            from megatron_rl.analysis.run_report import conclude

            print(conclude(config), flush=True)  # also after a stop: what there is so far
    except MegatronRLError as error:
        # what another rank found is printed there only once: by the first rank, which raises it too
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
