"""Run a study: several configurations over several seeds.

    python tools/analysis/ablate.py configs/ablations/quickstart.yaml

Prints the mean of the study's metric with the standard deviation between seeds, and writes a page with the curves of
the selected runs. Finished runs are not repeated; interrupted runs are resumed.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.cli import run_logged
from megatron_rl.config import load_config, validate
from megatron_rl.config.study import Study, load_study
from megatron_rl.errors import MegatronRLError
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.reporting.study import Curve, curve_of, curve_table, markdown, render_study
from megatron_rl.run_folder import RunFolder, write_atomically


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Run several configurations over several seeds and compare them.")
    parser.add_argument("study", type=Path, help="YAML file of the study, as in configs/ablations")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the study)")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="names of the runs to make (default: all)")
    parser.add_argument(
        "--folder", type=Path, help="folder of the runs (default: runs/ablations/NAME OF THE STUDY FILE)"
    )
    args = parser.parse_args()
    try:
        study = load_study(args.study)
        names = args.only or list(study.runs)
        unknown = [name for name in names if name not in study.runs]
        if unknown:
            sys.exit(f"{args.study} has no run {unknown[0]!r}. It has: {', '.join(study.runs)}.")
        folder = args.folder or Path("runs/ablations") / args.study.stem
        seeds = args.seeds or study.seeds
        for name in names:  # all of them, before the first one starts
            validate(load_config(study.runs[name].config, study.overrides_of(name, seeds[0])), study.num_ranks)
        curves = {name: [run_or_read(study, name, seed, folder) for seed in seeds] for name in names}
    except MegatronRLError as error:
        sys.exit(str(error))
    write_atomically(folder / "report.html", render_study(args.study.stem, study.metric, curves))
    print(markdown(curve_table("run", curves)))
    print(f"\nreport: {folder / 'report.html'}")


def run_or_read(study: Study, name: str, seed: int, folder: Path) -> Curve:
    """Curve of one run; trains it unless it has finished."""
    run = folder / study.folder_of(name) / f"seed_{seed}"
    command = [
        "torchrun", "--standalone", "--nproc-per-node", str(study.num_ranks), "-m", "megatron_rl.train",
        "--config", study.runs[name].config, *study.overrides_of(name, seed), f"run.output_dir={run}",
    ]  # fmt: skip
    run_logged(command, run.with_suffix(".log"), cwd=Path.cwd())
    curve = curve_of(read_rows(RunFolder(run).metrics), study.metric)
    last = max(curve)
    print(f"{name}, seed {seed}: {study.metric} {curve[last]:.4g} after {last} steps", file=sys.stderr, flush=True)
    return curve


if __name__ == "__main__":
    main()
