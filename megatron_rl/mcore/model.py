"""A Megatron GPTModel from a ModelSpec, with weights read through the layout table."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rl.config.schema import ParallelSection
from megatron_rl.errors import ConfigError, ConversionError
from megatron_rl.mcore.attention import RMSNorm, SdpaCoreAttention
from megatron_rl.models import ModelSpec, layout_table, padded_vocab_size
from megatron_rl.models.table import ignored_names
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import HFReader, check_against_table
from megatron_rl.weights.layout import fill_shard, hf_shapes


def transformer_config(spec: ModelSpec, parallel: ParallelSection, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the model.

    Raises:
        ConfigError: layers or heads do not divide by the parallel sizes.
    """
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    for what, total, size, key in (
        ("layers", spec.num_layers, pp, "parallel.pipeline_parallel_size"),
        ("key/value heads", spec.num_query_groups, tp, "parallel.tensor_parallel_size"),
        ("feed-forward columns", spec.ffn_hidden_size, tp, "parallel.tensor_parallel_size"),
    ):
        if total % size:
            raise ConfigError(
                f"{key}={size} does not divide the model's {total} {what}. Set it to a divisor of {total}."
            )
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_epsilon,
        qk_layernorm=spec.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # every weight is read from the checkpoint, so none is drawn at random; skipping initialisation
        # altogether would also skip the marks by which Megatron knows tensor-parallel parameters
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        use_cpu_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=parallel.sequence_parallel,
        # micro-batches differ in length; Megatron asks for this dispatcher then, even in dense models
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # the loss arrives as a sum, and the schedule divides gradients by the global token count
        calculate_per_token_loss=True,
        # these fusions need Apex or Transformer Engine
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )


def _leave_as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_model(spec: ModelSpec, config: TransformerConfig, parallel: ParallelContext) -> GPTModel:
    """This rank's part of the model; its weights are not set yet."""
    layer = _layer_spec(config)
    num_layers = get_num_layers_to_build(config, pp_rank=parallel.pp_rank)
    scaling: dict[str, Any] = {}
    if spec.rope_scaling is not None:
        scaling = {"rope_scaling": True, "rope_scaling_factor": spec.rope_scaling.factor}
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(spec.vocab_size, parallel.tp_size),
        max_sequence_length=spec.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        pre_process=parallel.pp_rank == 0,
        post_process=parallel.is_last_stage,
        pg_collection=parallel.groups,
        **scaling,
    ).to(parallel.device)


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def global_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters under names whose layer numbers count over the whole depth."""
    named = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        named[".".join(parts)] = parameter
    return named


def check_weights(spec: ModelSpec, folder: str) -> HFReader:
    """Open a Hugging Face folder whose tensors are those of the model, by names and shapes.

    Raises:
        ConversionError: a file or tensor is missing, damaged, misshapen or unmapped.
    """
    reader = HFReader(folder)
    check_against_table(reader, hf_shapes(layout_table(spec, 1)), ignored_names(spec))
    return reader


@torch.no_grad()
def load_hf_weights(model: GPTModel, spec: ModelSpec, parallel: ParallelContext, reader: HFReader) -> None:
    """Fill this rank's shards from a checked folder, reading only the bytes they need.

    Raises:
        ConversionError: a parameter has no layout, or another shape.
    """
    table = layout_table(spec, parallel.tp_size)
    for name, parameter in global_parameters(model).items():
        if name not in table:
            raise ConversionError(f"Megatron parameter {name} has no layout. Add it to megatron_rl/models/table.py.")
        layout = table[name]
        if tuple(parameter.shape) != layout.shape(parallel.tp_size):
            raise ConversionError(f"{name}: shard {tuple(parameter.shape)}, layout {layout.shape(parallel.tp_size)}.")
        parameter.zero_()  # rows that pad the vocabulary
        fill_shard(parameter, layout.slices(parallel.tp_rank, parallel.tp_size), reader.read)
