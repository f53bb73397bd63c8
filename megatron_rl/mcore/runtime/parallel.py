"""The process groups of a run, from the launcher's environment variables."""

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

# Megatron seeds its dropout streams; this project trains without dropout, so any value serves.
DROPOUT_SEED = 1234


def launcher_world(environment: Mapping[str, str] | None = None) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) when started by hand.

    Raises:
        ConfigError: only some of the variables are set, one is not a number, or srun started several
            tasks without telling them their ranks.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1":
            raise ConfigError(
                f"srun started {tasks} tasks, but RANK and WORLD_SIZE are not set, so each would train alone. "
                "Start one task per node, and torchrun in it."
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
    """Join the world and build Megatron's process groups.

    Raises:
        ConfigError: the launcher's variables are incomplete.
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
    return split_world(config, distributed_c10d.PrefixStore("megatron_rl", store), local_rank, device)


def split_world(
    config: ParallelSection, store: distributed_c10d.Store, local_rank: int, device: torch.device
) -> ParallelContext:
    """Megatron's groups over an initialised world; from then on they are those that Megatron goes by."""
    _put_on_record(_UNSPLIT)
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
        record=_record(),
    )


def split_again(config: ParallelSection, parallel: ParallelContext) -> ParallelContext:
    """Another layout of the same world, for another model; the given one if it is the same.

    Megatron goes on with the groups that it had; those of the new layout count inside of ``in_layout``.
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
    before = _record()
    try:
        other = split_world(config, parallel.store, parallel.local_rank, parallel.device)
    finally:
        _put_on_record(before)
    return replace(other, host_group=parallel.host_group)


@contextmanager
def in_layout(parallel: ParallelContext) -> Iterator[None]:
    """Let Megatron, which keeps one record of the process groups for all, go by those of a layout for the body."""
    before = _record()
    if before["_MODEL_PARALLEL_GROUP"] is parallel.record["_MODEL_PARALLEL_GROUP"]:
        yield
        return
    _put_on_record(parallel.record)
    try:
        yield
    finally:
        _put_on_record(before)


def _record() -> dict[str, Any]:
    return {
        name: value.copy() if isinstance(value, dict | list) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _put_on_record(record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        setattr(parallel_state, name, value)


_UNSPLIT = _record()


def leave_world() -> None:
    """Undo ``init_parallel``, as far as it came."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_layout(parallel: ParallelContext) -> str:
    """The parallel sizes; of VPP, CP and EP only those that do something."""
    chunks = f" (VPP{parallel.vp_size})" if parallel.vp_size > 1 else ""
    context = f" x CP{parallel.cp_size}" if parallel.cp_size > 1 else ""
    experts = f", EP{parallel.ep_size}" if parallel.ep_size > 1 else ""
    return f"TP{parallel.tp_size} x PP{parallel.pp_size}{chunks}{context} x DP{parallel.dp_size}{experts}"
