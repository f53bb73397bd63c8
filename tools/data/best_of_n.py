"""Choose among recorded responses with a reward model: python tools/data/best_of_n.py --config CONFIG --rollouts DIR …

CONFIG is the configuration of the reward model's training; set model.path to the trained model. A process reward model
(data.schema=stepwise or math_shepherd) chooses by each aggregation of its step probabilities, an outcome reward model
by its score. For comparison, the table also has one response, the majority vote, and any correct response (pass@n).
Runs alone or under torchrun.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rl.algorithms.reasoning_steps import AGGREGATIONS, Aggregation, aggregated
from megatron_rl.batching.reward_model import labelled_sequence
from megatron_rl.config.load import load_as
from megatron_rl.config.reward_training import RewardTrainingConfig, validate_reward_training
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import DataError, MegatronRLError
from megatron_rl.evaluation.majority_vote import best, majority, shown_answer
from megatron_rl.mcore.reward_model import RewardModel, check_scores
from megatron_rl.mcore.runtime.parallel import init_parallel, launcher_world, leave_world
from megatron_rl.reporting.stats import mean, standard_error
from megatron_rl.reporting.study import markdown
from megatron_rl.rollout.serialization import read_folder, rollout_from_json, write_lines
from megatron_rl.trainer.reward_scores import StepFinder
from megatron_rl.types import ParallelContext

LAST: tuple[Aggregation, ...] = ("last",)


def main() -> None:
    """Command-line entry point."""
    args = parse_arguments()
    try:
        if args.answer_pattern is not None and not re.compile(args.answer_pattern).groups:
            sys.exit(f"--answer-pattern {args.answer_pattern!r} has no group (…) for the answer.")
        config = load_as(RewardTrainingConfig, args.config, args.overrides)
        _, world_size, _ = launcher_world()
        validate_reward_training(config, world_size)
        choose(args, config, init_parallel(config.parallel))
    except MegatronRLError as error:
        sys.exit(str(error) if launcher_world()[0] == 0 else 1)  # all ranks raise; the first one prints
    finally:
        leave_world()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Choose the best of n recorded responses with a reward model.")
    parser.add_argument("--config", required=True, help="configuration of the reward model's training")
    parser.add_argument("--rollouts", required=True, type=Path, help="folder rollouts/ of a run")
    parser.add_argument("--n", type=int, help="responses per prompt to choose from (default: all)")
    parser.add_argument(
        "--answer-pattern",
        help="regular expression whose group is the answer; the last match counts (default: \\boxed{})",
    )
    parser.add_argument("--min-reward", type=float, default=1.0, help="least total reward of a correct response (1.0)")
    parser.add_argument("--output", type=Path, help="JSONL file for the responses with their scores")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


def choose(args: argparse.Namespace, config: RewardTrainingConfig, parallel: ParallelContext) -> None:
    """Score all responses and print the accuracy of each way of choosing; collective."""
    with raise_together(parallel):
        check_scores(config.model.path)
        finder = StepFinder(load_tokenizer(config.model.path))
        recorded = read_folder(args.rollouts)
    model = RewardModel(config.as_run(), parallel)
    has_steps = config.data.schema in ("stepwise", "math_shepherd")
    prompts: dict[str, list[dict[str, Any]]] = {}
    for line in recorded:
        if line["status"] == "ok" and any(line["loss_mask"]):
            prompts.setdefault(line["prompt"], []).append(line)
    groups = [lines[: args.n] for lines in prompts.values() if len(lines) >= (args.n or 1)]
    if not groups:
        raise DataError(f"{args.rollouts}: no prompt has {args.n} graded responses. Lower --n, or sample more.")
    lines = [line for group in groups for line in group]
    rollouts = [rollout_from_json(line) for line in lines]
    positions = [
        finder.scored_positions(rollout, config.data.step_separator if has_steps else None) for rollout in rollouts
    ]
    rows = model.scores(
        [labelled_sequence(rollout.token_ids.tolist(), at) for rollout, at in zip(rollouts, positions, strict=True)]
    )
    for line, row in zip(lines, rows, strict=True):
        line["scores"] = (torch.sigmoid(row) if has_steps else row).tolist()
    if not parallel.is_main:
        return
    if args.output is not None:
        kept = ("prompt", "response", "answer", "reward", "scores")
        write_lines(args.output, [{name: line[name] for name in kept} for line in lines])
    print(table(groups, args, has_steps=has_steps))


def table(groups: list[list[dict[str, Any]]], args: argparse.Namespace, *, has_steps: bool) -> str:
    """Share of correct choices with standard errors, one row per way of choosing."""
    outcomes: dict[str, list[float]] = {}
    for group in groups:
        right = [float(line["reward"] >= args.min_reward) for line in group]
        answers = [shown_answer(line["response"], args.answer_pattern) for line in group]

        def chosen(index: int | None, right: list[float] = right) -> float:
            return 0.0 if index is None else right[index]

        outcome = {"one response": sum(right) / len(right), "majority vote": chosen(majority(answers))}
        for how in AGGREGATIONS if has_steps else LAST:
            scores = [aggregated(line["scores"], how) for line in group]
            name = f"reward model, {how}" if has_steps else "reward model"
            outcome[name] = chosen(best(scores))
            if has_steps:
                outcome[f"majority weighted by {how}"] = chosen(majority(answers, scores))
        outcome["any is right"] = max(right)
        for name, value in outcome.items():
            outcomes.setdefault(name, []).append(value)
    fewest = min(map(len, groups))
    rows = [[name, f"{mean(values):.1%} ± {standard_error(values):.1%}"] for name, values in outcomes.items()]
    return f"{len(groups)} prompts, at least {fewest} responses each\n\n" + markdown([["chosen by", "right"], *rows])


if __name__ == "__main__":
    main()
