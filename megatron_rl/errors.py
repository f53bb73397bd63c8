"""The exception hierarchy: every error that a user can cause or see has a class here.

A message says what is wrong, the value, what was expected and what to change.
Each class also derives from the matching built-in exception, so that callers may catch either.
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
    """A rollout engine rejects a request or fails."""


class RequestRejected(EngineError):
    """A server rejects one request."""


class EngineDied(EngineError):
    """A rollout engine's process has exited or does not respond; it can be restarted."""


class WeightSyncError(MegatronRLError, RuntimeError):
    """The weights in the engine are not those of the policy."""


class ConversionError(MegatronRLError, ValueError):
    """A Hugging Face checkpoint is missing, damaged or unsupported, or contradicts its config."""


class CheckpointError(MegatronRLError, OSError):
    """A training checkpoint cannot be written, found or restored."""


class TrainingDiverged(MegatronRLError, ArithmeticError):
    """A loss or gradient is not finite, or the log-prob mismatch is above its limit; raised on all ranks.

    It is raised before the optimizer steps if the loss or gradient is not finite.
    """


class Interrupted(MegatronRLError):
    """A stop was requested in the middle of a phase; raised on all ranks, and not a failure."""

    num_prompts = 0
    """Prompts that the interrupted step took from the data and carries over."""
    is_saved = False
    """Whether a checkpoint of the interrupted state has been saved."""
