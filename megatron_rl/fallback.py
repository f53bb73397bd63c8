"""Which checkpoint a run goes on from when its latest one is damaged."""

from pathlib import Path

from megatron_rl.collective import gather_objects
from megatron_rl.errors import CheckpointError
from megatron_rl.integrity import check_seals
from megatron_rl.types import ParallelContext


def newest_sound(latest: Path, parallel: ParallelContext, *, hashes: bool) -> tuple[Path, list[str]]:
    """The latest checkpoint or, where that is damaged, the one before, and so on; collective.

    Args:
        hashes: also read and hash the files, each rank its share.

    Returns:
        the checkpoint, and what is wrong with each later one.

    Raises:
        CheckpointError: on every rank, when all of them are damaged.
    """
    there = sorted((path for path in latest.parent.glob("step_??????") if path.name < latest.name), reverse=True)
    earlier = gather_objects(there, parallel)[0]  # not all ranks may see the same, on a file system with a cache
    notes: list[str] = []
    for path in (latest, *earlier):
        damage = _damage(path, parallel, hashes=hashes)
        if damage is None:
            return path, notes
        notes.append(f"CHECKPOINT {path.name} IS DAMAGED and was passed over: {damage}")
    raise CheckpointError(f"{latest.parent}: no checkpoint is sound. {' '.join(notes)}")


def _damage(path: Path, parallel: ParallelContext, *, hashes: bool) -> str | None:
    """What any rank finds wrong; None: nothing."""
    mine: str | None = None
    try:
        check_seals(path, share=parallel.rank, shares=parallel.world_size, hashes=hashes)
    except CheckpointError as error:
        mine = str(error)
    except OSError as error:
        mine = f"{path} cannot be read: {error}"
    return next((found for found in gather_objects(mine, parallel) if found is not None), None)
