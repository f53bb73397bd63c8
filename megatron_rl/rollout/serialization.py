"""Rollouts and partial rollouts as JSON; reading returns bit for bit what was written."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.rollout.partial import Observation, Part, PartialGroup, PartialRollout
from megatron_rl.types import Completion, Prompt, Rollout, RolloutGroup

FORMAT = 1


def step_file(folder: Path, step: int) -> Path:
    """Path of the file with the rollouts of a step."""
    return folder / f"step_{step:06d}.jsonl"


def write_groups(path: Path, step: int, groups: Sequence[RolloutGroup]) -> None:
    """Write the rollouts of a step, one line each."""
    lines = [
        {
            "format": FORMAT,
            "step": step,
            "group": group.index,
            "sample": i,
            "baseline": _number(group.baseline),
            **_prompt(group.prompt),
            **_rollout(rollout),
        }
        for group in groups
        for i, rollout in enumerate(group.rollouts)
    ]
    write_lines(path, lines)


def read_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that ``write_groups`` wrote.

    Raises:
        DataError: the file cannot be read or has another format.
    """
    for line in read_lines(path):
        if line.get("format") != FORMAT:
            raise DataError(
                f"{path}: format {line.get('format')}, expected {FORMAT}. It is not a rollout file of this version."
            )
        yield line


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of all recorded steps of a run as a list; see ``each_rollout``."""
    return list(each_rollout(folder))


def each_rollout(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of all recorded steps of a run, in order, with one step in memory at a time.

    Args:
        folder: folder with the step_*.jsonl files.

    Raises:
        DataError: the folder has no such files, or one cannot be read.
    """
    files = sorted(folder.glob("step_*.jsonl"))
    if not files:
        raise DataError(f"{folder} has no step_*.jsonl. Record a run with metrics.keep_rollouts_every=1.")
    for file in files:
        yield from read_rollouts(file)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file atomically: either all lines or none.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines), encoding="ascii")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Free space and resume.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def group_to_json(group: PartialGroup) -> dict[str, Any]:
    """Return a partial group as a JSON object."""
    return {
        **_prompt(group.prompt),
        "samples": [
            _rollout(sample) if isinstance(sample, Rollout) else _partial_rollout(sample) for sample in group.samples
        ],
    }


def group_from_json(record: Mapping[str, Any]) -> PartialGroup:
    """Return the group that ``group_to_json`` serialized."""
    return PartialGroup(
        prompt=prompt_from_json(record),
        samples=tuple(
            rollout_from_json(sample) if "reward" in sample else _partial_rollout_from_json(sample)
            for sample in record["samples"]
        ),
    )


def prompt_from_json(record: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a rollout line or of a serialized group."""
    fields = {name: record[name] for name in ("prompt_id", "answer", "demonstration", "metadata")}
    return Prompt(token_ids=torch.tensor(record["prompt_token_ids"]), text=record["prompt"], **fields)


def rollout_from_json(record: Mapping[str, Any]) -> Rollout:
    """Return the rollout of a line or of a serialized sample."""
    fields = ("finish_reason", "seed", "reward_parts", "status", "failure")
    return Rollout(
        token_ids=torch.tensor(record["token_ids"]),
        loss_mask=torch.tensor(record["loss_mask"], dtype=torch.bool),
        rollout_logprobs=torch.tensor(record["logprobs"], dtype=torch.float32),
        text=record["response"],
        policy_versions=torch.tensor(record["policy_versions"], dtype=torch.int32),
        reward=number_from_json(record["reward"]),
        routing=_routing(record),
        step_rewards={int(index): reward for index, reward in record.get("step_rewards", ())},  # absent in older files
        **{name: record[name] for name in fields},
    )


def number_from_json(record: float | None) -> float:
    """Return the number, or NaN for null: JSON has no NaN."""
    return math.nan if record is None else record


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _prompt(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "prompt_token_ids": prompt.token_ids.tolist(),
        "answer": prompt.answer,
        "demonstration": prompt.demonstration,
        "metadata": dict(prompt.metadata),
    }


def _rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "reward": _number(rollout.reward),
        "reward_parts": dict(rollout.reward_parts),
        "status": rollout.status,
        "failure": rollout.failure,
        "step_rewards": list(rollout.step_rewards.items()),
        "seed": rollout.seed,
        "token_ids": rollout.token_ids.tolist(),
        "loss_mask": rollout.loss_mask.int().tolist(),
        "logprobs": rollout.rollout_logprobs.tolist(),
        "policy_versions": rollout.policy_versions.tolist(),
        **_routes(rollout.routing),
    }


def _partial_rollout(sample: PartialRollout) -> dict[str, Any]:
    return {"seed": sample.seed, "parts": [_part(part) for part in sample.parts]}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, Observation):
        return {"token_ids": part.token_ids.tolist()}
    return {
        "token_ids": part.token_ids.tolist(),
        "logprobs": part.logprobs.tolist(),
        "finish_reason": part.finish_reason,
        "policy_version": part.policy_version,
        **_routes(part.routing),
    }


def _partial_rollout_from_json(record: Mapping[str, Any]) -> PartialRollout:
    return PartialRollout(seed=record["seed"], parts=tuple(_part_from_json(part) for part in record["parts"]))


def _part_from_json(record: Mapping[str, Any]) -> Part:
    token_ids = torch.tensor(record["token_ids"], dtype=torch.int64)
    if "logprobs" not in record:
        return Observation(token_ids=token_ids)
    return Completion(
        token_ids=token_ids,
        logprobs=torch.tensor(record["logprobs"], dtype=torch.float32),
        finish_reason=record["finish_reason"],
        policy_version=record["policy_version"],
        routing=_routing(record),
    )


def _routes(routing: Tensor | None) -> dict[str, Any]:
    return {} if routing is None else {"routing": routing.tolist()}


def _routing(record: Mapping[str, Any]) -> Tensor | None:
    return torch.tensor(record["routing"], dtype=torch.int16) if "routing" in record else None
