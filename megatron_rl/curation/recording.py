"""Runs that tools start, and what they record."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.cli import run_logged
from megatron_rl.rollout.serialization import read_rollouts, step_file


def recorded(
    config: str, num_steps: int, run: Path, overrides: Sequence[str], *, num_ranks: int, data: Path | None = None
) -> list[dict[str, Any]]:
    """Graded responses of a model, sampled unless they are there.

    Args:
        config: file of the run that samples.
        num_steps: of that run.
        run: its folder.
        data: file of its prompts that was made for it.
    """
    digest = "" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()
    wanted = {"config": Path(config).read_text(), "num_steps": num_steps, "overrides": list(overrides), "data": digest}
    asked = run.with_suffix(".asked.json")
    if asked.exists() and json.loads(asked.read_text()) != wanted:
        sys.exit(f"{run} holds what was sampled otherwise (see {asked}). Choose another folder, or remove this one.")
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(wanted, indent=2))
    files = [step_file(run / "rollouts", step) for step in range(1, num_steps + 1)]
    if not files[-1].exists():
        train(
            config, run, num_ranks, *overrides, f"run.num_steps={num_steps}", "run.rollout_only=true",
            "metrics.keep_rollouts_every=1", "data.validation=null", "validation.every=0",
        )  # fmt: skip
    return [line for file in files if file.exists() for line in read_rollouts(file)]


def as_recorded(chat_template: str) -> str:
    """data.chat_template for prompts that a run with this one has recorded."""
    return "none" if chat_template == "none" else "rendered"


def train(config: str, run: Path, num_ranks: int, *overrides: str) -> None:
    """A run of its own."""
    command = [
        "torchrun", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "megatron_rl.train",
        "--config", config, *overrides, f"run.output_dir={run}",
    ]  # fmt: skip
    run_logged(command, run.with_suffix(".log"), cwd=Path.cwd())
