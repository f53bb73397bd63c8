"""Share one event loop among all gloo groups of a process.

Torch gives every group its own network device, whose thread wakes a hundred times a second. Megatron creates about
twenty groups, so idle ranks alone keep a small machine busy; gloo itself allows groups to share a device. Checked with
torch 2.13; tests/distributed/test_event_loop.py fails once this is no longer needed.
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
    """This process's gloo devices, one for each interface in gloo's environment variable GLOO_SOCKET_IFNAME."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not interfaces:
        return [_Gloo.create_default_device()]
    return [_Gloo.create_device(interface=name) for name in interfaces.split(",")]


class SharingGroup(_Gloo):
    """A gloo process group that uses the devices shared by the process."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = _Gloo._Options()
        options._devices = _devices()
        options._timeout = timeout
        options._threads = 2 * len(options._devices)
        super().__init__(store, rank, size, options)


def share_event_loop() -> None:
    """Make groups created from now on share the event loop; with CUDA few groups use gloo and nothing changes."""
    if not torch.cuda.is_available():
        distributed_c10d.ProcessGroupGloo = SharingGroup  # type: ignore[misc]
