"""Plan a weight push without GPUs: python tools/cluster/plan_weight_sync.py --model DIR --tp 8 --pp 8 --engine-tp 8.

Prints how many bytes each rank receives and sends. DIR needs only config.json; no process group is needed.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.errors import MegatronRLError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size, engine_boxes
from megatron_rl.weight_sync.placement import parameters_by_rank
from megatron_rl.weight_sync.plan import ReshardPlan, plan_reshard
from megatron_rl.weights.layout import box_size, hf_shapes


def table(plan: ReshardPlan, nodes: list[int], bytes_each: int) -> str:
    """Gigabytes per rank (least, mean, most) that are held, read, received and sent, and the totals.

    Args:
        nodes: index of the node of each rank.
        bytes_each: bytes of a parameter.
    """
    ranks = range(len(nodes))
    held = [sum(box_size(p.slice.hf_box) for pieces in plan.pieces[r].values() for p in pieces) for r in ranks]
    rows = {
        "holds": held,
        "reads": [sum(box_size(box) for box in plan.target_boxes[rank].values()) for rank in ranks],
        "receives": [plan.num_received(rank) for rank in ranks],
        "receives at least": [plan.minimum(rank) for rank in ranks],
        "sends": [plan.num_sent(rank) for rank in ranks],
    }
    lines = [f"{'GB of a rank':22}{'least':>10}{'mean':>10}{'most':>10}"]
    for title, counts in rows.items():
        values = [count * bytes_each / 1e9 for count in counts]
        lines.append(f"{title:22}{min(values):>10.3f}{sum(values) / len(values):>10.3f}{max(values):>10.3f}")
    received = sum(rows["receives"]) * bytes_each / 1e9
    inter_node = plan.num_inter_node() * bytes_each / 1e9
    largest = max(
        sum(box_size(boxes[name]) for name in bucket.names if name in boxes)
        for bucket in plan.buckets
        for boxes in plan.target_boxes
    )
    per_node = inter_node / (nodes[-1] + 1)
    lines += [
        "",
        f"{received:.1f} GB in all, {inter_node:.1f} GB of it between nodes, {per_node:.2f} GB into each node",
        f"{len(plan.buckets)} buckets, at most {largest * bytes_each / 1e9:.3f} GB each; "
        f"received / least possible: {sum(rows['receives']) / max(1, sum(rows['receives at least'])):.3f}",
    ]
    return "\n".join(lines)


def main() -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Print the plan of a weight push.")
    parser.add_argument("--model", required=True, type=Path, help="folder with config.json")
    for name, meaning in (
        ("tp", "tensor-parallel ranks of the trainer"),
        ("pp", "pipeline stages of the trainer"),
        ("dp", "data-parallel replicas of the trainer"),
        ("ep", "expert-parallel ranks of the trainer, within the replicas"),
        ("engine-tp", "tensor-parallel ranks of an engine"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, help=f"{meaning} (default: 1)")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="ranks of a node (default: 8)")
    parser.add_argument(
        "--bucket-mb", type=int, default=512, help="largest bucket, weight_sync.bucket_mb (default: 512)"
    )
    parser.add_argument("--bytes-per-parameter", type=int, default=2, help="2 for bf16 (default), 4 for fp32")
    args = parser.parse_args()
    try:
        spec = read_model_spec(args.model)
        check_engine_size(spec, args.engine_tp)
        held = parameters_by_rank(spec, tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep)
        layouts = layout_table(spec, args.tp)
        shapes = hf_shapes(layouts)
        size = args.engine_tp
        boxes = [engine_boxes(spec, shapes, tp_rank=rank, tp_size=size) for rank in range(size)]
        nodes = [rank // args.ranks_per_node for rank in range(len(held))]
        bucket_elements = args.bucket_mb * 2**20 // args.bytes_per_parameter
        wanted = [boxes[rank % size] for rank in range(len(held))]
        plan = plan_reshard(held, layouts, wanted, nodes, bucket_elements=bucket_elements)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    training = f"TP{args.tp} x PP{args.pp} x DP{args.dp}"
    print(f"{spec.family}, {training} on {nodes[-1] + 1} nodes -> engines of TP{size}")
    print(table(plan, nodes, args.bytes_per_parameter))
    return 0


if __name__ == "__main__":
    sys.exit(main())
