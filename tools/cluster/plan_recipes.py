"""The plans of the production recipes as a table: python tools/cluster/plan_recipes.py [--write].

A recipe's name says what it is for: …-8n8g-h100-fp8.yaml runs on eight nodes of eight H100.
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.planning.hardware import DEVICES, KNOWN, Hardware
from megatron_rl.planning.plan import Plan, make_plan, with_known_models

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/recipes/production"
HEAD = """# Production recipes

`slurm/README.md` says how they are started, `docs/scaling.md` how to choose another layout. GB of the fullest
device (of 85) and seconds of a step are those of the plan, prompts a quarter and responses half as long as they may be:
none has been run on these machines. `python tools/cluster/plan_recipes.py --write` writes this page, and
`python tools/plan.py --config FILE --hardware h100-80g --nodes N` says more about one of them.

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
    """All but the bases."""
    return sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("base-"))


def machine_of(recipe: Path) -> tuple[Hardware, int]:
    """What a recipe is for, and how many ranks that has.

    Raises:
        ValueError: its name does not say so.
    """
    found = re.search(r"-(\d+)n(\d+)g-([a-z]+\d+)-", recipe.name)
    if found is None or found[3].upper() not in DEVICES:
        raise ValueError(f"{recipe.name}: expected a name like grpo-qwen2.5-7b-1n8g-h100-fp8.yaml")
    return KNOWN[DEVICES[found[3].upper()]], int(found[1]) * int(found[2])


def plan_of(recipe: Path) -> Plan:
    """The plan on the machine that it is for."""
    hardware, world_size = machine_of(recipe)
    return make_plan(with_known_models(load_config(recipe), ROOT / "configs/model_shapes"), hardware, world_size)


def page() -> str:
    """The table as Markdown."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description="The plans of the production recipes.")
    parser.add_argument("--write", action="store_true", help=f"to {FOLDER.name}/README.md")
    if parser.parse_args().write:
        (FOLDER / "README.md").write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
