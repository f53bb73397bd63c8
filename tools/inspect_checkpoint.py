"""What is in a checkpoint, in one screen: python tools/inspect_checkpoint.py FOLDER.

FOLDER holds Hugging Face safetensors or a Megatron distributed checkpoint: one that the conversion wrote, one
of a training run (checkpoints/step_…), or one of Megatron-LM.
"""

import argparse
import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_rl.conversion.record import RECORD, read_record
from megatron_rl.errors import ConversionError, MegatronRLError
from megatron_rl.models import ModelSpec, layout_table, read_model_spec
from megatron_rl.weights.file_bytes import num_bytes
from megatron_rl.weights.hf_files import HFReader
from megatron_rl.weights.megatron_files import MegatronReader, find_distributed_checkpoint, read_metadata
from megatron_rl.weights.megatron_keys import NO_WEIGHTS
from megatron_rl.weights.open import find_model_folder

Facts = dict[str, str]
LAYOUT_ARGUMENTS = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
}
OWN_LAYOUT = {
    "parallel.tensor_parallel_size": "TP",
    "parallel.pipeline_parallel_size": "PP",
    "parallel.virtual_pipeline_parallel_size": "VPP",
    "parallel.context_parallel_size": "CP",
    "parallel.expert_parallel_size": "EP",
}


def inspect(folder: Path) -> Facts:
    """What there is to know, by title.

    Raises:
        ConversionError: the folder holds no checkpoint, or a damaged one.
    """
    found = find_distributed_checkpoint(folder)
    return describe_megatron(folder, found) if found else describe_hf(folder)


def describe_hf(folder: Path) -> Facts:
    """Of a Hugging Face folder."""
    reader = HFReader(folder)
    tensors = [(reader.shape(name), reader.dtype(name)) for name in sorted(reader.names())]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    others = [
        name for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json") if (folder / name).exists()
    ]
    return {
        "kind": "Hugging Face",
        **describe_model(folder),
        **count(tensors),
        "files": f"{len(files)} of safetensors, {size_on_disk(folder)}",
        "beside them": ", ".join(others) or "nothing",
        **describe_conversion(folder),
    }


def describe_megatron(folder: Path, found: Path) -> Facts:
    """Of a distributed checkpoint."""
    entries = read_metadata(found).state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    weights = [entry for key, entry in tensors.items() if not NO_WEIGHTS.match(key)]
    states = [entry for key, entry in tensors.items() if "optimizer" in key.split(".")]
    objects = sum(isinstance(entry, BytesStorageMetadata) for entry in entries.values())
    try:
        like = find_model_folder(folder)
    except ConversionError:
        model = {"family": "unknown: no config.json here; the conversion takes one with --config"}
        stored = count((tuple(entry.size), entry.properties.dtype) for entry in weights)
    else:
        model = describe_model(like)
        reader = MegatronReader(folder, layout_table(read_model_spec(like), 1))
        stored = count((reader.shape(name), reader.dtype(name)) for name in reader.names())
    held = sum(num_bytes(tuple(entry.size), entry.properties.dtype) for entry in states)
    return {
        "kind": "Megatron distributed checkpoint (torch_dist), loadable under any layout",
        **model,
        **stored,
        "optimizer": f"{len(states)} tensors, {readable(held)}" if states else "none",
        "other objects": str(objects),
        "files": f"{len(list(found.glob('*.distcp')))} of tensors, {size_on_disk(found)}, in {found}",
        **describe_run(folder, found),
        **describe_conversion(folder),
    }


def describe_model(folder: Path) -> Facts:
    """What config.json says."""
    spec = read_model_spec(folder)
    facts = {
        "family": spec.family,
        "layers": f"{spec.num_layers} of width {spec.hidden_size}, feed-forward {spec.ffn_hidden_size}",
        "attention": f"{spec.num_heads} heads, {spec.num_query_groups} of keys and values, {spec.head_dim} wide"
        + switches(spec),
        "vocabulary": f"{spec.vocab_size}, output layer {'tied' if spec.tied_embeddings else 'not tied'}",
        "positions": f"{spec.max_position_embeddings}, base {spec.rope_theta:g}, "
        + (type(spec.rope_scaling).__name__ if spec.rope_scaling else "not scaled"),
    }
    if spec.moe is not None:
        facts["experts"] = (
            f"{spec.moe.num_experts}, {spec.moe.experts_per_token} per token, {spec.moe.ffn_hidden_size} wide"
        )
    return facts


def switches(spec: ModelSpec) -> str:
    """Of the attention."""
    window = spec.sliding_window
    given = {
        "biases": spec.qkv_bias,
        "norms of queries and keys": spec.qk_norm,
        f"window of {window.size} from layer {window.first_layer}" if window else "": window is not None,
    }
    return "".join(f", {name}" for name, there in given.items() if there)


def count(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> Facts:
    """Parameters and bytes by type."""
    elements: Counter[torch.dtype] = Counter()
    number = 0
    for shape, dtype in tensors:
        elements[dtype] += torch.Size(shape).numel()
        number += 1
    types = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {readable(amount * dtype.itemsize)}" for dtype, amount in elements.items()
    )
    return {"parameters": f"{elements.total():,} in {number} tensors", "types": types or "none"}


def size_on_disk(folder: Path) -> str:
    """Of all its files."""
    return readable(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def readable(num_bytes: int) -> str:
    """In GB, MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= unit), (1e3, "kB"))
    return f"{num_bytes / unit:.2f} {name}"


def describe_run(folder: Path, found: Path) -> Facts:
    """The step, and the layout under which it was saved."""
    for trainer in (folder / "trainer.json", found.parent / "trainer.json"):
        if trainer.exists():
            content = json.loads(trainer.read_text())
            return {"step": str(content["state"]["step"]), "saved under": layout(content["config"], OWN_LAYOUT)}
    common = read_common(found)
    facts = {"step": str(common["iteration"])} if "iteration" in common else {}
    arguments = common.get("args")
    return facts | ({"saved under": layout(vars(arguments), LAYOUT_ARGUMENTS)} if arguments else {})


def read_common(found: Path) -> dict[str, Any]:
    """What Megatron-LM keeps beside the tensors; empty where it cannot be read without running its code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: dict[str, Any] = torch.load(found / "common.pt", map_location="cpu", weights_only=True)
        return content
    except (OSError, pickle.UnpicklingError, RuntimeError):
        return {}


def layout(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Parallel sizes above 1."""
    sizes = {short: values.get(name) for name, short in names.items()}
    return " ".join(f"{short}{size}" for short, size in sizes.items() if size and size > 1) or "no model parallelism"


def describe_conversion(folder: Path) -> Facts:
    """Whether the tensors' checksums are recorded."""
    if not (folder / RECORD).exists():
        return {}
    return {"converted": f"checksums of {len(read_record(folder))} tensors in {RECORD}"}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Show what is in a checkpoint.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder or Megatron checkpoint")
    arguments = parser.parse_args()
    try:
        facts = inspect(arguments.folder)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.folder)
    for title, text in facts.items():
        print(f"  {title:14}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
