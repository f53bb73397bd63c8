"""Write prompts with their measured pass rate: python tools/data/curate_by_pass_rate.py RUN/rollouts OUTPUT.jsonl.

Reads the rollouts that a run recorded (metrics.keep_rollouts_every=1) and writes one line per prompt, with the columns
prompt, answer, demonstration, pass_rate, num_samples and the prompt's own metadata. Prompts are written with the chat
template applied; use data.chat_template=rendered to train on them (none if the run used none).
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_rl.errors import MegatronRLError
from megatron_rl.rollout.serialization import read_folder, write_lines


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Write prompts of recorded rollouts with their measured pass rate.")
    parser.add_argument("rollouts", type=Path, help="folder rollouts/ of a run")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--min-reward", type=float, default=1.0, help="least total reward of a correct response (1.0)")
    args = parser.parse_args(argv)
    try:
        rows = with_pass_rate(read_folder(args.rollouts), args.min_reward)
        write_lines(args.output, rows)
    except MegatronRLError as error:
        sys.exit(str(error))
    print(json.dumps({"prompts": len(rows), "mean_pass_rate": sum(row["pass_rate"] for row in rows) / len(rows)}))
    return 0


def with_pass_rate(lines: list[dict[str, Any]], min_reward: float) -> list[dict[str, Any]]:
    """One row per prompt with its pass rate; samples whose reward failed do not count."""
    samples = defaultdict(list)
    for line in lines:
        if line["status"] == "ok":
            samples[line["prompt_id"]].append(line)
    return [
        {
            **first["metadata"],
            **{name: first[name] for name in ("prompt", "answer", "demonstration")},
            "pass_rate": sum(line["reward"] >= min_reward for line in group) / len(group),
            "num_samples": len(group),
        }
        for group in samples.values()
        for first in group[:1]
    ]


if __name__ == "__main__":
    sys.exit(main())
