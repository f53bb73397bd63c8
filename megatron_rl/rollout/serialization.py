"""Rollouts and samples under way as JSON, exactly: what is read back is bit for bit what was written."""

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
    """Where the rollouts of a step are kept."""
    return folder / f"step_{step:06d}.jsonl"


def write_groups(path: Path, step: int, groups: Sequence[RolloutGroup]) -> None:
    """One line for each rollout of a step."""
    lines = [
        {
            "format": FORMAT,
            "step": step,
            "group": group.index,
            "sample": i,
            "baseline": _number(group.baseline),
            **_prompt(group.prompt),
            **_rollout(one),
        }
        for group in groups
        for i, one in enumerate(group.rollouts)
    ]
    write_lines(path, lines)


def read_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that ``write_groups`` wrote.

    Raises:
        DataError: it cannot be read, or is of another format.
    """
    for line in read_lines(path):
        if line.get("format") != FORMAT:
            raise DataError(f"{path}: format {line.get('format')}, expected {FORMAT}. It is no file of rollouts.")
        yield line


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The lines of all steps that a run has recorded, as of ``each_rollout``."""
    return list(each_rollout(folder))


def each_rollout(folder: Path) -> Iterator[dict[str, Any]]:
    """The same, one step in memory at a time.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    files = sorted(folder.glob("step_*.jsonl"))
    if not files:
        raise DataError(f"{folder} has no step_*.jsonl. Record a run with metrics.keep_rollouts_every=1.")
    for file in files:
        yield from read_rollouts(file)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines), encoding="ascii")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Free space and resume.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        DataError: it cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def group_to_json(group: PartialGroup) -> dict[str, Any]:
    """A group under way."""
    return {
        **_prompt(group.prompt),
        "samples": [_rollout(one) if isinstance(one, Rollout) else _unfinished(one) for one in group.samples],
    }


def group_from_json(found: Mapping[str, Any]) -> PartialGroup:
    """What ``group_to_json`` gave."""
    return PartialGroup(
        prompt=prompt_from_json(found),
        samples=tuple(
            rollout_from_json(one) if "reward" in one else _unfinished_from_json(one) for one in found["samples"]
        ),
    )


def prompt_from_json(found: Mapping[str, Any]) -> Prompt:
    """The prompt of a line."""
    fields = {name: found[name] for name in ("prompt_id", "answer", "demonstration", "metadata")}
    return Prompt(token_ids=torch.tensor(found["prompt_token_ids"]), text=found["prompt"], **fields)


def rollout_from_json(found: Mapping[str, Any]) -> Rollout:
    """The rollout of a line."""
    fields = ("finish_reason", "seed", "reward_parts", "status", "failure")
    return Rollout(
        token_ids=torch.tensor(found["token_ids"]),
        loss_mask=torch.tensor(found["loss_mask"], dtype=torch.bool),
        rollout_logprobs=torch.tensor(found["logprobs"], dtype=torch.float32),
        text=found["response"],
        policy_versions=torch.tensor(found["policy_versions"], dtype=torch.int32),
        reward=number_from_json(found["reward"]),
        routing=_routing(found),
        step_rewards={int(place): reward for place, reward in found.get("step_rewards", ())},  # older files: none
        **{name: found[name] for name in fields},
    )


def number_from_json(found: float | None) -> float:
    """JSON has no NaN."""
    return math.nan if found is None else found


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


def _unfinished(sample: PartialRollout) -> dict[str, Any]:
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


def _unfinished_from_json(found: Mapping[str, Any]) -> PartialRollout:
    return PartialRollout(seed=found["seed"], parts=tuple(_part_from_json(part) for part in found["parts"]))


def _part_from_json(found: Mapping[str, Any]) -> Part:
    token_ids = torch.tensor(found["token_ids"], dtype=torch.int64)
    if "logprobs" not in found:
        return Observation(token_ids=token_ids)
    return Completion(
        token_ids=token_ids,
        logprobs=torch.tensor(found["logprobs"], dtype=torch.float32),
        finish_reason=found["finish_reason"],
        policy_version=found["policy_version"],
        routing=_routing(found),
    )


def _routes(routing: Tensor | None) -> dict[str, Any]:
    return {} if routing is None else {"routing": routing.tolist()}


def _routing(found: Mapping[str, Any]) -> Tensor | None:
    return torch.tensor(found["routing"], dtype=torch.int16) if "routing" in found else None
