"""How fast this machine computes and its ranks talk: for slow nodes, and as a description that plans read."""

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

PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""
BUFFER_MB = {"cpu": 16, "cuda": 256}
REPEATS = 5
SLOW = 0.6
"""Share of the others' median below which a rank counts as slow."""
CLOCK_LIMIT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of one rank."""

    host: str
    tflops: float
    memory_gb_s: float
    clocks_s: tuple[float, ...]
    """Seconds since 1970 right after each of some barriers."""


def measure(parallel: ParallelContext) -> list[Speeds]:
    """Of every rank; collective."""
    clocks = []
    for _ in range(REPEATS):
        dist.barrier(group=parallel.host_group)
        clocks.append(time.time())
    size = PRODUCT[parallel.device.type]
    dtype = torch.bfloat16 if parallel.device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=parallel.device, dtype=dtype) for _ in range(2))
    product_s = _seconds(lambda: torch.mm(a, b), parallel)
    buffer = torch.zeros(BUFFER_MB[parallel.device.type] * 2**18, device=parallel.device)
    target = torch.empty_like(buffer)
    copy_s = _seconds(lambda: target.copy_(buffer), parallel)
    mine = Speeds(
        host=socket.gethostname(),
        tflops=2 * size**3 / product_s / 1e12,
        memory_gb_s=2 * buffer.nbytes / copy_s / 1e9,
        clocks_s=tuple(clocks),
    )
    return gather_objects(mine, parallel)


def all_reduce_gb_s(parallel: ParallelContext) -> float:
    """Bytes that each rank sends and receives in a ring, a second, over all ranks; 0 with one."""
    if parallel.world_size == 1:
        return 0.0
    buffer = torch.zeros(BUFFER_MB[parallel.device.type] * 2**18, device=parallel.device)
    seconds = _seconds(lambda: dist.all_reduce(buffer), parallel)
    return 2 * (parallel.world_size - 1) / parallel.world_size * buffer.nbytes / seconds / 1e9


def described(parallel: ParallelContext, speeds: list[Speeds], link_gb_s: float) -> Hardware:
    """This machine for plans: what was measured is taken as it is, without a share of a peak; collective."""
    machine = vars(this_machine(parallel))
    rate = min(one.tflops for one in speeds)
    link = link_gb_s or machine["link_gb_s"]
    measured = {
        "name": "measured",
        "tflops": rate,
        "fp8_tflops": rate,
        "memory_gb_s": min(one.memory_gb_s for one in speeds),
        "link_gb_s": link,
        "network_gb_s": link,
        "matmul_efficiency": 0.7,
        "bandwidth_efficiency": 1.0,
    }
    return Hardware(**{**machine, **measured})


def judge(speeds: list[Speeds], link_gb_s: float) -> list[tuple[str, Finding]]:
    """Slow ranks and wrong clocks, by host."""
    found: list[tuple[str, Finding]] = []
    usual, usual_memory = median(one.tflops for one in speeds), median(one.memory_gb_s for one in speeds)
    for rank, one in enumerate(speeds):
        if one.tflops < SLOW * usual or one.memory_gb_s < SLOW * usual_memory:
            told = f"rank {rank}: {one.tflops:.3g} TFLOP/s, {one.memory_gb_s:.0f} GB/s"
            told += f"; usual are {usual:.3g} and {usual_memory:.0f}"
            fix = "leave this node out (sbatch --exclude), or end what else runs there"
            found.append((one.host, warning("speed", told, fix)))
    # a busy rank may come late from a barrier: the round counts in which they were closest
    clocks = min(zip(*(one.clocks_s for one in speeds), strict=True), key=lambda round: max(round) - min(round))
    apart = max(clocks) - min(clocks)
    hosts = {one.host for one in speeds}
    if apart > CLOCK_LIMIT_S:
        late = max(range(len(speeds)), key=lambda rank: abs(clocks[rank] - median(clocks)))
        fix = "set the clocks of the nodes (chrony, ntp)"
        found.append((speeds[late].host, error("clock", f"{apart:.1f} s apart", fix)))
    told = f"{usual:.3g} TFLOP/s, {usual_memory:.0f} GB/s of memory"
    told += f", {link_gb_s:.2f} GB/s all-reduce over {len(speeds)} ranks of {len(hosts)} hosts" if link_gb_s else ""
    return [*found, *((host, ok("speed", told)) for host in sorted(hosts))]


def _seconds(work: Callable[[], object], parallel: ParallelContext) -> float:
    """The median of a few, after one that does not count."""
    taken = []
    for _ in range(REPEATS + 1):
        _wait(parallel)
        start = time.perf_counter()
        work()
        _wait(parallel)
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def _wait(parallel: ParallelContext) -> None:
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()
