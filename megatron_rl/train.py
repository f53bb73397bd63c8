"""Train: python -m megatron_rl.train --config FILE [key=value …], alone or under torchrun.

Heavy imports are inside ``main``, because every reward worker imports the main module again.
"""

import sys
from collections.abc import Sequence

from megatron_rl.cli import parse_arguments, report_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parsed = parse_arguments(
        arguments, "python -m megatron_rl.train", "Reinforcement learning (or fine-tuning) of a language model."
    )
    with report_errors() as command:
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
            from megatron_rl.reporting.run_report import write_report

            print(write_report(config), flush=True)  # after a stop as well: a report of the run so far
    return command.status


if __name__ == "__main__":
    sys.exit(main())
