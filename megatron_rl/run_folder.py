"""The folder of a run: what is in it, and whether a start resumes, begins or is refused."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig, dump_config
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.errors import CheckpointError, ConfigError

LATEST = "latest"


class RunFolder:
    """Names of the files of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.rollouts = self.path / "rollouts"
        self.report = self.path / "report.html"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.references = self.path / "references"

    def check_writable(self) -> None:
        """Refuse early, before anything is built and without creating anything.

        Raises:
            ConfigError: the folder could not be created or written.
        """
        ancestor = self.path
        while not ancestor.exists() and ancestor != ancestor.parent:
            ancestor = ancestor.parent
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise ConfigError(
                f"run.output_dir={self.path}: {ancestor} is not a writable folder. Choose another run.output_dir."
            )

    def create(self, config: RunConfig | RewardTrainingConfig) -> None:
        """Make the folder and write the resolved configuration.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, dump_config(config))
        except OSError as error:
            raise ConfigError(
                f"run.output_dir={self.path}: {error.strerror or error}. Choose another run.output_dir."
            ) from error

    def find_resume(self, resume: str) -> Path | None:
        """The checkpoint to continue from; None to begin.

        Args:
            resume: "auto": the latest of this folder, if any; "never": begin, and refuse a folder
                that holds a run already; otherwise the path of a checkpoint or of a run folder.

        Raises:
            ConfigError: "never" on a used folder.
            CheckpointError: nothing to resume at the path.
        """
        if resume == "auto":
            return latest_checkpoint(self.checkpoints)
        if resume == "never":
            if self.metrics.exists() or latest_checkpoint(self.checkpoints) is not None:
                raise ConfigError(
                    f"run.output_dir={self.path} holds a run already and --resume never was given. "
                    "Choose another run.output_dir, or --resume auto."
                )
            return None
        path = Path(resume)
        found = path if (path / "trainer.json").exists() else latest_checkpoint(path / "checkpoints")
        if found is None:
            raise CheckpointError(
                f"--resume {resume}: no checkpoint there. Give a run folder or one of its checkpoints/step_N."
            )
        return found

    def append_samples(self, samples: Iterable[Any]) -> None:
        """Add evaluated samples (dataclasses) for the report."""
        with self.samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(asdict(sample)) + "\n")


def latest_checkpoint(folder: Path) -> Path | None:
    """What the pointer names, be it there or not."""
    pointer = folder / LATEST
    return folder / pointer.read_text().strip() if pointer.exists() else None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that it is either the old or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
