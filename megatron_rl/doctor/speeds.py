"""Measure compute and communication speed, to find slow nodes and to describe the hardware for plans."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.doctor.finding import Finding, error, ok, warning
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.this_machine import this_machine
from megatron_rl.types import ParallelContext

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Device type -> rows and columns of the matrices that are multiplied."""
BUFFER_MB = {"cpu": 16, "cuda": 256}
REPEATS = 5
SLOW_SHARE = 0.6
"""Share of the median speed below which a rank counts as slow."""
CLOCK_LIMIT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured speeds of one rank."""

    host: str
    tflops: float
    memory_gb_s: float
    clocks_s: tuple[float, ...]
    """Clock in seconds since 1970, read right after each of REPEATS barriers."""


def measure(parallel: ParallelContext) -> list[Speeds]:
    """Measure the speeds of every rank; collective."""
    clocks = []
    for _ in range(REPEATS):
        dist.barrier(group=parallel.host_group)
        clocks.append(time.time())
    size = MATRIX_SIZE[parallel.device.type]
    dtype = torch.bfloat16 if parallel.device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=parallel.device, dtype=dtype) for _ in range(2))
    product_s = _seconds(lambda: torch.mm(a, b), parallel)
    buffer = torch.zeros(BUFFER_MB[parallel.device.type] * 2**18, device=parallel.device)
    target = torch.empty_like(buffer)
    copy_s = _seconds(lambda: target.copy_(buffer), parallel)
    speeds = Speeds(
        host=socket.gethostname(),
        tflops=2 * size**3 / product_s / 1e12,
        memory_gb_s=2 * buffer.nbytes / copy_s / 1e9,
        clocks_s=tuple(clocks),
    )
    return gather_objects(speeds, parallel)


def all_reduce_gb_s(parallel: ParallelContext) -> float:
    """Return the ring bandwidth of an all-reduce over all ranks, in units of 1e9 bytes per second; collective.

    Counts the bytes that each rank sends (and receives) in a ring; 0 with one rank.
    """
    if parallel.world_size == 1:
        return 0.0
    buffer = torch.zeros(BUFFER_MB[parallel.device.type] * 2**18, device=parallel.device)
    seconds = _seconds(lambda: dist.all_reduce(buffer), parallel)
    return 2 * (parallel.world_size - 1) / parallel.world_size * buffer.nbytes / seconds / 1e9


def measured_hardware(parallel: ParallelContext, speeds: list[Speeds], link_gb_s: float) -> Hardware:
    """Return a hardware description of this machine from measured speeds; collective.

    Measured bandwidth is used unchanged, with an efficiency of 1; matrix products with one of 0.7.
    """
    machine = vars(this_machine(parallel))
    tflops = min(rank_speeds.tflops for rank_speeds in speeds)
    all_reduce_rate = link_gb_s or machine["link_gb_s"]
    measured = {
        "name": "measured",
        "tflops": tflops,
        "fp8_tflops": tflops,
        "memory_gb_s": min(rank_speeds.memory_gb_s for rank_speeds in speeds),
        "link_gb_s": all_reduce_rate,
        "network_gb_s": all_reduce_rate,
        "matmul_efficiency": 0.7,
        "bandwidth_efficiency": 1.0,
    }
    return Hardware(**{**machine, **measured})


def check_speeds(speeds: list[Speeds], link_gb_s: float) -> list[tuple[str, Finding]]:
    """Return findings about slow ranks and clocks that differ, with their hosts."""
    findings: list[tuple[str, Finding]] = []
    median_tflops = median(rank_speeds.tflops for rank_speeds in speeds)
    median_memory = median(rank_speeds.memory_gb_s for rank_speeds in speeds)
    for rank, rank_speeds in enumerate(speeds):
        if rank_speeds.tflops < SLOW_SHARE * median_tflops or rank_speeds.memory_gb_s < SLOW_SHARE * median_memory:
            detail = f"rank {rank}: {rank_speeds.tflops:.3g} TFLOP/s, {rank_speeds.memory_gb_s:.0f} GB/s"
            detail += f"; median {median_tflops:.3g} and {median_memory:.0f}"
            fix = "exclude this node (sbatch --exclude), or end other processes on it"
            findings.append((rank_speeds.host, warning("speed", detail, fix)))
    # a busy rank may leave a barrier late, so the barrier with the smallest spread counts
    rounds = zip(*(rank_speeds.clocks_s for rank_speeds in speeds), strict=True)
    clocks = min(rounds, key=lambda round: max(round) - min(round))
    spread = max(clocks) - min(clocks)
    hosts = {rank_speeds.host for rank_speeds in speeds}
    if spread > CLOCK_LIMIT_S:
        outlier = max(range(len(speeds)), key=lambda rank: abs(clocks[rank] - median(clocks)))
        fix = "synchronise the clocks of the nodes (chrony, ntp)"
        findings.append((speeds[outlier].host, error("clock", f"{spread:.1f} s apart", fix)))
    detail = f"{median_tflops:.3g} TFLOP/s, {median_memory:.0f} GB/s of memory"
    detail += f", {link_gb_s:.2f} GB/s all-reduce over {len(speeds)} ranks of {len(hosts)} hosts" if link_gb_s else ""
    return [*findings, *((host, ok("speed", detail)) for host in sorted(hosts))]


def _seconds(work: Callable[[], object], parallel: ParallelContext) -> float:
    """Return the median seconds of REPEATS calls, after one warm-up call."""
    seconds = []
    for _ in range(REPEATS + 1):
        _synchronize(parallel)
        start = time.perf_counter()
        work()
        _synchronize(parallel)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _synchronize(parallel: ParallelContext) -> None:
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()
