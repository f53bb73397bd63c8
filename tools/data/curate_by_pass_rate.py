"""Prompts with their measured pass rate: python tools/data/curate_by_pass_rate.py RUN/rollouts OUTPUT.jsonl.

Reads the rollouts that a run recorded (metrics.keep_rollouts_every=1) and writes one line for each prompt, with the
columns prompt, answer, demonstration, pass_rate, num_samples and those that the prompt had. The prompts are as the
model saw them, so data.chat_template=rendered fits them (none, where the run had that).
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_rl.errors import MegatronRLError
from megatron_rl.rollout.serialization import read_folder, write_lines


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prompts of recorded rollouts with their measured pass rate.")
    parser.add_argument("rollouts", type=Path, help="folder rollouts/ of a run")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--min-reward", type=float, default=1.0, help="total reward of a right response (1.0)")
    asked = parser.parse_args(arguments)
    try:
        rows = rated(read_folder(asked.rollouts), asked.min_reward)
        write_lines(asked.output, rows)
    except MegatronRLError as error:
        sys.exit(str(error))
    print(json.dumps({"prompts": len(rows), "mean_pass_rate": sum(row["pass_rate"] for row in rows) / len(rows)}))
    return 0


def rated(lines: list[dict[str, Any]], min_reward: float) -> list[dict[str, Any]]:
    """One row for each prompt; samples whose reward failed do not count."""
    samples = defaultdict(list)
    for line in lines:
        if line["status"] == "ok":
            samples[line["prompt_id"]].append(line)
    return [
        {
            **first["metadata"],
            **{name: first[name] for name in ("prompt", "answer", "demonstration")},
            "pass_rate": sum(line["reward"] >= min_reward for line in found) / len(found),
            "num_samples": len(found),
        }
        for found in samples.values()
        for first in found[:1]
    ]


if __name__ == "__main__":
    sys.exit(main())
