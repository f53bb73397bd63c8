"""Reference models that a run stores when it resets its reference to the current policy."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megatron_rl.checkpointing.export import Exporter
from megatron_rl.errors import CheckpointError
from megatron_rl.mcore.policy import Policy
from megatron_rl.types import TrainState


class ReferenceStore:
    """The folder references/step_N: Hugging Face folders of the policies that became the reference at step N."""

    def __init__(self, folder: Path, exporter: Exporter) -> None:
        self._folder = folder
        self._exporter = exporter
        self._latest: str | None = None  # not yet named by a checkpoint

    def keep(self, state: TrainState, policy: Policy) -> TrainState:
        """Write the policy as the reference of the following steps; collective.

        Returns:
            The state with the name of the new reference.

        Raises:
            CheckpointError: on every rank, if the reference cannot be written.
        """
        name = f"step_{state.step:06d}"
        self._exporter.write(policy, self._folder / name)
        self._latest = name
        return replace(state, reference=name)

    def path_of(self, state: TrainState) -> str | None:
        """Folder of a state's reference; None: the reference of the configuration."""
        return None if state.reference is None else str(self._folder / state.reference)

    def fetch(self, state: TrainState, checkpoint: Path) -> None:
        """Copy the reference of a checkpoint of another run into this run; on the first rank only.

        Raises:
            CheckpointError: the reference no longer exists.
        """
        if state.reference is None or (self._folder / state.reference).exists():
            return
        source = checkpoint.resolve().parents[1] / self._folder.name / state.reference
        if not source.is_dir():
            raise CheckpointError(
                f"{checkpoint} was trained against the reference {source}, which no longer exists. Restore it, or "
                "resume from a later checkpoint."
            )
        partial = self._folder / f"{state.reference}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        os.replace(partial, self._folder / state.reference)

    def remove_unused(self, used: Iterable[str | None]) -> None:
        """Remove the references that no checkpoint names."""
        needed = {self._latest, *used}
        for path in self._folder.glob("step_*[0-9]"):
            if path.name not in needed:
                shutil.rmtree(path)
