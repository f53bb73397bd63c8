"""Starting runs from tools, and reading the rollouts that they record."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.cli import run_logged
from megatron_rl.rollout.serialization import read_rollouts, step_file


def record_rollouts(
    config: str, num_steps: int, run: Path, overrides: Sequence[str], *, num_ranks: int, data: Path | None = None
) -> list[dict[str, Any]]:
    """Return the graded responses of a rollout-only run; start the run unless its rollouts exist.

    Args:
        config: configuration file of the run.
        num_steps: steps of the run.
        run: output folder of the run.
        overrides: key=value overrides of the configuration.
        num_ranks: processes of the run.
        data: generated file of prompts, whose hash must match that of an earlier start; None without one.
    """
    digest = "" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()
    settings = {
        "config": Path(config).read_text(),
        "num_steps": num_steps,
        "overrides": list(overrides),
        "data": digest,
    }
    settings_file = run.with_suffix(".asked.json")
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        sys.exit(
            f"{run} holds rollouts that were sampled with other settings (see {settings_file}). Choose another folder, "
            "or remove this one."
        )
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(settings, indent=2))
    files = [step_file(run / "rollouts", step) for step in range(1, num_steps + 1)]
    if not files[-1].exists():
        run_training(
            config, run, num_ranks, *overrides, f"run.num_steps={num_steps}", "run.rollout_only=true",
            "metrics.keep_rollouts_every=1", "data.validation=null", "validation.every=0",
        )  # fmt: skip
    return [line for file in files if file.exists() for line in read_rollouts(file)]


def template_for_recorded(chat_template: str) -> str:
    """Return the data.chat_template for prompts that a run with ``chat_template`` has recorded."""
    return "none" if chat_template == "none" else "rendered"


def run_training(config: str, run: Path, num_ranks: int, *overrides: str) -> None:
    """Run a training under torchrun, with its output in RUN.log."""
    command = [
        "torchrun", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "megatron_rl.train",
        "--config", config, *overrides, f"run.output_dir={run}",
    ]  # fmt: skip
    run_logged(command, run.with_suffix(".log"), cwd=Path.cwd())
