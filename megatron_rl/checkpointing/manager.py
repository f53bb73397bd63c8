"""Save and restore the checkpoints of a run. A checkpoint is complete or absent; the last few are kept.

checkpoints/step_000020/policy/        Megatron distributed checkpoint (weights, optimizer, schedule)
checkpoints/step_000020/critic/        the same for the critic, if there is one
checkpoints/step_000020/rng/           random state of every rank
checkpoints/step_000020/trainer.json   step, data position, wandb id, configuration
checkpoints/step_000020/in_flight.jsonl partial groups that are carried over to the next step, if there are any
checkpoints/step_000020/unlogged.json  metrics of the step, if they have not been logged yet
checkpoints/step_000020/integrity.json sizes and hashes of all files above
checkpoints/step_000020/hf/            Hugging Face folder if checkpoint.save_hf is set; adapters are merged into it
checkpoints/step_000020/hf_critic/     the same for the critic, as a sequence classification model with one label
checkpoints/step_000020/adapter/       PEFT folder of the LoRA adapters, if there are any
checkpoints/latest                     name of the latest checkpoint
references/step_000400/                Hugging Face folder of the policy that became the reference at that step
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial as partial_of
from pathlib import Path

import torch

from megatron_rl.checkpointing.export import Exporter, TrainedModels
from megatron_rl.checkpointing.folder import (
    IN_FLIGHT,
    UNLOGGED,
    checkpoint_errors,
    put_back,
    random_state,
    replace_folder,
    set_random_state,
)
from megatron_rl.checkpointing.integrity import (
    FileDigest,
    digest_files,
    latest_valid_checkpoint,
    verify_files,
    write_digests,
)
from megatron_rl.checkpointing.references import ReferenceStore
from megatron_rl.checkpointing.resume import check_resumable, flatten_plain, read_trainer
from megatron_rl.config import RunConfig
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.distributed.collectives import any_rank, barrier, gather_objects, raise_together
from megatron_rl.errors import CheckpointError
from megatron_rl.mcore.async_save import PendingSave
from megatron_rl.mcore.checkpoint import begin_save, complete_save, load_learner, save_learner
from megatron_rl.metrics.metric import Metrics, Reduction, from_plain, merge, to_plain
from megatron_rl.rollout.partial import PartialGroup
from megatron_rl.rollout.serialization import group_from_json, group_to_json, read_lines, write_lines
from megatron_rl.run_folder import LATEST, RunFolder, write_atomically
from megatron_rl.types import ParallelContext, TrainState


class CheckpointManager:
    """Saves and restores the trained models and the trainer's state."""

    def __init__(self, folder: RunFolder, config: RunConfig | RewardTrainingConfig, parallel: ParallelContext) -> None:
        self._run_folder = folder
        self._folder = folder.checkpoints
        self._config = config
        self._parallel = parallel
        self._exporter = Exporter(parallel)
        self.references = ReferenceStore(folder.references, self._exporter)
        self._last: Path | None = None  # the checkpoint that was begun or restored last
        self._is_resave = False  # the checkpoint before it was of the same step
        # saves by subfolder, partial folder and final folder of the checkpoint that is being written
        self._pending: tuple[dict[str, PendingSave], Path, Path] | None = None

    def save(
        self,
        state: TrainState,
        models: TrainedModels,
        in_flight: Sequence[PartialGroup] = (),
        unlogged: Metrics | None = None,
        *,
        again: bool = False,
        exports: bool = True,
    ) -> Path:
        """Begin a checkpoint unless the last one is of the same step; it gets its final name only when complete.

        Collective. With checkpoint.in_background the files are written while training goes on, and
        ``finish_if_written`` or ``finish`` completes the folder.

        Args:
            in_flight: partial groups to carry over to the next step.
            unlogged: metrics of the state's step so far, if they have not been logged yet.
            again: save even if the last checkpoint is of the same step, because there is more to carry over by now.
            exports: write the exports that checkpoint.save_hf requests. If False, because time is short, the exports of
                the last checkpoint stay if it is of the same step; a later save of the same step, or
                tools/convert_megatron_to_hf.py, adds missing ones.

        Raises:
            CheckpointError: on every rank, if it cannot be written; earlier checkpoints stay.
        """
        self.finish()
        final = self._folder / f"step_{state.step:06d}"
        if self._last == final and not again:
            if self._config.checkpoint.save_hf and exports:
                self._exporter.add_missing(models, final)
            return final
        partial = final.with_name(final.name + ".partial")
        with raise_together(self._parallel), checkpoint_errors(final):
            if self._parallel.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                for part in ("rng", *models.learners):
                    (partial / part).mkdir(parents=True)
        if self._config.checkpoint.save_hf and exports:
            self._exporter.write_all(models, partial)
        if models.adapters is not None:
            self._exporter.write_adapters(models.adapters, partial / "adapter", self._config.model.path)
        plain_metrics = None if unlogged is None else to_plain(merge(gather_objects(dict(unlogged), self._parallel)))
        with raise_together(self._parallel), checkpoint_errors(final):
            torch.save(random_state(), partial / "rng" / f"rank_{self._parallel.rank}.pt")
            if self._parallel.is_main:
                trainer = {
                    "state": asdict(state),
                    "config": flatten_plain(self._config),
                    "world_size": self._parallel.world_size,
                }
                write_atomically(partial / "trainer.json", json.dumps(trainer, indent=2))
                if in_flight:
                    write_lines(partial / IN_FLIGHT, [group_to_json(group) for group in in_flight])
                if plain_metrics is not None:
                    write_atomically(partial / UNLOGGED, json.dumps(plain_metrics))
        self._is_resave, self._last = self._last == final, final
        if self._config.checkpoint.in_background:
            pending = {
                part: begin_save(learner, partial / part, on_written=partial_of(self._digest_own_files, partial, part))
                for part, learner in models.learners.items()
            }
            self._pending = (pending, partial, final)
        else:
            for part, learner in models.learners.items():
                save_learner(learner, partial / part)
            self._complete(partial, final, list(models.learners))
        return final

    def finish_if_written(self) -> None:
        """Complete the pending checkpoint if every rank has written its files; collective.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        if self._pending is not None and not any_rank(
            not all(pending.written for pending in self._pending[0].values()), self._parallel
        ):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and complete it; collective.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        if self._pending is None:
            return
        (pending, partial, final), self._pending = self._pending, None
        with raise_together(self._parallel), checkpoint_errors(final):
            digests = {name: digest for save in pending.values() for name, digest in save.wait().items()}
        for part, save in pending.items():
            complete_save(save, partial / part)
        self._complete(partial, final, list(pending), digests)

    def _digest_own_files(self, partial: Path, part: str) -> dict[str, FileDigest]:
        """Digests of the files that this rank wrote into a subfolder."""
        pattern = f"__{self._parallel.rank}_*"
        return digest_files(partial, [f"{part}/{path.name}" for path in (partial / part).glob(pattern)])

    def _complete(
        self, partial: Path, final: Path, parts: Sequence[str], digests: Mapping[str, FileDigest] | None = None
    ) -> None:
        """Add the missing digests and give the folder its final name; collective.

        Args:
            parts: names of the subfolders that Megatron wrote.
            digests: digests of the files that this rank wrote into them; None: not computed yet.
        """
        with raise_together(self._parallel), checkpoint_errors(final):
            if digests is None:
                digests = {
                    name: digest for part in parts for name, digest in self._digest_own_files(partial, part).items()
                }
            digests = {**digests, **digest_files(partial, [f"rng/rank_{self._parallel.rank}.pt"])}
        gathered = gather_objects(digests, self._parallel)
        with raise_together(self._parallel), checkpoint_errors(final):
            if self._parallel.is_main:
                all_digests = {name: digest for part in gathered for name, digest in part.items()}
                shared = [f"{part}/{path.name}" for part in parts for path in (partial / part).iterdir()]
                kept = [name for name in ("trainer.json", IN_FLIGHT, UNLOGGED) if (partial / name).exists()]
                rest = [name for name in [*shared, *kept] if name not in all_digests]
                write_digests(partial, {**all_digests, **digest_files(partial, rest)})
                replace_folder(partial, final, keep=self._is_resave)
                write_atomically(self._folder / LATEST, final.name)
                self._remove_old()

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to resume from, verify it, and note damaged ones; collective.

        Args:
            resume: as in ``RunFolder.find_resume``; only "auto" falls back to an earlier checkpoint if one is damaged.

        Returns:
            The checkpoint, None for a new run; and notes about damaged later checkpoints.

        Raises:
            CheckpointError, ConfigError: on every rank; no checkpoint is valid, or as in ``RunFolder.find_resume``.
        """
        found: Path | None = None
        with raise_together(self._parallel):
            if self._parallel.is_main:  # other ranks may not see the latest files yet
                with checkpoint_errors(self._folder):
                    put_back(self._folder)
                found = self._run_folder.find_resume(resume)
        path = gather_objects(found, self._parallel)[0]
        if path is None:
            return None, []
        hashes = self._config.checkpoint.verify
        if resume == "auto":
            return latest_valid_checkpoint(path, self._parallel, hashes=hashes)
        with raise_together(self._parallel):
            verify_files(path, share=self._parallel.rank, shares=self._parallel.world_size, hashes=hashes)
        return path, []

    def restore(self, path: Path, models: TrainedModels) -> TrainState:
        """Load a checkpoint that ``find`` returned into this run's layout; collective.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ConfigError: a key differs that changes the training result.
        """
        with raise_together(self._parallel):
            trainer = check_resumable(path, self._config)
        state = TrainState(**trainer["state"])
        with raise_together(self._parallel), checkpoint_errors(path):
            if self._parallel.is_main:
                self.references.fetch(state, path)
        for part, learner in models.learners.items():
            load_learner(learner, path / part)
        saved = path / "rng" / f"rank_{self._parallel.rank}.pt"
        if trainer["world_size"] == self._parallel.world_size and saved.exists():
            set_random_state(torch.load(saved, weights_only=True))
        barrier(self._parallel)
        self._last = path
        return state

    def in_flight(self, path: Path) -> list[PartialGroup]:
        """The partial groups that a checkpoint carries over to the next step.

        Raises:
            DataError: the file cannot be read.
        """
        file = path / IN_FLIGHT
        return [group_from_json(line) for line in read_lines(file)] if file.exists() else []

    def unlogged(self, path: Path) -> dict[str, Reduction] | None:
        """Metrics of a checkpoint's step, on the first rank, empty on the others; None if they have been logged."""
        file = path / UNLOGGED
        if not file.exists():
            return None
        return from_plain(json.loads(file.read_text())) if self._parallel.is_main else {}

    def _remove_old(self) -> None:
        """Keep the checkpoints written last, not those of the highest steps: a run may resume from an earlier step."""
        written = [path for path in self._folder.glob("step_*[0-9]") if (path / "trainer.json").exists()]
        written.sort(key=lambda path: (path / "trainer.json").stat().st_mtime_ns)
        kept = written[-self._config.checkpoint.keep_last :]
        for path in written[: -len(kept)]:
            shutil.rmtree(path)
        self.references.remove_unused(map(_reference_name, kept))


def _reference_name(path: Path) -> str | None:
    """Name of a checkpoint's reference model; None: the configuration's, or the checkpoint is damaged."""
    try:
        return TrainState(**read_trainer(path)["state"]).reference
    except CheckpointError:
        return None
