"""Sizes and hashes of the files of a checkpoint, to detect a damaged or incomplete one before it is loaded."""

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
    """Expected size and hash of a file."""

    bytes: int
    sha256: str


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Compute the digests of the named files of a folder."""
    return {name: FileDigest(bytes=(folder / name).stat().st_size, sha256=_hash(folder / name)) for name in names}


def write_digests(folder: Path, digests: Mapping[str, FileDigest]) -> None:
    """Write digests to integrity.json in the folder."""
    (folder / DIGESTS).write_text(json.dumps(dict(sorted(digests.items())), indent=1))


def verify_files(folder: Path, *, share: int, shares: int, hashes: bool) -> None:
    """Compare the files of a folder with its digests: all sizes, and the hashes of one share of the files.

    Args:
        share, shares: index and number of the processes that check together; each hashes every ``shares``-th file.
        hashes: also read and hash the files.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the digests cannot be read.
    """
    try:
        digests: dict[str, FileDigest] = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / DIGESTS} cannot be read: {error}. The checkpoint is incomplete; resume from another one."
        ) from error
    for index, (name, digest) in enumerate(digests.items()):
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != digest["bytes"]:
            found = "it is missing" if size is None else f"it has {size}"
            raise CheckpointError(f"{path}: expected {digest['bytes']} bytes, {found}. Resume from another checkpoint.")
        if hashes and index % shares == share and _hash(path) != digest["sha256"]:
            raise CheckpointError(
                f"{path}: its content has changed since it was saved. Resume from another checkpoint."
            )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_valid_checkpoint(latest: Path, parallel: ParallelContext, *, hashes: bool) -> tuple[Path, list[str]]:
    """The latest checkpoint that is not damaged, and notes about damaged later ones; collective.

    Args:
        latest: the checkpoint to begin with.
        hashes: also read and hash the files, each rank its share.

    Returns:
        The checkpoint, and for each later one a note that says what is wrong with it.

    Raises:
        CheckpointError: on every rank, if all checkpoints are damaged.
    """
    older = sorted((path for path in latest.parent.glob("step_??????") if path.name < latest.name), reverse=True)
    earlier = gather_objects(older, parallel)[0]  # ranks may see different folders on a file system with a cache
    notes: list[str] = []
    for path in (latest, *earlier):
        damage = _damage(path, parallel, hashes=hashes)
        if damage is None:
            return path, notes
        notes.append(f"CHECKPOINT {path.name} IS DAMAGED and was passed over: {damage}")
    raise CheckpointError(f"{latest.parent}: no checkpoint is valid. {' '.join(notes)}")


def _damage(path: Path, parallel: ParallelContext, *, hashes: bool) -> str | None:
    """What the first rank that finds damage reports; None if the checkpoint is valid."""
    damage: str | None = None
    try:
        verify_files(path, share=parallel.rank, shares=parallel.world_size, hashes=hashes)
    except CheckpointError as error:
        damage = str(error)
    except OSError as error:
        damage = f"{path} cannot be read: {error}"
    return next((report for report in gather_objects(damage, parallel) if report is not None), None)
