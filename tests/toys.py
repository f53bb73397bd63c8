"""Tiny models, configurations and sequences that the tests share."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config import RunConfig
from megatron_rl.config.load import load_config
from megatron_rl.models.toy import make_model, make_tokenizer
from megatron_rl.types import TrainSequence

# metrics that depend on the clock or on the history of the process
TIMED = (
    "memory/",
    *("timing_s", "perf/time", "perf/throughput", "perf/tflops", "perf/mfu"),
    *("weight_sync/seconds", "weight_sync/gb_per_s"),
)
# metrics that a stop and a resume also change: a run evaluates where it stops, and pushes its weights for that
CHANGED_BY_RESUME = (*TIMED, "val/", "weight_sync/probe_difference")
VOCAB = 61  # not a multiple of 64, so that the vocabulary is padded


def without(prefixes: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without the metrics whose names begin with one of ``prefixes``."""
    return [{name: value for name, value in row.items() if not name.startswith(prefixes)} for row in rows]


def complete_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a JSONL file that may still be written to."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_model(folder: Path, family: str = "qwen2", *, tied: bool = True, **sizes: int) -> Path:
    """Write a random model with non-trivial norms and biases, and its tokenizer; return the folder."""
    fields = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, **sizes}
    model = make_model(family, tied=tied, **fields)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(2 if family == "qwen3_moe" else 4)  # logits far from uniform, so that errors show
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


RUN_YAML = """
run: {{name: toy, output_dir: {folder}/run, num_steps: 3}}
model: {{path: {model}, dtype: fp32}}
data:
  train: {{kind: task, path: hasty_addition, limit: 64}}
  validation: {{kind: task, path: hasty_addition, split: test, limit: 8}}
  max_prompt_tokens: 8
rollout: {{num_prompts_per_step: 4, group_size: 4, max_new_tokens: 8, schedule: static}}
reward: {{functions: [{{name: tests.own_rewards:digit_share}}], timeout_s: 60}}
algorithm: {{aggregation: sequence_mean, kl_coef: 0.01, entropy_coef: 0.001}}
batching: {{num_mini_batches: 2}}
optimizer: {{lr: 1.0e-3}}
validation: {{every: 0}}
metrics: {{console: silent, wandb: disabled, tensorboard: false}}
"""


def write_config(folder: Path, model: Path) -> Path:
    """Write the configuration of a small run and return its path."""
    path = folder / "toy.yaml"
    path.write_text(RUN_YAML.format(folder=folder, model=model))
    return path


def toy_config(folder: Path, model: Path, *overrides: str) -> RunConfig:
    """Return the configuration of a small run, with overrides."""
    return load_config(write_config(folder, model), overrides)


def sequences(lengths: tuple[int, ...] = (9, 17, 6, 30), num_prompt: int = 3) -> list[TrainSequence]:
    """Return sequences with random tokens and advantages, and log-probabilities near those of a random model."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        mask = torch.arange(length) >= num_prompt
        made.append(
            replace(
                bare_sequence(torch.randint(0, VOCAB, (length,), generator=generator), mask),
                advantages=torch.randn(1, generator=generator).expand(length).contiguous(),
                old_logprobs=-4 + torch.randn(length, generator=generator) * 0.1,
                ref_logprobs=-4 + torch.randn(length, generator=generator) * 0.1,
            )
        )
    return made


CHOICE_TASK = """
name: choice
version: 1
source: here
data: {{kind: jsonl, path: {folder}/choices.jsonl}}
prompt: "{{question}}"
choices_field: choices
chat: false
likelihood: {{of: choices, before: ""}}
scorer: {{name: exact_match}}
gold_response: "{{gold}}"
majority: false
"""


def write_choice_task(folder: Path, num_questions: int) -> Path:
    """Write a task whose response is the likeliest of three choices, and its data; return the path of the task."""
    rows = [
        {"question": f"{i}+{i}=", "choices": [str(2 * i), str(i), f"{i}+1"], "answer": i % 3}
        for i in range(1, num_questions + 1)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "choice.yaml"
    path.write_text(CHOICE_TASK.format(folder=folder))
    return path
