"""Sandbox for untrusted programs. Does not import torch, as reward workers import it."""

from megatron_rl.sandbox.run import Limits, Outcome, isolation_error, run_program

__all__ = ["Limits", "Outcome", "isolation_error", "run_program"]
