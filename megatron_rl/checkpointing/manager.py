"""Checkpoints of a run: whole or absent, the last few kept, a pointer to the latest.

checkpoints/step_000020/policy/        Megatron distributed checkpoint (weights, optimizer, schedule)
checkpoints/step_000020/critic/        the same of the critic, when there is one
checkpoints/step_000020/rng/           random state of every rank
checkpoints/step_000020/trainer.json   step, data position, wandb id, configuration
checkpoints/step_000020/in_flight.jsonl samples that are carried over to the next step, when there are any
checkpoints/step_000020/integrity.json sizes and hashes of all of these
checkpoints/step_000020/hf/            Hugging Face folder, when asked for; adapters are merged into it
checkpoints/step_000020/hf_critic/     the same of the critic, a sequence classification model of one label
checkpoints/step_000020/adapter/       the adapters as PEFT reads them, when there are any
checkpoints/latest                     name of the newest
references/step_000400/                Hugging Face folder of the policy that became the reference at that step
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial as partial_of
from pathlib import Path

import torch

from megatron_rl.checkpointing.export import Exporter, LearningModels
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
    """Saves and restores the models that learn and the trainer's state."""

    def __init__(self, folder: RunFolder, config: RunConfig | RewardTrainingConfig, parallel: ParallelContext) -> None:
        self._run_folder = folder
        self._folder = folder.checkpoints
        self._config = config
        self._parallel = parallel
        self._exporter = Exporter(parallel)
        self.references = ReferenceStore(folder.references, self._exporter)
        self._last: Path | None = None  # begun or restored last
        self._is_again = False  # the one before it was of the same state
        self._pending: tuple[dict[str, PendingSave], Path, Path] | None = None  # by the part of the checkpoint

    def save(
        self,
        state: TrainState,
        models: LearningModels,
        in_flight: Sequence[PartialGroup] = (),
        unlogged: Metrics | None = None,
        *,
        again: bool = False,
        exports: bool = True,
    ) -> Path:
        """Begin a checkpoint, unless it is the last one already; it appears under its name only when complete.

        Collective. With checkpoint.in_background the files are written while training goes on, and
        ``finish_if_written`` or ``finish`` completes the folder.

        Args:
            unlogged: what is known of the state's step so far, where its metrics have not been written.
            again: also when the last one is of the same step; there is more to carry over by now.
            exports: with what checkpoint.save_hf asks for. Without, where time is short, those that the last one has
                stay if it is of the same state; a later save of it adds them, or tools/convert_megatron_to_hf.py does.

        Raises:
            CheckpointError: on every rank, when it cannot be written; earlier checkpoints stay.
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
        known = None if unlogged is None else to_plain(merge(gather_objects(dict(unlogged), self._parallel)))
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
                if known is not None:
                    write_atomically(partial / UNLOGGED, json.dumps(known))
        self._is_again, self._last = self._last == final, final
        if self._config.checkpoint.in_background:
            pending = {
                part: begin_save(learner, partial / part, then=partial_of(self._seal_own, partial, part))
                for part, learner in models.learners.items()
            }
            self._pending = (pending, partial, final)
        else:
            for part, learner in models.learners.items():
                save_learner(learner, partial / part)
            self._complete(partial, final, list(models.learners))
        return final

    def finish_if_written(self) -> None:
        """Complete a checkpoint that every rank has written; collective.

        Raises:
            CheckpointError: on every rank, when it could not be written.
        """
        if self._pending is not None and not any_rank(
            not all(pending.written for pending in self._pending[0].values()), self._parallel
        ):
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is being written and complete it; collective.

        Raises:
            CheckpointError: on every rank, when it could not be written.
        """
        if self._pending is None:
            return
        (pending, partial, final), self._pending = self._pending, None
        with raise_together(self._parallel), checkpoint_errors(final):
            seals = {name: seal for one in pending.values() for name, seal in one.wait().items()}
        for part, one in pending.items():
            complete_save(one, partial / part)
        self._complete(partial, final, list(pending), seals)

    def _seal_own(self, partial: Path, part: str) -> dict[str, FileDigest]:
        """Seals of the files that this rank wrote into a part."""
        pattern = f"__{self._parallel.rank}_*"
        return digest_files(partial, [f"{part}/{path.name}" for path in (partial / part).glob(pattern)])

    def _complete(
        self, partial: Path, final: Path, parts: Sequence[str], seals: Mapping[str, FileDigest] | None = None
    ) -> None:
        """Seal what is not sealed yet and give the folder its name.

        Args:
            parts: Megatron's folders.
            seals: of what this rank wrote into them; None: not made yet.
        """
        with raise_together(self._parallel), checkpoint_errors(final):
            if seals is None:
                seals = {name: seal for part in parts for name, seal in self._seal_own(partial, part).items()}
            seals = {**seals, **digest_files(partial, [f"rng/rank_{self._parallel.rank}.pt"])}
        everyone = gather_objects(seals, self._parallel)
        with raise_together(self._parallel), checkpoint_errors(final):
            if self._parallel.is_main:
                sealed = {name: seal for part in everyone for name, seal in part.items()}
                shared = [f"{part}/{path.name}" for part in parts for path in (partial / part).iterdir()]
                kept = [name for name in ("trainer.json", IN_FLIGHT, UNLOGGED) if (partial / name).exists()]
                rest = [name for name in [*shared, *kept] if name not in sealed]
                write_digests(partial, {**sealed, **digest_files(partial, rest)})
                replace_folder(partial, final, keep=self._is_again)
                write_atomically(self._folder / LATEST, final.name)
                self._remove_old()

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """The checkpoint that a start goes on from, whose files are sound, and notes about damaged ones; collective.

        Args:
            resume: as of ``RunFolder.find_resume``; only with "auto" an earlier one takes a damaged one's place.

        Raises:
            CheckpointError, ConfigError: on every rank; none is sound, or as of ``RunFolder.find_resume``.
        """
        found: Path | None = None
        with raise_together(self._parallel):
            if self._parallel.is_main:  # others may not see yet what was written last
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

    def restore(self, path: Path, models: LearningModels) -> TrainState:
        """Continue from a checkpoint that ``find`` has found, under this run's layout; collective.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ConfigError: it belongs to a run that learns differently.
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
        """The samples that a checkpoint carries over.

        Raises:
            DataError: they cannot be read.
        """
        file = path / IN_FLIGHT
        return [group_from_json(line) for line in read_lines(file)] if file.exists() else []

    def unlogged(self, path: Path) -> dict[str, Reduction] | None:
        """Metrics of a checkpoint's step that have not been written, on the first rank; None: they have been."""
        file = path / UNLOGGED
        if not file.exists():
            return None
        return from_plain(json.loads(file.read_text())) if self._parallel.is_main else {}

    def _remove_old(self) -> None:
        """Keep the checkpoints written last, whatever their step: a run may have been resumed from an earlier one."""
        written = [path for path in self._folder.glob("step_*[0-9]") if (path / "trainer.json").exists()]
        written.sort(key=lambda path: (path / "trainer.json").stat().st_mtime_ns)
        kept = written[-self._config.checkpoint.keep_last :]
        for path in written[: -len(kept)]:
            shutil.rmtree(path)
        self.references.remove_unused(map(reference_name, kept))


def reference_name(path: Path) -> str | None:
    """What a checkpoint was learning against; None: the configuration's, or the checkpoint is damaged."""
    try:
        return TrainState(**read_trainer(path)["state"]).reference
    except CheckpointError:
        return None
