"""Train a reward model: python -m megatron_rl.train_reward_model --config FILE [key=value …], or under torchrun."""

import sys
from collections.abc import Sequence

from megatron_rl.cli import parse_arguments, report_errors
from megatron_rl.config.load import load_as
from megatron_rl.config.reward_training import RewardTrainingConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parsed = parse_arguments(
        arguments,
        "python -m megatron_rl.train_reward_model",
        "Train a reward model that scores responses or their steps.",
    )
    with report_errors() as command:
        config = load_as(RewardTrainingConfig, parsed.config, parsed.overrides)
        from megatron_rl.distributed.signals import EXIT_REQUEUE, ignore_stop_signals
        from megatron_rl.trainer import reward_model_trainer as reward_training

        if parsed.dry_run:
            reward_training.dry_run(config, parsed.resume, show=command.is_main)
            return 0
        if reward_training.run(config, parsed.resume):
            command.status = EXIT_REQUEUE
        ignore_stop_signals()
        if command.is_main:
            from megatron_rl.reporting.run_report import write_report

            print(write_report(config), flush=True)
    return command.status


if __name__ == "__main__":
    sys.exit(main())
