"""The folder of a run: its files, and the checkpoint that a start resumes from."""

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
    """Paths of the files of a run."""

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
        """Check that the folder can be created and written, without creating anything.

        Raises:
            ConfigError: it cannot.
        """
        ancestor = self.path
        while not ancestor.exists() and ancestor != ancestor.parent:
            ancestor = ancestor.parent
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise ConfigError(
                f"run.output_dir={self.path}: {ancestor} is not a writable folder. Choose another run.output_dir."
            )

    def create(self, config: RunConfig | RewardTrainingConfig) -> None:
        """Create the folder and write the resolved configuration.

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
        """Return the checkpoint to resume from; None: start a new run.

        Args:
            resume: "auto": the latest checkpoint in this folder, if any; "never": start a new run; otherwise the path
                of a checkpoint or of a run folder.

        Raises:
            ConfigError: "never", and the folder holds a run already.
            CheckpointError: there is no checkpoint at the path.
        """
        if resume == "auto":
            return latest_checkpoint(self.checkpoints)
        if resume == "never":
            if self.metrics.exists() or latest_checkpoint(self.checkpoints) is not None:
                raise ConfigError(
                    f"run.output_dir={self.path} holds a run already, and --resume is never. "
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
        """Append validation samples (dataclasses) to the samples file, for the report."""
        with self.samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(asdict(sample)) + "\n")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that the file ``latest`` names, whether it exists or not; None without that file."""
    pointer = folder / LATEST
    return folder / pointer.read_text().strip() if pointer.exists() else None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old or the new content, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
