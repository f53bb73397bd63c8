"""Read both sides of a conversion again and compare them bit for bit."""

import hashlib
from collections.abc import Mapping

import torch

from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import TensorRecord
from megatron_rl.conversion.work import Progress, row_pieces, run_units
from megatron_rl.errors import ConversionError
from megatron_rl.weights.file_bytes import bytes_of, num_bytes
from megatron_rl.weights.reader import WeightReader


def verify(
    source: WeightReader,
    target: WeightReader,
    recorded: Mapping[str, TensorRecord],
    *,
    dtype: torch.dtype | None,
    workers: int,
    ranks: Ranks,
) -> None:
    """Compare every tensor of two readers, and the second with its recorded hashes; collective.

    Args:
        recorded: every Hugging Face tensor of the target.
        dtype: what the first was converted to; None: nothing.

    Raises:
        ConversionError: naming the first tensor that differs.
    """
    names = sorted(recorded)
    if set(names) != target.names():
        odd = min(set(names) ^ target.names())
        raise ConversionError(f"{target.folder}: {odd} is recorded or stored, but not both. Convert again.")
    total = sum(num_bytes(target.shape(name), target.dtype(name)) for name in names)
    progress = Progress("verifying", total, ranks)

    def compare(place: int) -> None:
        name = names[place]
        shape, stored = target.shape(name), target.dtype(name)
        digest = hashlib.sha256()
        for first, stop in row_pieces(shape[0], num_bytes(shape[1:], stored)):
            index = (slice(first, stop),)
            found = target.read(name, index)
            wanted = source.read(name, index).to(dtype or stored)
            data = bytes_of(found)
            if wanted.dtype != found.dtype or data != bytes_of(wanted):
                raise ConversionError(
                    f"{target.folder}: {name}, rows {first} to {stop}, differs from {source.folder}. Convert again."
                )
            digest.update(data)
            progress.add(len(data))
        if digest.hexdigest() != recorded[name]["sha256"]:
            raise ConversionError(f"{target.folder}: {name} has changed since it was converted. Convert again.")

    run_units(range(len(names)), compare, workers=workers, ranks=ranks)
    progress.close()
