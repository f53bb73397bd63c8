"""Summarize a checkpoint on one screen: python tools/inspect_checkpoint.py FOLDER.

FOLDER holds Hugging Face safetensors or a Megatron distributed checkpoint, written by the conversion, a training run
(checkpoints/step_…) or Megatron-LM.
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
    """Summary of a checkpoint: title of a line -> its text.

    Raises:
        ConversionError: the folder holds no checkpoint, or a damaged one.
    """
    distributed = find_distributed_checkpoint(folder)
    return describe_megatron(folder, distributed) if distributed else describe_hf(folder)


def describe_hf(folder: Path) -> Facts:
    """Summary of a Hugging Face folder."""
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


def describe_megatron(folder: Path, distributed: Path) -> Facts:
    """Summary of a Megatron distributed checkpoint.

    Args:
        folder: as given by the user.
        distributed: folder of the tensor files, in or equal to ``folder``.
    """
    entries = read_metadata(distributed).state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    weights = [entry for key, entry in tensors.items() if not NO_WEIGHTS.match(key)]
    states = [entry for key, entry in tensors.items() if "optimizer" in key.split(".")]
    objects = sum(isinstance(entry, BytesStorageMetadata) for entry in entries.values())
    try:
        like = find_model_folder(folder)
    except ConversionError:
        model = {"family": "unknown: no config.json here; give the conversion one with --config"}
        stored = count((tuple(entry.size), entry.properties.dtype) for entry in weights)
    else:
        model = describe_model(like)
        reader = MegatronReader(folder, layout_table(read_model_spec(like), 1))
        stored = count((reader.shape(name), reader.dtype(name)) for name in reader.names())
    state_bytes = sum(num_bytes(tuple(entry.size), entry.properties.dtype) for entry in states)
    return {
        "kind": "Megatron distributed checkpoint (torch_dist), loadable under any layout",
        **model,
        **stored,
        "optimizer": f"{len(states)} tensors, {readable(state_bytes)}" if states else "none",
        "other objects": str(objects),
        "files": f"{len(list(distributed.glob('*.distcp')))} of tensors, {size_on_disk(distributed)}, in {distributed}",
        **describe_run(folder, distributed),
        **describe_conversion(folder),
    }


def describe_model(folder: Path) -> Facts:
    """Summary of config.json."""
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
    """The attention's optional features, as the end of a line."""
    window = spec.sliding_window
    features = {
        "biases": spec.qkv_bias,
        "norms of queries and keys": spec.qk_norm,
        f"window of {window.size} from layer {window.first_layer}" if window else "": window is not None,
    }
    return "".join(f", {name}" for name, present in features.items() if present)


def count(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> Facts:
    """Number of parameters, and bytes by dtype."""
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
    """Total size of all files in a folder."""
    return readable(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def readable(num_bytes: int) -> str:
    """A number of bytes in GB, MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= unit), (1e3, "kB"))
    return f"{num_bytes / unit:.2f} {name}"


def describe_run(folder: Path, distributed: Path) -> Facts:
    """Step and layout of the run that saved the checkpoint, as far as it recorded them."""
    for trainer in (folder / "trainer.json", distributed.parent / "trainer.json"):
        if trainer.exists():
            content = json.loads(trainer.read_text())
            return {"step": str(content["state"]["step"]), "saved under": layout(content["config"], OWN_LAYOUT)}
    common = read_common(distributed)
    facts = {"step": str(common["iteration"])} if "iteration" in common else {}
    arguments = common.get("args")
    return facts | ({"saved under": layout(vars(arguments), LAYOUT_ARGUMENTS)} if arguments else {})


def read_common(distributed: Path) -> dict[str, Any]:
    """Content of Megatron-LM's common.pt; empty if it cannot be read without executing pickled code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: dict[str, Any] = torch.load(distributed / "common.pt", map_location="cpu", weights_only=True)
        return content
    except (OSError, pickle.UnpicklingError, RuntimeError):
        return {}


def layout(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Parallel sizes above 1, such as ``TP2 PP4``."""
    sizes = {short: values.get(name) for name, short in names.items()}
    return " ".join(f"{short}{size}" for short, size in sizes.items() if size and size > 1) or "no model parallelism"


def describe_conversion(folder: Path) -> Facts:
    """Number of recorded checksums, if the conversion wrote the folder."""
    if not (folder / RECORD).exists():
        return {}
    return {"converted": f"checksums of {len(read_record(folder))} tensors in {RECORD}"}


def main() -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Summarize a checkpoint.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder or Megatron checkpoint")
    args = parser.parse_args()
    try:
        facts = inspect(args.folder)
    except MegatronRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.folder)
    for title, text in facts.items():
        print(f"  {title:14}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
