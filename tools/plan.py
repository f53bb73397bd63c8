"""Predict whether a run fits into memory and how long a step takes.

    python tools/plan.py --config FILE --hardware h100-80g --nodes 8 [--search] [key=value …]

Needs only the model's config.json: from model.path, or from configs/model_shapes if that folder does not exist yet.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.errors import MegatronRLError
from megatron_rl.planning.hardware import KNOWN_HARDWARE, read_hardware
from megatron_rl.planning.plan import describe, make_plan, with_known_models
from megatron_rl.planning.search import search, settings

SHAPES = Path(__file__).parents[1] / "configs/model_shapes"


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point; status 3 if the run does not fit."""
    parser = argparse.ArgumentParser(
        prog="tools/plan.py", description="Predict whether a run fits into memory and how long a step takes."
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument(
        "--hardware",
        default="h100-80g",
        help=f"{', '.join(KNOWN_HARDWARE)}, or a YAML file of tools/doctor.py --measure (h100-80g)",
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    parser.add_argument("--ranks", type=int, help="total number of ranks, instead of --nodes")
    parser.add_argument(
        "--mean-prompt", type=float, help="mean tokens of a prompt (a quarter of data.max_prompt_tokens)"
    )
    parser.add_argument(
        "--mean-response", type=float, help="mean tokens of a response (half of rollout.max_new_tokens)"
    )
    parser.add_argument(
        "--search", type=int, nargs="?", const=5, metavar="N", help="show the N fastest layouts that fit (5)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        config = with_known_models(load_config(args.config, args.overrides), SHAPES)
        hardware = read_hardware(args.hardware)
        world_size = args.ranks or args.nodes * hardware.ranks_per_node
        if args.search is not None:
            return show_search(config, world_size, hardware.name, args.search)
        plan = make_plan(config, hardware, world_size, mean_prompt=args.mean_prompt, mean_response=args.mean_response)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(plan))
    return 3 if plan.shortfalls else 0


def show_search(config: RunConfig, world_size: int, hardware: str, count: int) -> int:
    """Print the fastest layouts that fit; status 3 if none fits."""
    plans = search(config, read_hardware(hardware), world_size)
    if not plans:
        print(f"no layout of {world_size} ranks fits on {hardware}: use more ranks")
        return 3
    print(f"{len(plans)} layouts of {world_size} ranks fit; the fastest:")
    for plan in plans[:count]:
        fullest_gb = plan.memory.total(plan.memory.fullest) / 1e9
        print(f"{plan.step_s:8.1f} s, {fullest_gb:6.1f} GB: {settings(plan, config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
