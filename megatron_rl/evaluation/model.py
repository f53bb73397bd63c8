"""The evaluated model: loading its weights into an engine, its end-of-sequence tokens and its fingerprint."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_rl.models import ModelSpec, layout_table
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.weights.layout import hf_shapes
from megatron_rl.weights.open import open_weights
from megatron_rl.weights.reader import WeightReader

SAMPLED_BYTES = 2**20
"""Bytes that the fingerprint reads at either end of a file."""


def load_engine(engine: Engine, spec: ModelSpec, folder: str) -> None:
    """Load weights into an engine from a Hugging Face folder, a converted Megatron folder or a run's checkpoint.

    Raises:
        ConversionError: a file is missing or damaged.
        WeightSyncError: names or shapes of the tensors differ from the model's.
    """
    table = layout_table(spec, 1)
    engine.load_weights(_tensors(open_weights(folder, table), list(hf_shapes(table))), version=0)


def eos_token_ids(folder: str) -> list[int]:
    """Return eos_token_id of generation_config.json as a list; empty without that file or key."""
    path = Path(folder) / "generation_config.json"
    token_ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def fingerprint(folder: str) -> str:
    """Hash the names, sizes, and first and last MiB of the model's files; 16 hexadecimal digits.

    Equal fingerprints do not prove that all bytes are equal: that would require reading a large model completely.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _tensors(reader: WeightReader, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, reader.read(name, tuple(slice(0, size) for size in reader.shape(name)))
