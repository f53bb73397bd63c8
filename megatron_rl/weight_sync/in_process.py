"""Weights handed over inside the process: the policy streams, the engine copies."""

from megatron_rl.errors import WeightSyncError
from megatron_rl.mcore.policy import Policy
from megatron_rl.rollout.engine import Engine


class WeightSync:
    """Keeps an engine at the policy's version."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self._policy = policy
        self._engine = engine

    def push(self, version: int) -> None:
        """Give the engine the policy's weights, unless it has that version already; collective.

        Raises:
            WeightSyncError: a tensor is missing, unexpected or misshapen, or the engine keeps another version.
        """
        if self._engine.version == version:
            return
        self._engine.load_weights(self._policy.export(), version)
        if self._engine.version != version:
            raise WeightSyncError(f"the engine says version {self._engine.version} after version {version} was pushed.")
