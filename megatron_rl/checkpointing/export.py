"""Write the trained models as Hugging Face and PEFT folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_rl.checkpointing.folder import checkpoint_errors, replace_folder
from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.models import as_value_model, read_hf_config
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import write_hf_folder
from megatron_rl.weights.peft_files import write_peft_folder


class Export(NamedTuple):
    """A model to write as a Hugging Face folder."""

    model: ShardedModel
    config: Mapping[str, Any] | None
    """Content of config.json; None: that of the folder that the model was loaded from."""


class TrainedModels(Protocol):
    """The models of a run that a checkpoint saves."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Models with optimizers, by the name of their subfolder of a checkpoint."""
        ...

    @property
    def exports(self) -> Mapping[str, Export]:
        """Models to write as Hugging Face folders, by the name of that folder in a checkpoint."""
        ...

    @property
    def adapters(self) -> LoraAdapters | None:
        """The LoRA adapters that are trained instead of a model's weights; None without LoRA."""
        ...


def value_export(model: ShardedModel) -> Export:
    """Export of a model with a value head, as a sequence classification model with one label."""
    return Export(model, as_value_model(read_hf_config(model.config.model.path)))


class Exporter:
    """Writes folders that Hugging Face and PEFT read; every method is collective.

    Every method raises CheckpointError on every rank when a folder cannot be written.
    """

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel

    def write_all(self, models: TrainedModels, folder: Path) -> None:
        """Write every export into a checkpoint that is not complete yet."""
        for name, (model, config) in models.exports.items():
            self._write(model, folder / name, config)

    def add_missing(self, models: TrainedModels, folder: Path) -> None:
        """Add the exports that a complete checkpoint was saved without."""
        existing = [name for name in models.exports if (folder / name).exists()]
        for name in sorted(set(models.exports).difference(gather_objects(existing, self._parallel)[0])):
            model, config = models.exports[name]
            self.write(model, folder / name, config)

    def write(self, model: ShardedModel, final: Path, config: Mapping[str, Any] | None = None) -> None:
        """Write one model; the folder appears under its name only when it is complete.

        Args:
            config: content of config.json; None: that of the folder that the model was loaded from.
        """
        partial = final.with_name(final.name + ".partial")
        with raise_together(self._parallel), checkpoint_errors(final):
            if self._parallel.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.parent.mkdir(parents=True, exist_ok=True)
        self._write(model, partial, config)
        with raise_together(self._parallel), checkpoint_errors(final):
            if self._parallel.is_main:
                replace_folder(partial, final)

    def _write(self, model: ShardedModel, folder: Path, config: Mapping[str, Any] | None) -> None:
        with raise_together(self._parallel), checkpoint_errors(folder):
            if not model.is_in_first_replica:
                return
            tensors = model.export()
            try:
                if self._parallel.is_main:
                    write_hf_folder(folder, tensors, like=model.config.model.path, config=config)
            finally:
                for _ in tensors:  # the export is collective: every rank of the replica must iterate to its end
                    pass

    def write_adapters(self, adapters: LoraAdapters, folder: Path, base: str) -> None:
        """Write a PEFT folder.

        Args:
            base: folder of the base model of the adapters.
        """
        config = adapters.config
        with raise_together(self._parallel), checkpoint_errors(folder):
            if not adapters.is_in_first_replica:
                return
            tensors = [(name, tensor.clone()) for name, tensor in adapters.export()]
            if self._parallel.is_main:
                write_peft_folder(
                    folder, tensors, base=base, rank=config.rank, alpha=config.alpha, targets=config.targets
                )
