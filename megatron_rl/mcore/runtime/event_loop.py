"""One event loop for all gloo groups of a process.

Torch gives every group a network device of its own, whose thread wakes a hundred times a second.
Megatron makes some twenty groups, so that idle ranks alone keep a small machine busy; gloo itself lets
groups share a device. Checked with torch 2.13; tests/distributed/test_event_loop.py tells once it is not needed.
"""

import functools
import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

_Gloo: Any = distributed_c10d.ProcessGroupGloo


@functools.cache
def _devices() -> list[Any]:
    """This process's devices, on the interfaces that gloo's own environment variable names."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not interfaces:
        return [_Gloo.create_default_device()]
    return [_Gloo.create_device(interface=name) for name in interfaces.split(",")]


class SharingGroup(_Gloo):
    """A gloo group on the process's devices."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = _Gloo._Options()
        options._devices = _devices()
        options._timeout = timeout
        options._threads = 2 * len(options._devices)
        super().__init__(store, rank, size, options)


def share_event_loop() -> None:
    """Let groups that are made from here on share it; with CUDA few groups are gloo's and nothing changes."""
    if not torch.cuda.is_available():
        distributed_c10d.ProcessGroupGloo = SharingGroup  # type: ignore[misc]
