"""Rounds of self-teaching: python tools/data/star.py --sample CONFIG --learn CONFIG --output DIR [key=value …].

Each round samples from the model of the round before, keeps the right responses, asks the prompts without one again
with their answer as a hint if --hint says how, and then trains the base model afresh on what was kept, without hints.
What is finished is not done again. The key=value overrides hold for sampling and learning.
"""

import argparse
import random
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.curation.recording import as_recorded, recorded, train
from megatron_rl.curation.star import Line, as_steps, hinted_row, right_ones, unsolved, without_hint
from megatron_rl.errors import MegatronRLError
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rollout.serialization import step_file, write_lines

METRIC = "val/score"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rounds of learning from the model's own right responses (STaR).")
    parser.add_argument("--sample", required=True, help="configuration that samples and grades")
    parser.add_argument("--learn", required=True, help="configuration that learns from what was kept")
    parser.add_argument("--output", required=True, type=Path, help="folder of the rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--min-reward", type=float, default=1.0, help="total reward of a right response (1.0)")
    parser.add_argument("--max-per-prompt", type=int, default=4, help="different right responses of a prompt (4)")
    parser.add_argument("--quality", choices=("short", "long", "likely"), default="likely", help="preferred among them")
    parser.add_argument("--hint", help="text with {prompt} and {answer}, for prompts without a right response")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    try:
        rounds(asked, load_config(asked.sample, asked.overrides), load_config(asked.learn, asked.overrides))
    except MegatronRLError as error:
        sys.exit(str(error))


def rounds(asked: argparse.Namespace, sample: RunConfig, learn: RunConfig) -> None:
    """All of them, and a line about each."""
    model = base = sample.model.path
    print("| round | sampled | right | by hints | held-out score |\n|---|---|---|---|---|")
    for number in range(1, asked.rounds + 1):
        folder = asked.output / f"round_{number}"
        lines = sampled(asked, sample, folder / "samples", model, [f"run.seed={sample.run.seed + number}"])
        kept = right(asked, sample, lines)
        rationalised = [] if asked.hint is None else by_hints(asked, sample, folder, model, lines, kept)
        taught = [*kept, *rationalised]
        random.Random(number).shuffle(taught)
        steps = as_steps(taught, learn.rollout.num_prompts_per_step)
        if not steps:
            sys.exit(
                f"round {number}: none of {len(lines)} responses is right. Sample more, or begin with a better model."
            )
        for step, one in enumerate(steps, start=1):
            write_lines(step_file(folder / "kept", step), one)
        train(
            asked.learn, folder / "learnt", asked.num_ranks, *asked.overrides,
            f"model.path={base}", "rollout.source=replay", f"rollout.replay_path={folder / 'kept'}",
            "rollout.group_size=1", "rollout.drift_limit=null", "rollout.drift_warning=null",
            "algorithm.loss=nll", f"algorithm.accept_min_reward={asked.min_reward}",
            f"run.num_steps={len(steps)}", "checkpoint.save_hf=true",
        )  # fmt: skip
        model = str(folder / "learnt" / "checkpoints" / f"step_{len(steps):06d}" / "hf")
        scores = [row[METRIC] for row in read_rows(folder / "learnt" / "metrics.jsonl") if METRIC in row]
        score = f"{scores[-1]:.1%}" if scores else "-"
        print(f"| {number} | {len(lines)} | {len(kept)} | {len(rationalised)} | {score} |", flush=True)


def sampled(asked: argparse.Namespace, config: RunConfig, run: Path, model: str, overrides: list[str]) -> list[Line]:
    """Responses of a model, graded."""
    given = [*asked.overrides, f"model.path={model}", *overrides]
    return recorded(asked.sample, config.run.num_steps, run, given, num_ranks=asked.num_ranks)


def right(asked: argparse.Namespace, config: RunConfig, lines: list[Line]) -> list[Line]:
    """Those that are kept, each graded once more."""
    grader = build_grader(config.reward.functions)
    qualities = {
        "short": lambda line: -sum(line["loss_mask"]),
        "long": lambda line: sum(line["loss_mask"]),
        "likely": lambda line: sum(line["logprobs"]) / max(1, sum(line["loss_mask"])),
    }
    return right_ones(
        lines,
        lambda sample: grader(sample)[0],
        min_reward=asked.min_reward,
        max_per_prompt=asked.max_per_prompt,
        quality=qualities[asked.quality],
    )


def by_hints(
    asked: argparse.Namespace, config: RunConfig, folder: Path, model: str, lines: list[Line], kept: list[Line]
) -> list[Line]:
    """Right responses to prompts that had none, given with the answer in sight and kept without it."""
    missing = {line["prompt_id"]: line for line in unsolved(lines, kept)}
    if not missing:
        return []
    questions = folder / "hinted.jsonl"
    write_lines(questions, [hinted_row(line, asked.hint) for line in missing.values()])
    longer = len(asked.hint) + max(len(str(line["answer"])) for line in missing.values())
    template = f"data.chat_template={as_recorded(config.data.chat_template)}"
    hinted = sampled(
        asked,
        config,
        folder / "hinted",
        model,
        [
            "data.train.kind=jsonl", f"data.train.path={questions}", "data.train.options={}", template,
            "data.system_prompt=null",
            "data.train.prompt_field=prompt", "data.train.answer_field=answer", "data.train.answer_pattern=null",
            f"data.max_prompt_tokens={config.data.max_prompt_tokens + longer}",
        ],
    )  # fmt: skip
    return right(asked, config, [without_hint(line, missing) for line in hinted])


if __name__ == "__main__":
    main()
