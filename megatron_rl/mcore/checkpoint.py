"""Policy and optimizer in Megatron's distributed checkpoint format, loadable under another layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.errors import CheckpointError
from megatron_rl.mcore import patches
from megatron_rl.mcore.async_save import PendingSave
from megatron_rl.mcore.model import PolicyModel
from megatron_rl.mcore.policy import Policy

# newer releases take their writers from another package unless told otherwise
_OWN_WRITERS = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def save_policy(policy: Policy, folder: Path) -> None:
    """Write weights, optimizer and schedule into an existing empty folder; collective.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _errors_name(folder):
        _save(policy, folder, in_background=False)


def begin_save(policy: Policy, folder: Path, then: Callable[[], Any]) -> PendingSave:
    """As ``save_policy``, but the files are written while the policy goes on learning; collective.

    Args:
        then: called once this rank's files are written.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _errors_name(folder):
        return PendingSave(_save(policy, folder, in_background=True), then)


def complete_save(pending: PendingSave, folder: Path) -> None:
    """Complete the folder that every rank has written; collective.

    Raises:
        CheckpointError: the folder could not be written.
    """
    with _errors_name(folder):
        pending.complete()


def _save(policy: Policy, folder: Path, *, in_background: bool) -> Any:
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"), policy.parallel.groups.dp_cp
    )
    metadata = _metadata(policy)
    return dist_checkpointing.save(
        _state(policy, metadata, is_loading=False),
        str(folder),
        strategy,
        async_sharded_save=in_background,
        **_OWN_WRITERS,
        content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
    )


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {_reason(error)}. Free space and resume.") from error


def load_policy(policy: Policy, folder: Path) -> None:
    """Restore weights, optimizer and schedule, under any layout; collective.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another model.
    """
    patches.create_adam_state(policy.optimizer)
    group = policy.parallel.groups.dp_cp
    try:
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
        loaded = dist_checkpointing.load(
            _state(policy, _metadata(policy), is_loading=True), str(folder), strategy, strict=StrictHandling.RAISE_ALL
        )
    except (OSError, KeyError, ValueError, RuntimeError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(
            f"cannot restore checkpoint {folder}: {_reason(error)}. Resume from an earlier one with --resume PATH."
        ) from error
    for key, chunk in _named_chunks(policy):
        chunk.load_state_dict(loaded[key])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    patches.separate_step_counts(policy.optimizer)
    policy.scheduler.load_state_dict(loaded["scheduler"])


def _reason(error: BaseException) -> str:
    """What happened, in a line: torch's CheckpointException carries whole tracebacks of the ranks."""
    lines = str(error).split("\n")
    said = [line for line in lines if line.strip(" .")]
    return f"{type(error).__name__}: {said[-1].strip()[:500]}" if said else repr(error)


def _metadata(policy: Policy) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": policy.parallel.groups.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _named_chunks(policy: Policy) -> list[tuple[str, PolicyModel]]:
    """ "model", or "model0", "model1" … as Megatron-LM names the chunks of a virtual pipeline."""
    if len(policy.chunks) == 1:
        return [("model", policy.chunks[0])]
    return [(f"model{place}", chunk) for place, chunk in enumerate(policy.chunks)]


@torch.no_grad()
def _state(policy: Policy, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(policy)}
    # with one chunk the optimizer expects its entries, with several those of all under their names
    entries = model if len(model) > 1 else model["model"]
    return {
        **model,
        "optimizer": policy.optimizer.sharded_state_dict(entries, is_loading=is_loading, metadata=metadata),
        "scheduler": policy.scheduler.state_dict(),
    }
