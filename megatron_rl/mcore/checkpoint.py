"""Save and load a learner in Megatron's distributed checkpoint format, which can be loaded under another layout."""

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
from megatron_rl.mcore.async_save import PendingSave
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.lora import IS_ADAPTER
from megatron_rl.mcore.runtime import patches
from megatron_rl.mcore.runtime.parallel import in_layout

# newer releases use the writers of another package by default
_OWN_WRITERS = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def save_learner(learner: Learner, folder: Path) -> None:
    """Write weights, optimizer state and schedule into an existing empty folder; collective.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _as_checkpoint_error(folder), in_layout(learner.model.parallel):
        _save(learner, folder, in_background=False)


def begin_save(learner: Learner, folder: Path, on_written: Callable[[], Any]) -> PendingSave:
    """Start an asynchronous ``save_learner``: the files are written while training continues; collective.

    Args:
        learner: model, optimizer and schedule to save.
        folder: existing empty folder.
        on_written: called once this rank's files are written.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _as_checkpoint_error(folder), in_layout(learner.model.parallel):
        return PendingSave(_save(learner, folder, in_background=True), on_written)


def complete_save(pending: PendingSave, folder: Path) -> None:
    """Finalize the folder after every rank has written its files; collective.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _as_checkpoint_error(folder):
        pending.complete()


def _save(learner: Learner, folder: Path, *, in_background: bool) -> Any:
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"), learner.model.parallel.groups.dp_cp
    )
    metadata = _metadata(learner)
    return dist_checkpointing.save(
        _state(learner, metadata, is_loading=False),
        str(folder),
        strategy,
        async_sharded_save=in_background,
        **_OWN_WRITERS,
        content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
    )


@contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Raise errors of the body as CheckpointError that names the folder."""
    try:
        yield
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {_reason(error)}. Free space and resume.") from error


def load_learner(learner: Learner, folder: Path) -> None:
    """Restore weights, optimizer state and schedule, saved under any layout; collective.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or belongs to another model.
    """
    with in_layout(learner.model.parallel):
        _load(learner, folder)


def _load(learner: Learner, folder: Path) -> None:
    patches.create_adam_state(learner.optimizer)
    group = learner.model.parallel.groups.dp_cp
    try:
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
        loaded = dist_checkpointing.load(
            _state(learner, _metadata(learner), is_loading=True), str(folder), strategy, strict=StrictHandling.RAISE_ALL
        )
    except (OSError, KeyError, ValueError, RuntimeError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(
            f"cannot restore checkpoint {folder}: {_reason(error)}. Resume from an earlier one with --resume PATH."
        ) from error
    for key, chunk in _named_chunks(learner):
        chunk.load_state_dict(loaded[key], strict=not learner.model.config.lora.rank)
    learner.optimizer.load_state_dict(loaded["optimizer"])
    patches.separate_step_counts(learner.optimizer)
    learner.scheduler.load_state_dict(loaded["scheduler"])


def _reason(error: BaseException) -> str:
    """The cause in one line; torch's CheckpointException contains the full tracebacks of the ranks."""
    lines = [line for line in str(error).split("\n") if line.strip(" .")]
    return f"{type(error).__name__}: {lines[-1].strip()[:500]}" if lines else repr(error)


def _metadata(learner: Learner) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": learner.model.parallel.groups.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _named_chunks(learner: Learner) -> list[tuple[str, Any]]:
    """Chunks by Megatron-LM's checkpoint keys: "model", or with virtual pipelining "model0", "model1" …"""
    if len(learner.model.chunks) == 1:
        return [("model", learner.model.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(learner.model.chunks)]


@torch.no_grad()
def _state(learner: Learner, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(learner)}
    if learner.model.config.lora.rank:  # the frozen weights are in the folder of model.path
        model = {key: {name: x for name, x in state.items() if IS_ADAPTER in name} for key, state in model.items()}
    # with one chunk the optimizer expects the entries themselves, with several a dict of them by chunk name
    entries = model if len(model) > 1 else model["model"]
    return {
        **model,
        "optimizer": learner.optimizer.sharded_state_dict(entries, is_loading=is_loading, metadata=metadata),
        "scheduler": learner.scheduler.state_dict(),
    }
