"""Draw docs/images/quickstart.svg from the runs of `make quickstart-seeds`.

python tools/quickstart/learning_curve.py
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.metrics.sinks import read_rows
from megatron_rl.reporting.plots import band_plot
from megatron_rl.reporting.study import curve_of

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs/quickstart"
PICTURE = ROOT / "docs/images/quickstart.svg"
METRIC = "val/exact_match"


def curves(run: str) -> list[Mapping[int, float]]:
    """Held-out accuracy in percent by step, of every seed that has finished a run.

    Args:
        run: folder of the run below that of its seed, such as ``grpo``.
    """
    files = sorted(RUNS.glob(f"seed_*/{run}/metrics.jsonl"))
    return [{step: 100 * value for step, value in curve_of(read_rows(path), METRIC).items()} for path in files]


def main() -> None:
    """Command-line entry point."""
    grpo, control = curves("grpo"), curves("coin_flip")
    if not grpo or not control:
        sys.exit(f"{RUNS} has no finished runs. Run `make quickstart-seeds` first.")
    title = f"Held-out accuracy in % (mean and range of {len(grpo)} seeds)"
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    picture = band_plot(title, {"GRPO, rewarded for right answers": grpo, "control, coin-flip rewards": control})
    head, rest = picture.split(">", 1)
    PICTURE.write_text(f'{head}><rect width="100%" height="100%" fill="white"/>{rest}')  # readable on dark pages too
    print(PICTURE)


if __name__ == "__main__":
    main()
