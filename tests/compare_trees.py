"""Compare the metrics of two checkouts, run by run and bit by bit.

    python tests/compare_trees.py BEFORE AFTER --output DIR

A refactoring changes no number. The same configurations run in both trees on this machine: both stages of the
quickstart, PPO, LoRA, GSPO, multi-turn rollouts, and TP2 x PP2. All metrics of all steps must be equal, except times
and memory. Metrics that CHANGELOG.md lists as renamed are compared under their new name. The exit status is 1 if a
value differs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# metrics that depend on the clock or on the history of the process
TIMED = (
    "memory/",
    *("timing_s", "perf/time", "perf/throughput", "perf/tflops", "perf/mfu"),
    *("weight_sync/seconds", "weight_sync/gb_per_s"),
)


CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to compare; ``{run}`` in an override stands for the folder of the tree's runs."""

    config: str
    """Name of a file in configs/quickstart or configs/algorithms."""
    num_ranks: int
    overrides: tuple[str, ...]


SFT = "model.path={run}/sft/checkpoints/step_001800/hf"
STEPS = ("rollout.schedule=static", "run.num_steps=12")
CASES = {
    "sft": Case(config="sft", num_ranks=2, overrides=("model.path={run}/init",)),
    "grpo": Case(config="grpo", num_ranks=2, overrides=(SFT, "rollout.schedule=static")),
    "ppo": Case(config="ppo", num_ranks=2, overrides=(SFT, "rollout.schedule=static", "run.num_steps=16")),
    "lora": Case(config="lora", num_ranks=2, overrides=(SFT, *STEPS)),
    "gspo": Case(config="gspo", num_ranks=2, overrides=(SFT, *STEPS)),
    "conversation": Case(config="conversation", num_ranks=2, overrides=(SFT, *STEPS)),
    "tp2_pp2": Case(
        config="grpo",
        num_ranks=4,
        overrides=(
            SFT,
            *STEPS,
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=2",
            "parallel.sequence_parallel=true",
        ),
    ),
}


def find_config(tree: Path, name: str) -> Path:
    """Return the path of a config in a tree; both trees need not have it in the same folder."""
    (path,) = (
        path for folder in ("quickstart", "algorithms") for path in (tree / "configs" / folder).glob(f"{name}.yaml")
    )
    return path


def run_case(tree: Path, case: Case, run: Path, name: str) -> None:
    """Run a case in a tree and write its output to a log beside the run folder."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.num_ranks}"),
        *("-m", "megatron_rl.train", "--config", str(find_config(tree, case.config))),
        *(override.format(run=run) for override in case.overrides),
        *(f"run.output_dir={run / name}", "metrics.wandb=disabled", "metrics.console=plain"),
    ]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with (run / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl under the names of AFTER, without metrics that depend on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    renamed = renamed_metrics()
    return [
        {new_name(name, renamed): value for name, value in row.items() if not name.startswith(TIMED)} for row in rows
    ]


def renamed_metrics() -> dict[str, str]:
    """Return the table of renamed metrics in the changelog; a name that ends in ``*`` is a prefix."""
    _, table = CHANGELOG.read_text().split("| metric before | now |\n|---|---|\n")
    rows = [line.split("`") for line in table.split("\n\n")[0].splitlines()]
    return {row[1]: row[3] for row in rows}


def new_name(name: str, renamed: Mapping[str, str]) -> str:
    """Return the name in AFTER of a metric of either tree."""
    for old, new in renamed.items():
        if old.endswith("*") and name.startswith(old[:-1]):
            return new[:-1] + name.removeprefix(old[:-1])
    return renamed.get(name, name)


def differences(before: list[dict[str, float]], after: list[dict[str, float]]) -> list[str]:
    """Return the first five differences between two runs, one line each."""
    lines = [] if len(before) == len(after) else [f"{len(before)} rows before, {len(after)} after"]
    for old, new in zip(before, after, strict=False):
        for name in sorted(old.keys() | new.keys()):
            if not same(old, new, name):
                lines.append(f"step {old['step']:g}: {name} {old.get(name)} before, {new.get(name)} after")
    return lines[:5]


def same(old: Mapping[str, float], new: Mapping[str, float], name: str) -> bool:
    """Whether a metric has the same bits in both rows; JSON keeps every bit of a float, and NaN equals NaN."""
    return (
        name in old and name in new and (old[name] == new[name] or (old[name] != old[name] and new[name] != new[name]))
    )


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; finished ones are kept")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    failed = False
    folders = {}
    for name, tree in (("before", arguments.before.resolve()), ("after", arguments.after.resolve())):
        folders[name] = folder = arguments.output.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "init").exists():
            command = [sys.executable, "tools/make_toy_model.py", "--output", str(folder / "init")]
            subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=True)
        for case in arguments.cases:
            if not (folder / case / "report.html").exists():
                run_case(tree, CASES[case], folder, case)
    for case in arguments.cases:
        before, after = (read_metrics(folders[name] / case / "metrics.jsonl") for name in ("before", "after"))
        different = differences(before, after)
        failed |= bool(different)
        values = sum(map(len, before))
        print(f"{case:<14} {len(before):>5} rows, {values:>7} values: " + ("equal" if not different else "DIFFERENT"))
        for line in different:
            print(f"    {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
