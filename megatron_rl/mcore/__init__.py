"""Models, optimizer and checkpoints on Megatron-Core; no other package imports it.

Importing this package prepares Megatron-Core for this machine: without CUDA its modules are compiled for the CPU.
Every module in here may therefore import ``megatron.core`` at its top.
"""

import importlib.metadata
import warnings

from megatron_rl.errors import ConfigError
from megatron_rl.mcore.runtime import cpu
from megatron_rl.mcore.runtime.event_loop import share_event_loop

OLDEST, FIRST_UNTESTED = (0, 16, 1), (0, 20)


def _check_version() -> None:
    version = importlib.metadata.version("megatron-core")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST <= numbers < FIRST_UNTESTED:
        raise ConfigError(
            f"megatron-core {version}: expected at least 0.16.1 and below 0.20. "
            "pip install 'megatron-core>=0.16.1,<0.20'"
        )


# Megatron-Core emits these on every start about its own code; a user cannot act on them
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")

_check_version()
cpu.install()
share_event_loop()
