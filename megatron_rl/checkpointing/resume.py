"""Check that a run may resume from a checkpoint: no key that changes the training result may differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig
from megatron_rl.config.foreign_names import present_name
from megatron_rl.config.load import defaults, flatten
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.errors import CheckpointError, ConfigError

# Keys, or prefixes of keys, that may differ between a run and its continuation: none changes the training result.
FREE_KEYS = (
    "run.name",
    "run.output_dir",
    "run.num_steps",
    "run.hang_timeout_s",
    "run.stop_margin_s",
    "parallel.",
    "critic.parallel",
    "memory.",
    "model.implementation",
    "batching.logprob_chunk_tokens",
    "checkpoint.",
    "validation.",
    "benchmarks.",
    "metrics.",
    "profiling.",
    "reward.num_workers",
    "reward.timeout_s",
    "reward.memory_limit_gb",
    "reward.max_failure_fraction",
    "rollout.schedule",
    "rollout.max_num_sequences",
    "rollout.engine_timeout_s",
    "rollout.max_engine_failures",
    "weight_sync.transport",
    "weight_sync.folder",
    "batching.micro_batch_size",
    "batching.max_tokens_per_micro_batch",
    "batching.packed",
)


# Exceptions from FREE_KEYS that must not differ, because they decide the layout of the optimizer's states.
BOUND_KEYS = ("parallel.distributed_optimizer", "critic.parallel.distributed_optimizer")


def check_resumable(path: Path, config: RunConfig | RewardTrainingConfig) -> dict[str, Any]:
    """Check that a configuration may resume from a checkpoint; return the content of its trainer.json.

    Raises:
        CheckpointError: trainer.json cannot be read.
        ConfigError: a key differs that changes the training result.
    """
    trainer = read_trainer(path)
    check_same_run(trainer["config"], flatten_plain(config), path)
    check_schedule(trainer["config"], flatten_plain(config), path)
    return trainer


def check_schedule(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Reject a different number of steps if the learning rate decays to the end of the run.

    Raises:
        ConfigError: run.num_steps differs.
    """
    decays_to_end = any(
        current[f"{section}.lr_decay_style"] != "constant" and current[f"{section}.lr_decay_updates"] is None
        for section in ("optimizer", "critic.optimizer")
        if f"{section}.lr_decay_style" in current
    )
    if decays_to_end and saved["run.num_steps"] != current["run.num_steps"]:
        raise ConfigError(
            f"cannot resume {path} with run.num_steps={current['run.num_steps']} instead of "
            f"{saved['run.num_steps']}: the learning rate decays to the end of the run. "
            "Keep run.num_steps, or set optimizer.lr_decay_updates from the start."
        )


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Reject a continuation that would change the training result.

    Keys that did not exist when the checkpoint was written count as having their defaults.

    Raises:
        ConfigError: keys differ, or have been renamed since the checkpoint was written; the message names them.
    """
    renamed = [f"{key} is now {present_name(key)}" for key in sorted(saved) if present_name(key)]
    if renamed:
        raise ConfigError(
            f"cannot resume {path}: it was written when configuration keys had other names ({'; '.join(renamed)}). "
            "Export its weights with tools/convert_megatron_to_hf.py and start a new run from them (model.path)."
        )
    saved = _with_critic_layout({**{key: value for key, value in defaults().items() if key in current}, **saved})
    current = _with_critic_layout(current)
    differing = [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key) and (not key.startswith(FREE_KEYS) or key in BOUND_KEYS)
    ]
    if differing:
        raise ConfigError(
            f"cannot resume {path} with another configuration. {'; '.join(differing)}. "
            "Restore these values, or start a new run.output_dir with model.path set to an exported checkpoint."
        )


def _with_critic_layout(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the policy's layout for a critic without a layout of its own."""
    filled_in = {key: flat.get(key.removeprefix("critic."), None) for key in BOUND_KEYS if key not in flat}
    return {**flat, **filled_in}


def flatten_plain(config: RunConfig | RewardTrainingConfig) -> dict[str, Any]:
    """The flat configuration, with values as they are after a round trip through JSON."""
    flat = json.loads(json.dumps(flatten(config), default=lambda section: vars(section)))
    assert isinstance(flat, dict)
    return flat


def read_trainer(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's trainer.json: state, configuration and world size.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return json.loads((path / "trainer.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}/trainer.json cannot be read: {error}. Resume from another checkpoint."
        ) from error
