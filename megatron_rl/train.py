"""Train: python -m megatron_rl.train --config FILE [key=value …], alone or under torchrun.

Nothing heavy is imported at the top: reward workers import the main module again.
"""

import sys
from collections.abc import Sequence

from megatron_rl.cli import parse_arguments, reported


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parsed = parse_arguments(
        arguments, "python -m megatron_rl.train", "Reinforcement learning (or fine-tuning) of a language model."
    )
    with reported() as command:
        from megatron_rl.config import load_config

        config = load_config(parsed.config, parsed.overrides)
        if parsed.dry_run:
            from megatron_rl.trainer.dry_run import dry_run

            dry_run(config, parsed.resume, show=command.is_main)
            return 0
        from megatron_rl.distributed.signals import EXIT_REQUEUE, ignore_stop_signals
        from megatron_rl.trainer.setup import run

        if run(config, parsed.resume):
            command.status = EXIT_REQUEUE
        ignore_stop_signals()
        if command.is_main:
            from megatron_rl.reporting.run_report import conclude

            print(conclude(config), flush=True)  # also after a stop: what there is so far
    return command.status


if __name__ == "__main__":
    sys.exit(main())
