"""Run rounds of STaR: python tools/data/star.py --sample CONFIG --learn CONFIG --output DIR [key=value …].

Each round samples from the previous round's model and keeps the correct responses. With --hint it samples the prompts
without a correct response again, with the answer in the prompt. It then trains the base model on the kept responses,
without the hints. Finished parts are not repeated. The key=value overrides apply to sampling and training.
"""

import argparse
import random
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.curation.recording import record_rollouts, run_training, template_for_recorded
from megatron_rl.curation.star import Line, as_steps, hinted_row, select_correct, unsolved, without_hint
from megatron_rl.errors import MegatronRLError
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rollout.serialization import step_file, write_lines

METRIC = "val/score"


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Train a model on its own correct responses, in rounds (STaR).")
    parser.add_argument("--sample", required=True, help="configuration of the run that samples and grades")
    parser.add_argument("--learn", required=True, help="configuration of the run that trains on the kept responses")
    parser.add_argument("--output", required=True, type=Path, help="folder for all rounds")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (3)")
    parser.add_argument("--num-ranks", type=int, default=2, help="ranks of each run (2)")
    parser.add_argument("--min-reward", type=float, default=1.0, help="least total reward of a correct response (1.0)")
    parser.add_argument(
        "--max-per-prompt", type=int, default=4, help="most different correct responses kept per prompt (4)"
    )
    parser.add_argument(
        "--quality",
        choices=("short", "long", "likely"),
        default="likely",
        help="which correct responses to prefer (likely)",
    )
    parser.add_argument("--hint", help="template with {prompt} and {answer}, for prompts without a correct response")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        rounds(args, load_config(args.sample, args.overrides), load_config(args.learn, args.overrides))
    except MegatronRLError as error:
        sys.exit(str(error))


def rounds(args: argparse.Namespace, sample: RunConfig, learn: RunConfig) -> None:
    """Run all rounds and print a table row for each."""
    model = base = sample.model.path
    print("| round | sampled | right | by hints | held-out score |\n|---|---|---|---|---|")
    for number in range(1, args.rounds + 1):
        folder = args.output / f"round_{number}"
        lines = sample_responses(args, sample, folder / "samples", model, [f"run.seed={sample.run.seed + number}"])
        kept = grade_and_select(args, sample, lines)
        rationalised = [] if args.hint is None else sample_with_hints(args, sample, folder, model, lines, kept)
        training_lines = [*kept, *rationalised]
        random.Random(number).shuffle(training_lines)
        steps = as_steps(training_lines, learn.rollout.num_prompts_per_step)
        if not steps:
            sys.exit(
                f"round {number}: none of {len(lines)} responses is correct. Sample more, or start from a better model."
            )
        for step, step_lines in enumerate(steps, start=1):
            write_lines(step_file(folder / "kept", step), step_lines)
        run_training(
            args.learn, folder / "learnt", args.num_ranks, *args.overrides,
            f"model.path={base}", "rollout.source=replay", f"rollout.replay_path={folder / 'kept'}",
            "rollout.group_size=1", "rollout.drift_limit=null", "rollout.drift_warning=null",
            "algorithm.loss=nll", f"algorithm.accept_min_reward={args.min_reward}",
            f"run.num_steps={len(steps)}", "checkpoint.save_hf=true",
        )  # fmt: skip
        model = str(folder / "learnt" / "checkpoints" / f"step_{len(steps):06d}" / "hf")
        scores = [row[METRIC] for row in read_rows(folder / "learnt" / "metrics.jsonl") if METRIC in row]
        score = f"{scores[-1]:.1%}" if scores else "-"
        print(f"| {number} | {len(lines)} | {len(kept)} | {len(rationalised)} | {score} |", flush=True)


def sample_responses(
    args: argparse.Namespace, config: RunConfig, run: Path, model: str, overrides: list[str]
) -> list[Line]:
    """Sample and grade responses of a model."""
    overrides = [*args.overrides, f"model.path={model}", *overrides]
    return record_rollouts(args.sample, config.run.num_steps, run, overrides, num_ranks=args.num_ranks)


def grade_and_select(args: argparse.Namespace, config: RunConfig, lines: list[Line]) -> list[Line]:
    """Grade the responses again and keep the best correct ones of each prompt."""
    grader = build_grader(config.reward.functions)
    qualities = {
        "short": lambda line: -sum(line["loss_mask"]),
        "long": lambda line: sum(line["loss_mask"]),
        "likely": lambda line: sum(line["logprobs"]) / max(1, sum(line["loss_mask"])),
    }
    return select_correct(
        lines,
        lambda sample: grader(sample)[0],
        min_reward=args.min_reward,
        max_per_prompt=args.max_per_prompt,
        quality=qualities[args.quality],
    )


def sample_with_hints(
    args: argparse.Namespace, config: RunConfig, folder: Path, model: str, lines: list[Line], kept: list[Line]
) -> list[Line]:
    """Correct responses to prompts that had none, sampled with a hint and returned as if without it."""
    unsolved_lines = {line["prompt_id"]: line for line in unsolved(lines, kept)}
    if not unsolved_lines:
        return []
    questions = folder / "hinted.jsonl"
    write_lines(questions, [hinted_row(line, args.hint) for line in unsolved_lines.values()])
    longer = len(args.hint) + max(len(str(line["answer"])) for line in unsolved_lines.values())
    template = f"data.chat_template={template_for_recorded(config.data.chat_template)}"
    hinted = sample_responses(
        args,
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
    return grade_and_select(args, config, [without_hint(line, unsolved_lines) for line in hinted])


if __name__ == "__main__":
    main()
