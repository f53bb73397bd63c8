"""Policy weights into the rollout engine, versioned."""

from megatron_rl.weight_sync.in_process import WeightSync

__all__ = ["WeightSync"]
