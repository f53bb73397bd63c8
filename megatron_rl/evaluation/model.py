"""The model that is asked: its weights in an engine, and what tells it apart from others."""

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


def load_engine(engine: Engine, spec: ModelSpec, folder: str) -> None:
    """Give an engine the weights of a Hugging Face folder, of one converted to Megatron, or of a run's checkpoint.

    Raises:
        ConversionError: a file is missing or damaged.
        WeightSyncError: the tensors are not those of the model.
    """
    table = layout_table(spec, 1)
    engine.load_weights(_tensors(open_weights(folder, table), list(hf_shapes(table))), version=0)


def end_tokens(folder: str) -> list[int]:
    """Tokens at which the model ends an answer, by its generation_config.json; empty without one."""
    path = Path(folder) / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def fingerprint(folder: str) -> str:
    """Of the model's files: their names, sizes, and first and last MiB. Sixteen hexadecimal digits.

    Not a proof that all bytes are the same, for which a large model would have to be read whole.
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
