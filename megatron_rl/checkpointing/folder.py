"""Checkpoint folders: atomic replacement, RNG states, error messages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_rl.errors import CheckpointError, ConversionError

IN_FLIGHT = "in_flight.jsonl"
"""File of the partial groups that are carried over to the next step."""
UNLOGGED = "unlogged.json"
"""File of the metrics of the checkpoint's step, if they have not been logged yet."""
REPLACED = ".replaced"
"""Suffix of an old checkpoint while a new one of the same name takes its place."""


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn I/O and conversion errors of the body into a CheckpointError that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ConversionError) as error:  # torch.save raises RuntimeError on a full disk
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error}. Earlier checkpoints are intact; free disk space and resume."
        ) from error


def replace_folder(new: Path, final: Path, *, keep: bool = False) -> None:
    """Rename ``new`` to ``final``; an existing ``final`` is removed only afterwards.

    Args:
        keep: keep the subfolders that only the old ``final`` has.
    """
    old = final.with_name(final.name + REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    if keep and old.exists():
        for kept in (path for path in old.iterdir() if path.is_dir() and not (final / path.name).exists()):
            os.replace(kept, final / kept.name)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo every ``replace_folder`` during which the process was killed."""
    for old in folder.glob(f"step_??????{REPLACED}"):
        final = old.with_name(old.name.removesuffix(REPLACED))
        if not final.exists():
            os.replace(old, final)


def random_state() -> dict[str, torch.Tensor]:
    """RNG states of torch on this rank, under the keys ``cpu`` and ``cuda``."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Set the RNG states that ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
