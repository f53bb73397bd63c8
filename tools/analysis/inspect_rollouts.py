"""Show the rollouts of a run: python tools/analysis/inspect_rollouts.py RUN/rollouts [--step 12] [--sort worst].

Without --step, prints one line per step; with it, the prompts, responses and rewards of that step. The run must have
recorded them with metrics.keep_rollouts_every=1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rl.errors import MegatronRLError
from megatron_rl.rollout.serialization import read_rollouts, step_file

ORDERS = {
    "group": lambda line: (line["group"], line["sample"]),
    "worst": lambda line: -1e30 if line["reward"] is None else line["reward"],
    "best": lambda line: 1e30 if line["reward"] is None else -line["reward"],
    "longest": lambda line: -sum(line["loss_mask"]),
    "unlikely": lambda line: sum(line["logprobs"]) / max(1, sum(line["loss_mask"])),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Show the rollouts that a run has recorded.")
    parser.add_argument("folder", type=Path, help="rollouts/ in the folder of a run")
    parser.add_argument("--step", type=int, help="show this step's rollouts (default: one line per step)")
    parser.add_argument("--sort", choices=ORDERS, default="group", help="order of the rollouts (default: group)")
    parser.add_argument("--num", type=int, default=8, help="rollouts to show (default: 8)")
    parser.add_argument("--grep", default="", metavar="TEXT", help="only responses that contain this text")
    parser.add_argument(
        "--tokens", action="store_true", help="also print token ids with log-probability and policy version"
    )
    args = parser.parse_args(argv)
    try:
        if args.step is None:
            print(overview(args.folder))
        else:
            lines = list(read_rollouts(step_file(args.folder, args.step)))
            matching = sorted((line for line in lines if args.grep in line["response"]), key=ORDERS[args.sort])
            print(f"{len(matching)} of {len(lines)} rollouts of step {args.step}, {min(args.num, len(matching))} shown")
            for line in matching[: args.num]:
                print(show(line, tokens=args.tokens))
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def overview(folder: Path) -> str:
    """Table with one line per step.

    Raises:
        DataError: a file cannot be read.
    """
    rows = [f"{'step':>6} {'rollouts':>8} {'reward':>8} {'tokens':>8} {'cut off':>8} {'failed':>6} {'stale':>6}"]
    paths = sorted(folder.glob("step_*.jsonl"))
    for path in paths:
        lines = list(read_rollouts(path))
        rewards = [line["reward"] for line in lines if line["reward"] is not None]
        cut = fmean(line["finish_reason"] == "length" for line in lines)
        oldest = min(min((v for v in line["policy_versions"] if v >= 0), default=0) for line in lines)
        rows.append(
            f"{lines[0]['step']:6} {len(lines):8} {fmean(rewards) if rewards else float('nan'):8.3f} "
            f"{fmean(sum(line['loss_mask']) for line in lines):8.1f} {cut:8.1%} "
            f"{sum(line['status'] != 'ok' for line in lines):6} {lines[0]['step'] - 1 - oldest:6}"
        )
    return "\n".join(rows) if paths else f"{folder} has no step_*.jsonl: record them with metrics.keep_rollouts_every=1"


def show(line: dict[str, Any], *, tokens: bool) -> str:
    """One rollout as text."""
    parts = ", ".join(f"{name} {value:g}" for name, value in line["reward_parts"].items())
    reward = f"failed ({line['failure']})" if line["reward"] is None else f"{line['reward']:g} ({parts})"
    text = [
        "",
        f"--- group {line['group']} sample {line['sample']} of prompt {line['prompt_id']}: reward {reward}, "
        f"{sum(line['loss_mask'])} tokens, ended by {line['finish_reason']}",
        f"prompt:   {line['prompt']!r}" + (f"  (answer {line['answer']!r})" if line["answer"] is not None else ""),
        f"response: {line['response']!r}",
    ]
    if tokens:
        sampled = zip(line["token_ids"], line["logprobs"], line["policy_versions"], line["loss_mask"], strict=True)
        text += [f"  {token:8} {logprob:9.4f}  version {version}" for token, logprob, version, mask in sampled if mask]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
