"""Time a planned weight push against a per-parameter gather: python tools/bench/weight_sync.py.

Four ranks on this machine, connected by gloo, hold random shards of a real model's shapes under a training layout. In
turns they send them to engines according to the plan, and by broadcasting the parts of every tensor, one by one, to
every rank, which is the baseline. Either way the engine copies its part into its own memory, as weight loaders do.
Prints seconds, GB/s, the ratio in the same round, and the size of the buffers.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from contenders.report import Spread
from random_checkpoint import QWEN25_0_5B
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.engine_shards import engine_boxes
from megatron_rl.weight_sync.host_memory import expose_host_memory, no_peer_access
from megatron_rl.weight_sync.placement import parameters_by_rank
from megatron_rl.weight_sync.plan import plan_reshard
from megatron_rl.weight_sync.transfer import Traffic, Transfer
from megatron_rl.weights.export import Bucket, export_weights, plan_export
from megatron_rl.weights.layout import box_index, box_shape, hf_shapes

RANKS = 4
Tensors = Iterator[tuple[str, Tensor]]
LAYOUTS = {"tp2-pp2": {"tp": 2, "pp": 2}, "tp2-dp2": {"tp": 2, "dp": 2}, "pp4": {"pp": 4}, "dp4": {"dp": 4}}


@dataclass(frozen=True, kw_only=True)
class Round:
    """Figures of one planned push and one gather, on one rank."""

    planned_s: float
    gathered_s: float
    received_bytes: int
    least_bytes: int
    peak_bytes: int
    bucket_bytes: int


def work(rank: int, port: int, args: argparse.Namespace, folder: str) -> None:
    """Run one rank; writes its rounds to ``rank_N.json`` in the folder."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    spec = read_model_spec(Path(folder) / "model")
    sizes = LAYOUTS[args.layout]
    table, held = layout_table(spec, sizes.get("tp", 1)), parameters_by_rank(spec, **sizes)
    shapes, tp = hf_shapes(table), args.engine_tp
    names, place = held[rank]
    shards = {name: torch.randn(place.shape(table[name])).to(torch.bfloat16) for name in names}
    wanted = [engine_boxes(spec, shapes, tp_rank=one % tp, tp_size=tp) for one in range(RANKS)]
    plan = plan_reshard(held, table, wanted, [0] * RANKS, bucket_elements=args.bucket_mb * 2**19)
    gather = [single for bucket in plan_export(held, table) for single in one_by_one(bucket)]
    transfer, rounds = Transfer(plan, rank, peer_access=no_peer_access if args.messages else expose_host_memory), []
    engine = {name: torch.zeros(box_shape(box), dtype=torch.bfloat16) for name, box in wanted[rank].items()}

    def load(tensors: Tensors) -> None:
        for name, tensor in tensors:
            engine[name].copy_(tensor[box_index(wanted[rank][name])])

    for _ in range(args.rounds + 1):
        traffic = Traffic()
        planned = timed(load, transfer.stream(shards, traffic))
        gathered = timed(load, export_weights(gather, shards, dist.group.WORLD))
        bucket = max(
            sum(torch.Size([b - a for a, b in wanted[rank][name]]).numel() for name in one.names)
            for one in plan.buckets
        )
        rounds.append(
            Round(
                planned_s=planned,
                gathered_s=gathered,
                received_bytes=traffic.bytes_received,
                least_bytes=2 * plan.minimum(rank),
                peak_bytes=traffic.peak_buffer_bytes,
                bucket_bytes=2 * bucket,
            )
        )
    Path(folder, f"rank_{rank}.json").write_text(json.dumps([vars(one) for one in rounds[1:]]))
    dist.destroy_process_group()


def one_by_one(bucket: Bucket) -> list[Bucket]:
    """Split a bucket into buckets of one tensor each."""
    return [
        Bucket(
            {name: shape},
            {
                rank: [piece for piece in pieces if piece.slice.hf_name == name]
                for rank, pieces in bucket.pieces.items()
                if any(piece.slice.hf_name == name for piece in pieces)
            },
        )
        for name, shape in bucket.shapes.items()
    ]


def timed(load: Callable[[Tensors], None], tensors: Tensors) -> float:
    """Seconds until the slowest rank has loaded every tensor."""
    dist.barrier()
    start = time.perf_counter()
    load(tensors)
    dist.barrier()
    return time.perf_counter() - start


def report(rounds: list[list[Round]], model_bytes: int) -> str:
    """Summary over all ranks.

    Args:
        rounds: the rounds of each rank.
        model_bytes: size of the whole model.
    """
    planned = [max(rank[i].planned_s for rank in rounds) for i in range(len(rounds[0]))]
    gathered = [max(rank[i].gathered_s for rank in rounds) for i in range(len(rounds[0]))]
    ratio = Spread.of([slow / fast for slow, fast in zip(gathered, planned, strict=True)])
    received = max(rank[0].received_bytes for rank in rounds)
    peak, bucket = max(rank[0].peak_bytes for rank in rounds), max(rank[0].bucket_bytes for rank in rounds)
    least = max(rank[0].least_bytes for rank in rounds)
    speed = received / 1e9 / Spread.of(planned).median
    return "\n".join(
        [
            f"planned              {Spread.of(planned).text(2)} s, {speed:.2f} GB/s"
            f" into the rank that receives most ({received / 1e6:.0f} MB, at least {least / 1e6:.0f})",
            f"per-parameter gather {Spread.of(gathered).text(2)} s of a model of {model_bytes / 1e6:.0f} MB",
            f"ratio                {ratio.text(2)}",
            f"buffers at a time    {peak / 1e6:.0f} MB, {peak / bucket:.2f} of the largest bucket "
            f"({bucket / 1e6:.0f} MB)",
        ]
    )


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Time a planned weight push against a per-parameter gather.")
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2-pp2", help="layout of the trainer (default: tp2-pp2)")
    parser.add_argument("--engine-tp", type=int, default=1, help="tensor-parallel ranks of an engine (default: 1)")
    parser.add_argument("--bucket-mb", type=int, default=64, help="largest bucket, weight_sync.bucket_mb (default: 64)")
    parser.add_argument(
        "--messages", action="store_true", help="send everything as messages; ranks do not read each other's memory"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model" / "config.json").write_text(json.dumps(QWEN25_0_5B))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(work, args=(port, args, folder), nprocs=RANKS)
        rounds = [
            [Round(**one) for one in json.loads(Path(folder, f"rank_{rank}.json").read_text())] for rank in range(RANKS)
        ]
        shapes = hf_shapes(layout_table(read_model_spec(Path(folder) / "model"), 1))
    print(f"Qwen2.5-0.5B's shapes in bf16, {args.layout} -> engines of TP{args.engine_tp}, {RANKS} ranks, gloo")
    print(report(rounds, 2 * sum(torch.Size(shape).numel() for shape in shapes.values())))


if __name__ == "__main__":
    main()
