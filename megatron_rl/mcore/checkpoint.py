"""A model and its optimizer in Megatron's distributed checkpoint format, loadable under another layout."""

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

# newer releases take their writers from another package unless told otherwise
_OWN_WRITERS = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def save_learner(learner: Learner, folder: Path) -> None:
    """Write weights, optimizer and schedule into an existing empty folder; collective.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _errors_name(folder), in_layout(learner.model.parallel):
        _save(learner, folder, in_background=False)


def begin_save(learner: Learner, folder: Path, then: Callable[[], Any]) -> PendingSave:
    """As ``save_learner``, but the files are written while the model goes on learning; collective.

    Args:
        then: called once this rank's files are written.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _errors_name(folder), in_layout(learner.model.parallel):
        return PendingSave(_save(learner, folder, in_background=True), then)


def complete_save(pending: PendingSave, folder: Path) -> None:
    """Complete the folder that every rank has written; collective.

    Raises:
        CheckpointError: the folder could not be written.
    """
    with _errors_name(folder):
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
def _errors_name(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {_reason(error)}. Free space and resume.") from error


def load_learner(learner: Learner, folder: Path) -> None:
    """Restore weights, optimizer and schedule, under any layout; collective.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another model.
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
    """What happened, in a line: torch's CheckpointException carries whole tracebacks of the ranks."""
    lines = str(error).split("\n")
    said = [line for line in lines if line.strip(" .")]
    return f"{type(error).__name__}: {said[-1].strip()[:500]}" if said else repr(error)


def _metadata(learner: Learner) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": learner.model.parallel.groups.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _named_chunks(learner: Learner) -> list[tuple[str, Any]]:
    """ "model", or "model0", "model1" … as Megatron-LM names the chunks of a virtual pipeline."""
    if len(learner.model.chunks) == 1:
        return [("model", learner.model.chunks[0])]
    return [(f"model{place}", chunk) for place, chunk in enumerate(learner.model.chunks)]


@torch.no_grad()
def _state(learner: Learner, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    model = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(learner)}
    if learner.model.config.lora.rank:  # what is frozen is in the model's own folder
        model = {key: {name: x for name, x in state.items() if IS_ADAPTER in name} for key, state in model.items()}
    # with one chunk the optimizer expects its entries, with several those of all under their names
    entries = model if len(model) > 1 else model["model"]
    return {
        **model,
        "optimizer": learner.optimizer.sharded_state_dict(entries, is_loading=is_loading, metadata=metadata),
        "scheduler": learner.scheduler.state_dict(),
    }
