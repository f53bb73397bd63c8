"""Sizes and hashes of the files of a checkpoint, so that a damaged or incomplete one is not loaded."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.errors import CheckpointError
from megatron_rl.types import ParallelContext

DIGESTS = "integrity.json"


class FileDigest(TypedDict):
    """What a file must be."""

    bytes: int
    sha256: str


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Size and hash of some files of a folder."""
    return {name: FileDigest(bytes=(folder / name).stat().st_size, sha256=_hash(folder / name)) for name in names}


def write_digests(folder: Path, seals: Mapping[str, FileDigest]) -> None:
    """Write them into the folder."""
    (folder / DIGESTS).write_text(json.dumps(dict(sorted(seals.items())), indent=1))


def verify_files(folder: Path, *, share: int, shares: int, hashes: bool) -> None:
    """Compare a folder with its seals: every size, and the hashes of one share of the files.

    Args:
        share, shares: several processes check together, each every ``shares``-th file.
        hashes: also read and hash the files.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or the seals are not there.
    """
    try:
        seals: dict[str, FileDigest] = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / DIGESTS} cannot be read: {error}. The checkpoint is incomplete; resume from another one."
        ) from error
    for place, (name, seal) in enumerate(seals.items()):
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != seal["bytes"]:
            found = "it is missing" if size is None else f"it has {size}"
            raise CheckpointError(f"{path}: expected {seal['bytes']} bytes, {found}. Resume from another checkpoint.")
        if hashes and place % shares == share and _hash(path) != seal["sha256"]:
            raise CheckpointError(f"{path}: its content has changed since it was saved. Resume from another one.")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_valid_checkpoint(latest: Path, parallel: ParallelContext, *, hashes: bool) -> tuple[Path, list[str]]:
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
        verify_files(path, share=parallel.rank, shares=parallel.world_size, hashes=hashes)
    except CheckpointError as error:
        mine = str(error)
    except OSError as error:
        mine = f"{path} cannot be read: {error}"
    return next((found for found in gather_objects(mine, parallel) if found is not None), None)
