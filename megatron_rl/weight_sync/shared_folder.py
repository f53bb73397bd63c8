"""Read parameters of other ranks from files in a shared folder, where ranks cannot reach each other's memory."""

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
from megatron_rl.weight_sync.host_memory import PeerParameters
from megatron_rl.weights.layout import Box, box_index


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box; a contiguous box reads only its own bytes.

        Raises:
            WeightSyncError: the file is missing or damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                into.copy_(file.get_slice(self.name)[box_index(box)])
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(
                f"{self.path} cannot be read: {error}. Check that all nodes share weight_sync.folder."
            ) from error


@contextmanager
def expose_in_folder(
    folder: Path, identity: str, parameters: Mapping[str, Tensor], sources: Collection[int], group: Any
) -> Iterator[PeerParameters]:
    """Write the parameters that other ranks read to files in a shared folder; collective.

    Yields the parameters of every rank. The files are deleted at the end of the context, after a barrier.

    Args:
        folder: folder that all ranks share; other runs may use it too.
        identity: identifier of this run, part of its file names.
        parameters, sources, group: as for ``expose_host_memory``.

    Raises:
        WeightSyncError: on every rank, if one cannot write its file or see the files that it reads.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (list(parameters), set(sources)), group=group)
    paths = [folder / f"{identity}_rank_{rank}.safetensors" for rank in range(len(gathered))]
    rank = dist.get_rank(group)
    is_read = any(rank in sources_of_peer for _, sources_of_peer in gathered)
    try:
        _raise_together(lambda: _write(paths[rank], parameters if is_read else {}), group)
        _raise_together(lambda: _check_exist([paths[source] for source in sources]), group)
        yield {
            source: {name: StoredTensor(path, name) for name in names}
            for source, (path, (names, _)) in enumerate(zip(paths, gathered, strict=True))
        }
    finally:  # also after a failure, because the other ranks wait in the barrier
        dist.barrier(group)
        with suppress(OSError):  # the file may not exist
            paths[rank].unlink()


def _write(path: Path, parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # cloned because safetensors rejects tensors that share memory
    save_file({name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}, path)


def _check_exist(paths: Collection[Path]) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}, written by other ranks, cannot be found on this rank")


def _raise_together(act: Callable[[], None], group: Any) -> None:
    """Call a function on every rank.

    Raises:
        WeightSyncError: on every rank, if the function fails on one.
    """
    failure = ""
    try:
        act()
    except (OSError, SafetensorError) as error:
        failure = f"rank {dist.get_rank(group)}: {error}"
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, failure, group=group)
    failures = [failure for failure in gathered if failure]
    if failures:
        raise WeightSyncError(
            f"{failures[0]}. weight_sync.folder must be a folder with enough free space that all nodes share."
        )
