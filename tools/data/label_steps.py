"""Label the steps of recorded solutions.

    python tools/data/label_steps.py --sample CONFIG --rollouts DIR --output FILE …

The rest of a solution is sampled several times from the end of each step and graded (Math-Shepherd, arXiv 2312.08935).
Writes rows of prompt, completions and labels, which python -m megatron_rl.train_reward_model reads with
data.schema=stepwise and data.chat_template=rendered (none if the recording run used none). The key=value overrides
apply to the sampling.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.curation.process_labels import (
    continuation_row,
    grade_continuations,
    labelled_row,
    step_prefixes,
    unique_solutions,
)
from megatron_rl.curation.recording import record_rollouts, template_for_recorded
from megatron_rl.errors import MegatronRLError
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rewards.types import RewardInput
from megatron_rl.rollout.serialization import read_folder, write_lines


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Label the steps of recorded solutions by sampling continuations.")
    parser.add_argument("--sample", required=True, help="configuration of the run that samples and grades")
    parser.add_argument("--rollouts", required=True, type=Path, help="folder rollouts/ of a run")
    parser.add_argument(
        "--output", required=True, type=Path, help="JSONL file to write; the samples are kept beside it"
    )
    parser.add_argument(
        "--completions", type=int, default=8, help="continuations sampled from the end of each step (8)"
    )
    parser.add_argument(
        "--soft",
        action="store_true",
        help="label a step with the share of correct continuations (default: whether any is correct)",
    )
    parser.add_argument("--separator", default="\n", help="text between steps (default: a line break)")
    parser.add_argument("--min-reward", type=float, default=1.0, help="least total reward of a correct response (1.0)")
    parser.add_argument("--num-ranks", type=int, default=2, help="ranks of the sampling run (2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        label(args, load_config(args.sample, args.overrides))
    except MegatronRLError as error:
        sys.exit(str(error))


def label(args: argparse.Namespace, config: RunConfig) -> None:
    """Sample continuations, grade them, and write the labelled solutions."""
    grader = build_grader(config.reward.functions)

    def is_correct(sample: RewardInput) -> bool:
        return grader(sample)[0] >= args.min_reward

    if config.rollout.environment is not None:
        sys.exit(
            f"rollout.environment={config.rollout.environment}: continuations cannot be sampled from the middle of a "
            "multi-turn rollout. Label single-turn solutions."
        )
    solutions = unique_solutions(read_folder(args.rollouts))
    rows = list(
        {
            prefix: continuation_row(line, prefix)
            for line in solutions
            for prefix in step_prefixes(line, args.separator)
        }.values()
    )
    if not rows:
        sys.exit(f"none of {len(solutions)} solutions has more than one step. Is --separator {args.separator!r} right?")
    prompts_file = args.output.with_suffix(".questions.jsonl")
    write_lines(prompts_file, rows)
    per_step = min(len(rows), config.rollout.num_prompts_per_step)
    template = f"data.chat_template={template_for_recorded(config.data.chat_template)}"
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    continuations = record_rollouts(
        args.sample,
        -(-len(rows) // per_step),
        args.output.with_suffix(""),
        [
            *args.overrides, "data.train.kind=jsonl", f"data.train.path={prompts_file}", "data.train.options={}",
            "data.train.prompt_field=prompt", "data.train.answer_field=answer", "data.train.answer_pattern=null",
            "data.train.limit=null", "data.shuffle=false", template, "data.system_prompt=null", "data.curriculum=[]",
            "rollout.dynamic_sampling=false",
            "data.on_overlong_prompt=error", f"data.max_prompt_tokens={longest}",
            f"rollout.num_prompts_per_step={per_step}", f"rollout.group_size={args.completions}",
        ],
        num_ranks=args.num_ranks,
        data=prompts_file,
    )  # fmt: skip
    graded = grade_continuations(
        continuations, {line["prompt"]: line for line in solutions}, is_correct, args.completions
    )
    labelled_rows = [labelled_row(line, graded, is_correct, args.separator, soft=args.soft) for line in solutions]
    write_lines(args.output, labelled_rows)
    labels = [float(value) for row in labelled_rows for value in row["labels"]]
    mean = sum(labels) / len(labels)
    print(f"{args.output}: {len(labelled_rows)} solutions, {len(labels)} steps, mean label {mean:.1%}")


if __name__ == "__main__":
    main()
