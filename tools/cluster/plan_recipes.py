"""Print the plans of the production recipes as a table: python tools/cluster/plan_recipes.py [--write].

A recipe's name contains the machine that it is written for: …-8n8g-h100-fp8.yaml runs on eight nodes of eight H100.
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.planning.hardware import DEVICES, KNOWN_HARDWARE, Hardware
from megatron_rl.planning.plan import Plan, make_plan, with_known_models

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/recipes/production"
HEAD = """# Production recipes

`slurm/README.md` describes how to start them, `docs/scaling.md` how to choose another layout. The table shows what the
plan predicts for prompts of a quarter and responses of half of the allowed length: GB of the fullest device (of 85) in
each phase, and seconds per step. None of the recipes has been run on these machines.
`python tools/cluster/plan_recipes.py --write` writes this page, and
`python tools/plan.py --config FILE --hardware h100-80g --nodes N` prints the whole plan of one recipe.

"""
COLUMNS = (
    "recipe",
    "layout",
    "engine",
    "push",
    "generation",
    "log-probabilities",
    "update",
    "critic",
    "s/step",
    "tokens/s/rank",
)


def recipes() -> list[Path]:
    """All recipes, without the base files."""
    return sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("base-"))


def machine_of(recipe: Path) -> tuple[Hardware, int]:
    """Hardware and number of ranks that a recipe is written for, from its name.

    Raises:
        ValueError: the name does not contain them.
    """
    match = re.search(r"-(\d+)n(\d+)g-([a-z]+\d+)-", recipe.name)
    if match is None or match[3].upper() not in DEVICES:
        raise ValueError(f"{recipe.name}: expected a name like grpo-qwen2.5-7b-1n8g-h100-fp8.yaml")
    return KNOWN_HARDWARE[DEVICES[match[3].upper()]], int(match[1]) * int(match[2])


def plan_of(recipe: Path) -> Plan:
    """Plan of a recipe on the machine that it is written for."""
    hardware, world_size = machine_of(recipe)
    return make_plan(with_known_models(load_config(recipe), ROOT / "configs/model_shapes"), hardware, world_size)


def page() -> str:
    """The page, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for recipe in recipes():
        plan = plan_of(recipe)
        memory = plan.memory
        phases = [
            f"{memory.total(phase) / 1e9:.1f}" if phase in memory.phases else ""
            for phase in ("push", "generation", "log-probabilities", "update", "critic")
        ]
        engine = f"{plan.config.rollout.engine} TP{plan.config.rollout.tensor_parallel_size}"
        cells = (
            f"[{recipe.stem}]({recipe.name})",
            plan.layout,
            engine,
            *phases,
            f"{plan.step_s:.0f}",
            f"{plan.tokens_per_s:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Print the plans of the production recipes.")
    parser.add_argument("--write", action="store_true", help=f"write {FOLDER.name}/README.md instead")
    if parser.parse_args().write:
        (FOLDER / "README.md").write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
