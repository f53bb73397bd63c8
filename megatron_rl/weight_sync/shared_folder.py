"""Parameters of other ranks read from files: for where ranks cannot reach each other's memory."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import WeightSyncError
from megatron_rl.weight_sync.host_memory import Neighbours
from megatron_rl.weights.layout import Box, box_index


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    name: str

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box; only its bytes are read where they are in one run.

        Raises:
            WeightSyncError: the file is gone or damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                into.copy_(file.get_slice(self.name)[box_index(box)])
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(f"{self.path} cannot be read: {error}. Is weight_sync.folder shared?") from error


@contextmanager
def meet_in(
    folder: Path, identity: str, parameters: Mapping[str, Tensor], sources: Collection[int], group: Any
) -> Iterator[Neighbours]:
    """Let the ranks that others read write their parameters into a folder that all share, until all have read them.

    Collective.

    Args:
        folder: may be shared with other runs.
        identity: of this run, in the names of its files.
        parameters, sources, group: as of ``meet_neighbours``.

    Raises:
        WeightSyncError: on every rank, when one cannot write its file or see those that it reads.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (list(parameters), set(sources)), group=group)
    paths = [folder / f"{identity}_rank_{rank}.safetensors" for rank in range(len(told))]
    rank = dist.get_rank(group)
    is_read = any(rank in theirs for _, theirs in told)
    try:
        _together(lambda: _write(paths[rank], parameters if is_read else {}), group)
        _together(lambda: _look_for([paths[source] for source in sources]), group)
        yield {
            source: {name: StoredTensor(path, name) for name in names}
            for source, (path, (names, _)) in enumerate(zip(paths, told, strict=True))
        }
    finally:  # also of a rank that failed: the others wait for it here
        dist.barrier(group)
        with suppress(OSError):  # there may be none
            paths[rank].unlink()


def _write(path: Path, parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # without clones, memory that two parameters share is refused
    save_file({name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}, path)


def _look_for(paths: Collection[Path]) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} of other ranks cannot be seen here")


def _together(act: Callable[[], None], group: Any) -> None:
    """
    Raises:
        WeightSyncError: on every rank, when one could not.
    """
    failure = ""
    try:
        act()
    except (OSError, SafetensorError) as error:
        failure = f"rank {dist.get_rank(group)}: {error}"
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, failure, group=group)
    failed = [one for one in told if one]
    if failed:
        raise WeightSyncError(f"{failed[0]}. weight_sync.folder must be a folder with room that all nodes share.")
