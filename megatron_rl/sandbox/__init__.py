"""Programs of unknown intent, run where they can do no harm. No torch here: reward workers import it."""

from megatron_rl.sandbox.run import Limits, Outcome, isolation, run_program

__all__ = ["Limits", "Outcome", "isolation", "run_program"]
