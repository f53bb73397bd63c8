"""Build Megatron GPTModels from a ModelSpec, and load their weights by the layout table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rl.errors import ConversionError
from megatron_rl.mcore.model import names
from megatron_rl.mcore.model.layer import block_submodules
from megatron_rl.mcore.model.logprobs import linear_logprobs
from megatron_rl.mcore.model.precision import Implementation, set_weight
from megatron_rl.mcore.model.rotary import PositionRotary
from megatron_rl.mcore.runtime import patches
from megatron_rl.models import Head, ModelSpec, layout_table, padded_vocab_size
from megatron_rl.models.logit_chunks import default_chunk_tokens
from megatron_rl.models.table import VALUE_HEAD, ignored_names
from megatron_rl.types import ParallelContext
from megatron_rl.weights.hf_files import check_against_table
from megatron_rl.weights.layout import Place, fill_shard, hf_shapes
from megatron_rl.weights.open import open_weights
from megatron_rl.weights.reader import WeightReader

patches.apply()


class Backbone(GPTModel):
    """A GPTModel whose last stage returns hidden states; subclasses apply the output head."""

    def __init__(
        self,
        spec: ModelSpec,
        config: TransformerConfig,
        implementation: Implementation,
        parallel: ParallelContext,
        vp_stage: int,
        *,
        tied: bool,
    ) -> None:
        stage = {"vp_stage": vp_stage} if parallel.vp_size > 1 else {}
        super().__init__(
            config,
            block_submodules(config, implementation, pp_rank=parallel.pp_rank, vp_stage=stage.get("vp_stage")),
            vocab_size=padded_vocab_size(spec.vocab_size, parallel.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            share_embeddings_and_output_weights=tied,
            pre_process=parallel.pp_rank == 0 and vp_stage == 0,
            post_process=parallel.is_last_stage and vp_stage == parallel.vp_size - 1,
            pg_collection=parallel.groups,
            **stage,
        )
        self._spec = spec
        self._parallel = parallel
        self.rotary_pos_emb = PositionRotary(
            spec,
            tp_size=parallel.tp_size,
            cp_rank=parallel.cp_rank,
            cp_size=parallel.cp_size,
            device=parallel.device,
        )
        if self.post_process:
            self._return_hidden_states()

    def _return_hidden_states(self) -> None:
        # the module is still called, so that Megatron's hooks on the output layer run, but it multiplies nothing
        self.output_layer.forward = _hidden_states_only


class PolicyModel(Backbone):
    """A language model that computes log-probabilities from its hidden states in chunks."""

    def __init__(self, spec: ModelSpec, *arguments: Any) -> None:
        super().__init__(spec, *arguments, tied=spec.tied_embeddings)

    def logprobs(
        self, hidden: Tensor, labels: Tensor, mask: Tensor, *, temperature: float, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the labels at True entries of the mask; only on the last stage.

        Args:
            hidden: result of ``forward``: [S, L / tp, H] with sequence parallelism, [S, L, H] without.
            labels: [S, L] int64.
            mask: [S, L] bool.
            temperature: logits are divided by it.
            chunk_tokens: number of tokens whose logits are in memory at once; None: as many as fit a fixed size.

        Returns:
            Two float32 tensors [number of True entries], in the order of the mask.
        """
        group = self._parallel.groups.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden.transpose(0, 1).contiguous(), group=group)
            rows = whole.transpose(0, 1)[mask]
        else:
            # select rows first: Megatron loses the reduction of a gradient that is not contiguous
            rows = copy_to_tensor_model_parallel_region(hidden[mask], group=group)
        weight = self.output_weight()
        return linear_logprobs(
            rows,
            weight,
            labels[mask],
            group,
            temperature=temperature,
            vocab_size=self._spec.vocab_size,
            chunk_tokens=chunk_tokens or default_chunk_tokens(weight.size(0)),
        )

    def output_weight(self) -> Tensor:
        """This rank's rows [V / tp, H] of the output weight; only on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ValueModel(Backbone):
    """A model with one output for each token; its head is one row, replicated on every tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, *arguments: Any) -> None:
        super().__init__(spec, config, *arguments, tied=False)
        if self.post_process:
            self.output_layer = torch.nn.Linear(spec.hidden_size, 1, bias=False, dtype=config.params_dtype)
            self._return_hidden_states()

    def values(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Values [number of True entries of the mask] float32; only on the last stage.

        Args:
            hidden: see ``PolicyModel.logprobs``.
            mask: [S, L] bool.
        """
        if self.config.sequence_parallel:
            # every rank computes all values, so each rank already has the full gradient of its own tokens
            whole = gather_from_sequence_parallel_region(
                hidden.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=self._parallel.groups.tp
            )
            rows = whole.transpose(0, 1)[mask]
        else:
            rows = hidden[mask]
        return F.linear(rows.float(), self.output_layer.weight.float()).squeeze(-1)


def _hidden_states_only(hidden: Tensor, weight: Any = None, runtime_gather_output: Any = None) -> tuple[Tensor, None]:
    return hidden, None


def build_chunks(
    spec: ModelSpec,
    config: TransformerConfig,
    implementation: Implementation,
    parallel: ParallelContext,
    head: Head = "language",
) -> list[Any]:
    """Build this rank's model chunks, one without virtual pipelining; their weights are not loaded yet."""
    model = PolicyModel if head == "language" else ValueModel
    chunks = [
        model(spec, config, implementation, parallel, stage).to(parallel.device) for stage in range(parallel.vp_size)
    ]
    patches.mark_expert_parameters(chunks)
    return chunks


def global_parameters(chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the layout table, with layers and experts numbered over the whole model."""
    return {
        names.global_name(name, chunk, parallel): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def place_of(parallel: ParallelContext) -> Place:
    """This rank's ``Place``: which shards of the split matrices it holds."""
    return Place(
        tp_rank=parallel.tp_rank, tp_size=parallel.tp_size, etp_rank=parallel.etp_rank, etp_size=parallel.etp_size
    )


def check_weights(spec: ModelSpec, folder: str, head: Head = "language") -> WeightReader:
    """Open a Hugging Face or converted folder, and check the names and shapes of its tensors against the model.

    A missing value head is accepted.

    Raises:
        ConversionError: a file or tensor is missing, damaged, unmapped or has the wrong shape.
    """
    reader = open_weights(folder, layout_table(spec, 1))
    shapes = hf_shapes(layout_table(spec, 1, head))
    if head == "value" and VALUE_HEAD not in reader.names():
        del shapes[VALUE_HEAD]
    check_against_table(reader, shapes, ignored_names(spec, head))
    return reader


@torch.no_grad()
def load_hf_weights(
    parameters: Mapping[str, Tensor],
    spec: ModelSpec,
    parallel: ParallelContext,
    reader: WeightReader,
    head: Head = "language",
) -> None:
    """Fill this rank's shards from a checked folder, reading only the bytes that they need.

    A missing value head becomes 0.

    Raises:
        ConversionError: a parameter is not in the layout table, or has another shape there.
    """
    table, place = layout_table(spec, parallel.tp_size, head), place_of(parallel)
    available = reader.names()
    for name, parameter in parameters.items():
        if name not in table:
            raise ConversionError(
                f"Megatron parameter {name} is not in the layout table. Add it to megatron_rl/models/table.py."
            )
        layout = table[name]
        if tuple(parameter.shape) != place.shape(layout):
            raise ConversionError(
                f"{name}: shard of shape {tuple(parameter.shape)}, the layout table has {place.shape(layout)}."
            )
        # rows that pad the vocabulary remain 0
        shard = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        pieces = place.slices(layout)
        if not (head == "value" and name == "output_layer.weight" and VALUE_HEAD not in available):
            fill_shard(shard, pieces, reader.read)
        set_weight(parameter, shard)
