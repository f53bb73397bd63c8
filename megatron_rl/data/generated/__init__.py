"""Generated tasks: unlimited verifiable problems without a download."""

from megatron_rl.data.generated.arithmetic import Arithmetic
from megatron_rl.data.generated.base import Task
from megatron_rl.data.generated.countdown import Countdown
from megatron_rl.data.generated.hasty_addition import HastyAddition
from megatron_rl.data.generated.hasty_chain import HastyChain
from megatron_rl.data.generated.knights_and_knaves import KnightsAndKnaves
from megatron_rl.data.generated.multiplication import Multiplication

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "hasty_addition": HastyAddition,
    "hasty_chain": HastyChain,
    "knights_and_knaves": KnightsAndKnaves,
    "multiplication": Multiplication,
}

__all__ = ["TASKS", "Task"]
