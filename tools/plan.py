"""Whether a run fits and how long a step takes.

    python tools/plan.py --config FILE --hardware h100-80g --nodes 8 [--search] [key=value …]

Needs the model's config.json alone: from model.path, or from configs/model_shapes where that does not exist yet.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.errors import MegatronRLError
from megatron_rl.planning.hardware import KNOWN, read_hardware
from megatron_rl.planning.plan import describe, make_plan, with_known_models
from megatron_rl.planning.search import search, settings

SHAPES = Path(__file__).parents[1] / "configs/model_shapes"


def main(arguments: list[str] | None = None) -> int:
    """The command line; status 3 where the run does not fit."""
    parser = argparse.ArgumentParser(prog="tools/plan.py", description="Whether a run fits and how long a step takes.")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--hardware", default="h100-80g", help=f"{', '.join(KNOWN)}, or a YAML file (h100-80g)")
    parser.add_argument("--nodes", type=int, default=1, help="(1)")
    parser.add_argument("--ranks", type=int, help="in all, instead of whole nodes")
    parser.add_argument("--mean-prompt", type=float, help="tokens (a quarter of data.max_prompt_tokens)")
    parser.add_argument("--mean-response", type=float, help="tokens (half of rollout.max_new_tokens)")
    parser.add_argument(
        "--search", type=int, nargs="?", const=5, metavar="N", help="show the N fastest layouts that fit (5)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    try:
        config = with_known_models(load_config(asked.config, asked.overrides), SHAPES)
        hardware = read_hardware(asked.hardware)
        world_size = asked.ranks or asked.nodes * hardware.ranks_per_node
        if asked.search is not None:
            return show_search(config, world_size, hardware.name, asked.search)
        plan = make_plan(config, hardware, world_size, mean_prompt=asked.mean_prompt, mean_response=asked.mean_response)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(plan))
    return 3 if plan.lacks else 0


def show_search(config: RunConfig, world_size: int, hardware: str, count: int) -> int:
    """Print the best layouts; status 3 where none fits."""
    found = search(config, read_hardware(hardware), world_size)
    if not found:
        print(f"no layout of {world_size} ranks fits on {hardware}: start more ranks")
        return 3
    print(f"{len(found)} layouts of {world_size} ranks fit; the fastest:")
    for plan in found[:count]:
        room = plan.memory.total(plan.memory.fullest) / 1e9
        print(f"{plan.step_s:8.1f} s, {room:6.1f} GB: {settings(plan, config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
