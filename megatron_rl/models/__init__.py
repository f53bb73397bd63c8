"""Model families: from a Hugging Face config to a ModelSpec and the layout table of its weights."""

from megatron_rl.models.families import FAMILIES, as_value_model, read_hf_config, read_model_spec
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import Head, layout_table, padded_vocab_size

__all__ = [
    "FAMILIES",
    "Head",
    "ModelSpec",
    "as_value_model",
    "layout_table",
    "padded_vocab_size",
    "read_hf_config",
    "read_model_spec",
]
