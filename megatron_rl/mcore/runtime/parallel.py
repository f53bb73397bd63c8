"""Create the process groups of a run from the launcher's environment variables."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from megatron_rl.config.parallel import ParallelSection
from megatron_rl.errors import ConfigError
from megatron_rl.types import ParallelContext

# seed of Megatron's dropout streams; training uses no dropout, so any value works
DROPOUT_SEED = 1234


def launcher_world(environment: Mapping[str, str] | None = None) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as set by torchrun; (0, 1, 0) without a launcher.

    Args:
        environment: environment variables; None: those of the process.

    Raises:
        ConfigError: only some of the variables are set, one is not a number, or srun started several tasks without
            setting their ranks.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1":
            raise ConfigError(
                f"srun started {tasks} tasks, but RANK and WORLD_SIZE are not set, so each would train "
                "on its own. Start one task per node, and torchrun in it."
            )
        return 0, 1, 0
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except KeyError as error:
        raise ConfigError(
            f"environment variable {error} is not set although RANK or WORLD_SIZE is. Start with torchrun."
        ) from error
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}. Start with torchrun.") from error
    return rank, world_size, local_rank


def init_parallel(config: ParallelSection) -> ParallelContext:
    """Initialise torch.distributed and build Megatron's process groups.

    Raises:
        ConfigError: the launcher's environment variables are incomplete.
    """
    rank, world_size, local_rank = launcher_world()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=config.timeout_minutes)
    if world_size == 1:
        store: distributed_c10d.Store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=distributed_c10d.PrefixStore("world", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return build_layout(config, distributed_c10d.PrefixStore("megatron_rl", store), local_rank, device)


def build_layout(
    config: ParallelSection, store: distributed_c10d.Store, local_rank: int, device: torch.device
) -> ParallelContext:
    """Build Megatron's process groups over the initialised world, and make them Megatron's current groups."""
    _restore_state(_INITIAL_STATE)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=(
            config.virtual_pipeline_parallel_size if config.virtual_pipeline_parallel_size > 1 else None
        ),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=max(1, math.ceil(config.timeout_minutes)),
    )
    model_parallel_cuda_manual_seed(DROPOUT_SEED, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        vp_size=config.virtual_pipeline_parallel_size,
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        etp_rank=groups.expt_tp.rank(),
        etp_size=groups.expt_tp.size(),
        groups=groups,
        host_group=dist.new_group(backend="gloo", timeout=timedelta(minutes=config.timeout_minutes)),
        store=store,
        record=_parallel_state(),
    )


def build_another_layout(config: ParallelSection, parallel: ParallelContext) -> ParallelContext:
    """Build another layout of the same world for another model; return ``parallel`` if the layouts are equal.

    Megatron's current groups do not change; the new layout is used inside ``in_layout``.
    """
    sizes = (parallel.tp_size, parallel.pp_size, parallel.vp_size, parallel.cp_size, parallel.ep_size)
    if (*sizes, parallel.etp_size) == (
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.virtual_pipeline_parallel_size,
        config.context_parallel_size,
        config.expert_parallel_size,
        config.expert_tensor_size,
    ):
        return parallel
    previous = _parallel_state()
    try:
        layout = build_layout(config, parallel.store, parallel.local_rank, parallel.device)
    finally:
        _restore_state(previous)
    return replace(layout, host_group=parallel.host_group)


@contextmanager
def in_layout(parallel: ParallelContext) -> Iterator[None]:
    """Make the process groups of a layout Megatron's current groups during the body.

    Megatron keeps the current groups in global variables of ``parallel_state``.
    """
    previous = _parallel_state()
    if previous["_MODEL_PARALLEL_GROUP"] is parallel.record["_MODEL_PARALLEL_GROUP"]:
        yield
        return
    _restore_state(parallel.record)
    try:
        yield
    finally:
        _restore_state(previous)


def _parallel_state() -> dict[str, Any]:
    """Copy the global variables of Megatron's ``parallel_state``."""
    return {
        name: value.copy() if isinstance(value, dict | list) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _restore_state(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(parallel_state, name, value)


_INITIAL_STATE = _parallel_state()


@contextmanager
def joined_world(config: ParallelSection) -> Iterator[ParallelContext]:
    """Join the world for the body, and leave it in any case."""
    try:
        yield init_parallel(config)
    finally:
        leave_world()


def leave_world() -> None:
    """Undo ``init_parallel``, even if it failed part of the way."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_layout(parallel: ParallelContext) -> str:
    """Format the parallel sizes; VPP, CP and EP only if they are larger than 1."""
    chunks = f" (VPP{parallel.vp_size})" if parallel.vp_size > 1 else ""
    context = f" x CP{parallel.cp_size}" if parallel.cp_size > 1 else ""
    experts = f", EP{parallel.ep_size}" if parallel.ep_size > 1 else ""
    return f"TP{parallel.tp_size} x PP{parallel.pp_size}{chunks}{context} x DP{parallel.dp_size}{experts}"
