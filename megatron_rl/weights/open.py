"""Open a model folder in Hugging Face or Megatron format."""

import json
from pathlib import Path

from megatron_rl.errors import ConversionError
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.layout import LayoutTable
from megatron_rl.weights.megatron_files import MegatronReader, find_distributed_checkpoint
from megatron_rl.weights.reader import WeightReader


def open_weights(folder: str | Path, table: LayoutTable) -> WeightReader:
    """Open the safetensors of a Hugging Face folder, or a Megatron distributed checkpoint.

    Args:
        table: layout at tensor parallel size 1.

    Raises:
        ConversionError: the folder has neither, or they are incomplete or damaged.
    """
    if find_distributed_checkpoint(Path(folder)) is not None:
        return MegatronReader(folder, table)
    return HFReader(folder)


def find_model_folder(checkpoint: Path) -> Path:
    """Return the folder with the config.json and tokenizer of a Megatron checkpoint.

    Raises:
        ConversionError: neither the checkpoint nor the run that saved it has one.
    """
    if (checkpoint / "config.json").exists():
        return checkpoint
    for folder in (checkpoint, checkpoint.parent):
        trainer = folder / "trainer.json"
        if trainer.exists():
            model = Path(json.loads(trainer.read_text())["config"]["model.path"])
            if (model / "config.json").exists():
                return model
    raise ConversionError(
        f"{checkpoint} does not exist or has no config.json, which defines the architecture. Give a Hugging Face "
        "folder; for a conversion, --config may name one that has only config.json and tokenizer."
    )
