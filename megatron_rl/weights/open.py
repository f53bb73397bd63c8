"""Open a model folder of whichever kind."""

import json
from pathlib import Path

from megatron_rl.errors import ConversionError
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.layout import LayoutTable
from megatron_rl.weights.megatron_files import MegatronReader, find_distributed_checkpoint
from megatron_rl.weights.reader import WeightReader


def open_weights(folder: str | Path, table: LayoutTable) -> WeightReader:
    """The safetensors of a Hugging Face folder, or a Megatron distributed checkpoint.

    Args:
        table: layout at tensor parallel size 1.

    Raises:
        ConversionError: there is neither, or it is incomplete or damaged.
    """
    if find_distributed_checkpoint(Path(folder)) is not None:
        return MegatronReader(folder, table)
    return HFReader(folder)


def find_model_folder(checkpoint: Path) -> Path:
    """The folder with config.json and tokenizer of a Megatron checkpoint.

    Raises:
        ConversionError: neither the checkpoint nor the run that saved it has one.
    """
    if (checkpoint / "config.json").exists():
        return checkpoint
    for folder in (checkpoint, checkpoint.parent):
        trainer = folder / "trainer.json"
        if trainer.exists():
            found = Path(json.loads(trainer.read_text())["config"]["model.path"])
            if (found / "config.json").exists():
                return found
    raise ConversionError(
        f"{checkpoint} has no config.json, which decides the architecture, or does not exist. Give a Hugging Face "
        "folder; a conversion takes one with config.json and tokenizer alone by --config."
    )
