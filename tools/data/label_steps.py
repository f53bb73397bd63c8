"""Label the steps of recorded solutions.

    python tools/data/label_steps.py --sample CONFIG --rollouts DIR --output FILE …

From the end of every step the rest is sampled several times and graded (Math-Shepherd, arXiv 2312.08935). Writes rows
of prompt, completions and labels, which python -m megatron_rl.train_reward_model reads with data.schema=stepwise and
data.chat_template=rendered (none, where the run that recorded them had that). The key=value overrides are those of the
sampling.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.config import RunConfig, load_config
from megatron_rl.curation.process_labels import asked_row, beginnings, different, graded_rests, labelled
from megatron_rl.curation.recording import as_recorded, recorded
from megatron_rl.errors import MegatronRLError
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rewards.types import RewardInput
from megatron_rl.rollout.serialization import read_folder, write_lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Labels for the steps of recorded solutions, by sampling their ends.")
    parser.add_argument("--sample", required=True, help="configuration that samples and grades")
    parser.add_argument("--rollouts", required=True, type=Path, help="folder rollouts/ of a run")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write; samples are kept beside it")
    parser.add_argument("--completions", type=int, default=8, help="sampled from the end of each step (8)")
    parser.add_argument("--soft", action="store_true", help="labels are shares of right ends; otherwise: is there one")
    parser.add_argument("--separator", default="\n", help="text between steps (a line break)")
    parser.add_argument("--min-reward", type=float, default=1.0, help="total reward of a right response (1.0)")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    try:
        label(asked, load_config(asked.sample, asked.overrides))
    except MegatronRLError as error:
        sys.exit(str(error))


def label(asked: argparse.Namespace, config: RunConfig) -> None:
    """Sample, grade, write."""
    grader = build_grader(config.reward.functions)

    def is_right(sample: RewardInput) -> bool:
        return grader(sample)[0] >= asked.min_reward

    if config.rollout.environment is not None:
        sys.exit(
            f"rollout.environment={config.rollout.environment}: the rest of a conversation cannot be sampled from the "
            "middle of it. Label solutions that were given in one response."
        )
    solutions = different(read_folder(asked.rollouts))
    rows = list(
        {prefix: asked_row(line, prefix) for line in solutions for prefix in beginnings(line, asked.separator)}.values()
    )
    if not rows:
        sys.exit(
            f"none of {len(solutions)} solutions has more than one step. Is --separator {asked.separator!r} right?"
        )
    questions = asked.output.with_suffix(".questions.jsonl")
    write_lines(questions, rows)
    per_step = min(len(rows), config.rollout.num_prompts_per_step)
    template = f"data.chat_template={as_recorded(config.data.chat_template)}"
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    rests = recorded(
        asked.sample,
        -(-len(rows) // per_step),
        asked.output.with_suffix(""),
        [
            *asked.overrides, "data.train.kind=jsonl", f"data.train.path={questions}", "data.train.options={}",
            "data.train.prompt_field=prompt", "data.train.answer_field=answer", "data.train.answer_pattern=null",
            "data.train.limit=null", "data.shuffle=false", template, "data.system_prompt=null", "data.curriculum=[]",
            "rollout.dynamic_sampling=false",
            "data.on_overlong_prompt=error", f"data.max_prompt_tokens={longest}",
            f"rollout.num_prompts_per_step={per_step}", f"rollout.group_size={asked.completions}",
        ],
        num_ranks=asked.num_ranks,
        data=questions,
    )  # fmt: skip
    graded = graded_rests(rests, {line["prompt"]: line for line in solutions}, is_right, asked.completions)
    judged = [labelled(line, graded, is_right, asked.separator, soft=asked.soft) for line in solutions]
    write_lines(asked.output, judged)
    labels = [float(value) for row in judged for value in row["labels"]]
    mean = sum(labels) / len(labels)
    print(f"{asked.output}: {len(judged)} solutions, {len(labels)} steps, labels {mean:.1%} in the mean")


if __name__ == "__main__":
    main()
