"""Plan a run for the machine that it has been started on."""

import socket
from dataclasses import replace
from typing import Literal

import torch

from megatron_rl.config import RunConfig
from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.planning.hardware import DEVICES, KNOWN_HARDWARE, Hardware
from megatron_rl.planning.plan import check_fits, make_plan, summary
from megatron_rl.types import ParallelContext

# CPU hosts: the speeds are placeholders, as no times are shown; the fragmentation has been measured
HOST = Hardware(
    name="this host", ranks_per_node=1, device_gb=0.0, host_gb=0.0, tflops=0.1, fp8_tflops=0.1, memory_gb_s=10.0,
    link_gb_s=1.0, network_gb_s=1.0, host_link_gb_s=10.0, base_gb=0.0, process_gb=0.0,
    engine_cache_gb=1.1, fragmentation=0.3,
)  # fmt: skip


def plan_on_this_machine(config: RunConfig, parallel: ParallelContext) -> str:
    """Return a summary of the memory that the run needs and has, with a warning for each shortfall; collective.

    Raises:
        ConfigError: on every rank, if the run does not fit and memory.on_overcommit=error.
    """
    hardware = this_machine(parallel)
    with raise_together(parallel):
        plan = make_plan(config, hardware, parallel.world_size)
        if config.memory.on_overcommit == "error":
            check_fits(plan)
    return "\n".join([summary(plan), *(f"warning: this run does not fit: {reason}" for reason in plan.shortfalls)])


def this_machine(parallel: ParallelContext) -> Hardware:
    """Return a description of this machine with the least memory of any rank or host; collective."""
    hosts = gather_objects(socket.gethostname(), parallel)
    ranks = max(map(hosts.count, hosts))
    host_gb = min(gather_objects(host_memory_gb("MemAvailable"), parallel))
    if parallel.device.type != "cuda":
        return replace(HOST, ranks_per_node=ranks, device_gb=host_gb / ranks, host_gb=host_gb)
    device = torch.cuda.get_device_properties(parallel.device)
    device_gb = min(gather_objects(device.total_memory / 1e9, parallel))
    known = next((name for part, name in DEVICES.items() if part in device.name), "a100-80g")
    return replace(KNOWN_HARDWARE[known], name=device.name, ranks_per_node=ranks, device_gb=device_gb, host_gb=host_gb)


def host_memory_gb(name: Literal["MemAvailable", "MemTotal"]) -> float:
    """Return the available or the total memory of this host, in units of 1e9 bytes."""
    with open("/proc/meminfo") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(f"{name}:")) * 1024 / 1e9
