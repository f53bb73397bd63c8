"""Run the quickstart and its coin-flip control over several seeds and print the table of the docs.

python tools/bench/quickstart.py --seeds 0 1 2       # the whole table
python tools/bench/quickstart.py --seeds 0 --check   # also fail unless GRPO learns and the control does not
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_rl.cli import run_logged
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.reporting.study import curve_of

ROOT = Path(__file__).resolve().parents[2]

METRIC = "val/exact_match"
LEARNT, NOT_LEARNT = 0.85, 0.10
"""Held-out accuracy that GRPO must exceed; gain in accuracy that the control must stay below."""


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Run the quickstart and its control over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with status 1 unless GRPO learns and the control does not, for every seed",
    )
    args = parser.parse_args()
    print("| seed | after fine-tuning | after GRPO | after coin-flip rewards | minutes, quickstart alone |")
    print("|---|---|---|---|---|")
    failed = False
    for seed in args.seeds:
        folder = ROOT / "runs" / "quickstart" / f"seed_{seed}"
        start, ran_before = time.monotonic(), (folder / "grpo").exists()
        run_logged(
            [str(ROOT / "tools/quickstart/quickstart.sh"), str(seed)], folder.with_name(f"seed_{seed}.log"), cwd=ROOT
        )
        minutes = "ran before" if ran_before else f"{(time.monotonic() - start) / 60:.1f}"
        run_logged(_control(folder, seed), folder.with_name(f"seed_{seed}_coin_flip.log"), cwd=ROOT)
        before, after = accuracy(folder / "grpo")
        _, control = accuracy(folder / "coin_flip")
        print(f"| {seed} | {before:.1%} | {after:.1%} | {control:.1%} | {minutes} |", flush=True)
        failed |= after <= LEARNT or control - before >= NOT_LEARNT
    if args.check and failed:
        sys.exit(f"expected above {LEARNT:.0%} after GRPO and a gain below {NOT_LEARNT:.0%} after coin-flip rewards")


def accuracy(run: Path) -> tuple[float, float]:
    """First and last held-out accuracy of a run."""
    curve = curve_of(read_rows(run / "metrics.jsonl"), METRIC)
    return curve[min(curve)], curve[max(curve)]


def _control(folder: Path, seed: int) -> list[str]:
    return [
        "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "megatron_rl.train",
        "--config", str(ROOT / "configs/quickstart/grpo_coin_flip.yaml"),
        f"model.path={folder}/sft/checkpoints/step_001800/hf", f"run.output_dir={folder}/coin_flip", f"run.seed={seed}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
