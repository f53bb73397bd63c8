"""What holds how much memory of a rank, phase by phase."""

import resource
from collections.abc import Mapping
from typing import Literal

import torch

from megatron_rl.metrics.metric import Max, Reduction
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.trainer.models import RunModels

Phase = Literal["push", "generation", "update"]


class MemoryTracker:
    """Looks at the holders once in each phase of a step."""

    def __init__(self, models: RunModels, engine: Engine) -> None:
        self._models = models
        self._engine = engine
        self._seen: dict[Phase, dict[str, int]] = {}

    def record(self, phase: Phase) -> None:
        """Note what is held now."""
        models = {
            f"{name}_{part}": size
            for name, learner in self._models.learners.items()
            for part, size in learner.memory().items()
        }
        if self._models.reward_model is not None:
            models["reward_model_params"] = self._models.reward_model.num_bytes
        engine = {f"engine_{part}": size for part, size in self._engine.memory().items()}
        self._seen[phase] = {**models, **engine, "rank": _held_by_rank(self._models.policy.parallel.device)}

    def metrics(self) -> dict[str, Reduction]:
        """memory/PHASE/HOLDER_mb: of the rank that holds most."""
        return {
            f"memory/{phase}/{holder}_mb": Max(size / 1e6)
            for phase, holders in self._seen.items()
            for holder, size in holders.items()
        }

    def table(self) -> str:
        """This rank's, in MB, for people."""
        if not self._seen:
            return ""
        phases = list(self._seen)
        holders = list(dict.fromkeys(holder for seen in self._seen.values() for holder in seen))
        width = max(map(len, holders))
        lines = [f"{'memory of a rank, MB':<{width}} " + " ".join(f"{phase:>10}" for phase in phases)]
        lines += [f"{holder:<{width}} {_row(self._seen, phases, holder)}" for holder in holders]
        return "\n".join(lines)


def _row(seen: Mapping[Phase, Mapping[str, int]], phases: list[Phase], holder: str) -> str:
    return " ".join(f"{seen[phase][holder] / 1e6:10.1f}" if holder in seen[phase] else " " * 10 for phase in phases)


def _held_by_rank(device: torch.device) -> int:
    """Bytes that torch has from the device; on the host those that the process has in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
