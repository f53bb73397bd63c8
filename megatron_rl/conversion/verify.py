"""Verify a conversion: read input and output again and compare them bit for bit."""

import hashlib
from collections.abc import Mapping

import torch

from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import RECORD, TensorRecord
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
    """Compare every tensor of the target with the source and with its recorded hash; collective.

    Args:
        source: reader of the input.
        target: reader of the output.
        recorded: records of every Hugging Face tensor of the target.
        dtype: dtype that the source was converted to; None: unchanged.
        workers: threads of each rank.

    Raises:
        ConversionError: a tensor differs; the message names it.
    """
    names = sorted(recorded)
    if set(names) != target.names():
        unmatched = min(set(names) ^ target.names())
        raise ConversionError(
            f"{target.folder}: {unmatched} is either in {RECORD} or stored, but not both. Convert again."
        )
    total = sum(num_bytes(target.shape(name), target.dtype(name)) for name in names)
    progress = Progress("verifying", total, ranks)

    def compare(index: int) -> None:
        name = names[index]
        shape, stored = target.shape(name), target.dtype(name)
        digest = hashlib.sha256()
        for first, stop in row_pieces(shape[0], num_bytes(shape[1:], stored)):
            rows = (slice(first, stop),)
            actual = target.read(name, rows)
            expected = source.read(name, rows).to(dtype or stored)
            data = bytes_of(actual)
            if expected.dtype != actual.dtype or data != bytes_of(expected):
                raise ConversionError(
                    f"{target.folder}: {name}, rows {first} to {stop}, differs from {source.folder}. Convert again."
                )
            digest.update(data)
            progress.add(len(data))
        if digest.hexdigest() != recorded[name]["sha256"]:
            raise ConversionError(f"{target.folder}: {name} has changed since the conversion. Convert again.")

    run_units(range(len(names)), compare, workers=workers, ranks=ranks)
    progress.close()
