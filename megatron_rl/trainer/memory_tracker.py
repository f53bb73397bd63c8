"""Memory that models and engine hold on a rank, per phase of a step."""

import resource
from collections.abc import Mapping
from typing import Literal

import torch

from megatron_rl.metrics.metric import Max, Reduction
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.trainer.models import RunModels

Phase = Literal["push", "generation", "update"]


class MemoryTracker:
    """Records how much memory each model and the engine hold, once per phase of a step."""

    def __init__(self, models: RunModels, engine: Engine) -> None:
        self._models = models
        self._engine = engine
        self._recorded: dict[Phase, dict[str, int]] = {}

    def record(self, phase: Phase) -> None:
        """Record the bytes that are held now as those of ``phase``."""
        models = {
            f"{name}_{part}": size
            for name, learner in self._models.learners.items()
            for part, size in learner.memory().items()
        }
        if self._models.reward_model is not None:
            models["reward_model_params"] = self._models.reward_model.num_bytes
        engine = {f"engine_{part}": size for part, size in self._engine.memory().items()}
        self._recorded[phase] = {**models, **engine, "rank": _held_by_rank(self._models.policy.parallel.device)}

    def metrics(self) -> dict[str, Reduction]:
        """``memory/<phase>/<holder>_mb``: the maximum over ranks, in MB."""
        return {
            f"memory/{phase}/{holder}_mb": Max(size / 1e6)
            for phase, holders in self._recorded.items()
            for holder, size in holders.items()
        }

    def table(self) -> str:
        """Table of this rank's memory in MB, for the console; empty if nothing has been recorded."""
        if not self._recorded:
            return ""
        phases = list(self._recorded)
        holders = list(dict.fromkeys(holder for recorded in self._recorded.values() for holder in recorded))
        width = max(map(len, holders))
        lines = [f"{'memory of a rank, MB':<{width}} " + " ".join(f"{phase:>10}" for phase in phases)]
        lines += [f"{holder:<{width}} {_row(self._recorded, phases, holder)}" for holder in holders]
        return "\n".join(lines)


def _row(recorded: Mapping[Phase, Mapping[str, int]], phases: list[Phase], holder: str) -> str:
    return " ".join(
        f"{recorded[phase][holder] / 1e6:10.1f}" if holder in recorded[phase] else " " * 10 for phase in phases
    )


def _held_by_rank(device: torch.device) -> int:
    """Bytes that torch has reserved on the device; on CPU, the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
