"""Choose among recorded responses by a reward model: python tools/data/best_of_n.py --config CONFIG --rollouts DIR …

CONFIG is that of the reward model's training; set model.path to what it wrote. A model of steps (data.schema=stepwise
or math_shepherd) chooses by each aggregation of its probabilities, another one by its score. Beside it stand one
response, majority vote, and any right response (pass@n). Alone or under torchrun.
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
    """The command line."""
    asked = parse_arguments()
    try:
        if asked.answer_pattern is not None and not re.compile(asked.answer_pattern).groups:
            sys.exit(f"--answer-pattern {asked.answer_pattern!r} has no group (…) for the answer.")
        config = load_as(RewardTrainingConfig, asked.config, asked.overrides)
        _, world_size, _ = launcher_world()
        validate_reward_training(config, world_size)
        choose(asked, config, init_parallel(config.parallel))
    except MegatronRLError as error:
        sys.exit(str(error) if launcher_world()[0] == 0 else 1)  # the first rank says what all of them found
    finally:
        leave_world()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Best of n recorded responses by a reward model.")
    parser.add_argument("--config", required=True, help="configuration of the reward model's training")
    parser.add_argument("--rollouts", required=True, type=Path, help="folder rollouts/ of a run")
    parser.add_argument("--n", type=int, help="responses of each prompt to choose from; default: all")
    parser.add_argument(
        "--answer-pattern", help="regular expression with a group: the answer, last match; default: \\boxed{}"
    )
    parser.add_argument("--min-reward", type=float, default=1.0, help="total reward of a right response (1.0)")
    parser.add_argument("--output", type=Path, help="JSONL file for the responses with their scores")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(arguments)


def choose(asked: argparse.Namespace, config: RewardTrainingConfig, parallel: ParallelContext) -> None:
    """Score all responses and print what each way of choosing gets right; collective."""
    with raise_together(parallel):
        check_scores(config.model.path)
        finder = StepFinder(load_tokenizer(config.model.path))
        found = read_folder(asked.rollouts)
    model = RewardModel(config.as_run(), parallel)
    of_steps = config.data.schema in ("stepwise", "math_shepherd")
    prompts: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        if line["status"] == "ok" and any(line["loss_mask"]):
            prompts.setdefault(line["prompt"], []).append(line)
    groups = [lines[: asked.n] for lines in prompts.values() if len(lines) >= (asked.n or 1)]
    if not groups:
        raise DataError(f"{asked.rollouts}: no prompt has {asked.n} graded responses. Lower --n, or sample more.")
    lines = [line for group in groups for line in group]
    rollouts = [rollout_from_json(line) for line in lines]
    places = [finder.judged_places(one, config.data.step_separator if of_steps else None) for one in rollouts]
    rows = model.scores(
        [labelled_sequence(one.token_ids.tolist(), at) for one, at in zip(rollouts, places, strict=True)]
    )
    for line, row in zip(lines, rows, strict=True):
        line["scores"] = (torch.sigmoid(row) if of_steps else row).tolist()
    if not parallel.is_main:
        return
    if asked.output is not None:
        kept = ("prompt", "response", "answer", "reward", "scores")
        write_lines(asked.output, [{name: line[name] for name in kept} for line in lines])
    print(table(groups, asked, of_steps=of_steps))


def table(groups: list[list[dict[str, Any]]], asked: argparse.Namespace, *, of_steps: bool) -> str:
    """Share of right choices, with standard errors."""
    ways: dict[str, list[float]] = {}
    for group in groups:
        right = [float(line["reward"] >= asked.min_reward) for line in group]
        answers = [shown_answer(line["response"], asked.answer_pattern) for line in group]

        def chosen(place: int | None, right: list[float] = right) -> float:
            return 0.0 if place is None else right[place]

        found = {"one response": sum(right) / len(right), "majority vote": chosen(majority(answers))}
        for how in AGGREGATIONS if of_steps else LAST:
            scores = [aggregated(line["scores"], how) for line in group]
            name = f"reward model, {how}" if of_steps else "reward model"
            found[name] = chosen(best(scores))
            if of_steps:
                found[f"majority weighted by {how}"] = chosen(majority(answers, scores))
        found["any is right"] = max(right)
        for name, value in found.items():
            ways.setdefault(name, []).append(value)
    fewest = min(map(len, groups))
    rows = [[name, f"{mean(found):.1%} ± {standard_error(found):.1%}"] for name, found in ways.items()]
    return f"{len(groups)} prompts, {fewest} responses each or more\n\n" + markdown([["chosen by", "right"], *rows])


if __name__ == "__main__":
    main()
