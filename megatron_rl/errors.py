"""The error hierarchy: every error a user can cause or meet has a kind here.

A message says what is wrong, the value, what was expected and what to change.
Each kind is also the matching built-in exception, so that callers may catch either.
"""


class MegatronRLError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(MegatronRLError, ValueError):
    """A configuration key or value is wrong, or values contradict each other."""


class DataError(MegatronRLError, ValueError):
    """A prompt source, a row of it, a tokenizer or a chat template is unusable."""


class RewardError(MegatronRLError, RuntimeError):
    """A reward function cannot be found or loaded, or fails too often."""


class EngineError(MegatronRLError, RuntimeError):
    """A rollout engine refuses a request or breaks."""


class RefusedError(EngineError):
    """A server refuses one request."""


class EngineDied(EngineError):
    """A rollout engine's process is gone, or does not answer; it can be started again."""


class WeightSyncError(MegatronRLError, RuntimeError):
    """Weights did not reach the engine as the policy holds them."""


class ConversionError(MegatronRLError, ValueError):
    """A Hugging Face checkpoint is missing, damaged, unsupported or contradicts its config."""


class CheckpointError(MegatronRLError, OSError):
    """A training checkpoint cannot be written, found or restored."""


class TrainingDiverged(MegatronRLError, ArithmeticError):
    """A loss or gradient is not finite; raised on all ranks before the optimizer steps."""


class Interrupted(MegatronRLError):
    """Somebody asks the run to stop, in the middle of a phase; raised on all ranks, and no fault."""

    num_prompts = 0
    """Taken from the data for what was in work and is carried over."""
