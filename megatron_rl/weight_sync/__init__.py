"""Transfer of policy weights to the rollout engine: planned, versioned, verified."""

from megatron_rl.weight_sync.push import WeightSync

__all__ = ["WeightSync"]
