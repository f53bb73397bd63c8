"""Open a model folder of whichever kind."""

from pathlib import Path

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
