"""Supported model families, one file each: from config.json to a ModelSpec."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_rl.errors import ConversionError
from megatron_rl.models.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megatron_rl.models.families.common import HFConfig
from megatron_rl.models.spec import ModelSpec

FAMILIES: dict[str, Callable[[HFConfig], ModelSpec]] = {
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
}
"""Name under ``architectures`` in config.json -> function that makes the ModelSpec."""

HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
"""Suffixes of architecture names; the last two are those of models with a value head."""


def read_hf_config(folder: str | Path) -> HFConfig:
    """Read the config.json of a folder.

    Raises:
        ConversionError: the file is missing or damaged.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(
            f"{path}: {error.strerror or error}. Give a folder with the model's config.json."
        ) from error
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path} is not JSON: {error}. Fetch it again.") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds a {type(config).__name__}, expected an object. Fetch it again.")
    return config


def read_model_spec(folder: str | Path) -> ModelSpec:
    """Read the specification of the model in a folder from its config.json alone.

    Raises:
        ConversionError: config.json is missing, damaged, incomplete or of an unsupported architecture.
    """
    config, path = read_hf_config(folder), Path(folder) / "config.json"
    architectures = config.get("architectures") or ["none"]
    family = FAMILIES.get(with_head(architectures[0], "ForCausalLM"))
    if family is None:
        raise ConversionError(
            f"{path}: architecture {architectures[0]} is not supported. Supported: {', '.join(FAMILIES)}."
        )
    try:
        return family(config)
    except KeyError as error:
        raise ConversionError(
            f"{path}: key {error} is missing. The file does not describe a {architectures[0]}."
        ) from error


def with_head(architecture: str, head: str) -> str:
    """Return the architecture's name with another head as its suffix."""
    for suffix in HEADS:
        if architecture.endswith(suffix):
            return architecture.removesuffix(suffix) + head
    return architecture


def as_value_model(config: HFConfig) -> HFConfig:
    """Return the config.json of the same model with a value head, as transformers' sequence classification."""
    (architecture,) = config["architectures"]
    return {
        **config,
        "architectures": [with_head(architecture, "ForSequenceClassification")],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
    }
