"""Megatron GPTModels from a ModelSpec, with weights read through the layout table."""

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
    """A GPTModel whose last stage gives hidden states, for its heads to read."""

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
            self._give_hidden_states()

    def _give_hidden_states(self) -> None:
        # called, so that Megatron's hooks around the output layer run, but nothing is multiplied yet
        self.output_layer.forward = _hidden_states_only


class PolicyModel(Backbone):
    """Log-probabilities, taken from the hidden states in chunks."""

    def __init__(self, spec: ModelSpec, *arguments: Any) -> None:
        super().__init__(spec, *arguments, tied=spec.tied_embeddings)

    def logprobs(
        self, hidden: Tensor, labels: Tensor, wanted: Tensor, *, temperature: float, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [number wanted] float32 of the labels, on the last stage.

        Args:
            hidden: [S, L / tp, H] with sequence parallelism, [S, L, H] without, as ``forward`` gives it.
            labels: [S, L] int64.
            wanted: [S, L] bool.
            temperature: logits are divided by it.
            chunk_tokens: tokens whose logits exist at a time; None: as many as fit a bounded memory.
        """
        group = self._parallel.groups.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden.transpose(0, 1).contiguous(), group=group)
            rows = whole.transpose(0, 1)[wanted]
        else:
            # of the chosen rows: Megatron loses the sum of gradients that are not contiguous
            rows = copy_to_tensor_model_parallel_region(hidden[wanted], group=group)
        weight = self.output_weight()
        return linear_logprobs(
            rows,
            weight,
            labels[wanted],
            group,
            temperature=temperature,
            vocab_size=self._spec.vocab_size,
            chunk_tokens=chunk_tokens or default_chunk_tokens(weight.size(0)),
        )

    def output_weight(self) -> Tensor:
        """[V / tp, H] of the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ValueModel(Backbone):
    """One number for each token: the head is one row, whole on every tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, *arguments: Any) -> None:
        super().__init__(spec, config, *arguments, tied=False)
        if self.post_process:
            self.output_layer = torch.nn.Linear(spec.hidden_size, 1, bias=False, dtype=config.params_dtype)
            self._give_hidden_states()

    def values(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """[number wanted] float32, on the last stage.

        Args:
            hidden, wanted: as of ``PolicyModel.logprobs``.
        """
        if self.config.sequence_parallel:
            # every rank computes all values, so each already has the whole gradient of its share
            whole = gather_from_sequence_parallel_region(
                hidden.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=self._parallel.groups.tp
            )
            rows = whole.transpose(0, 1)[wanted]
        else:
            rows = hidden[wanted]
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
    """This rank's chunks of the model, one without virtual pipelining; their weights are not set yet."""
    model = PolicyModel if head == "language" else ValueModel
    chunks = [
        model(spec, config, implementation, parallel, stage).to(parallel.device) for stage in range(parallel.vp_size)
    ]
    patches.mark_expert_parameters(chunks)
    return chunks


def global_parameters(chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> dict[str, torch.nn.Parameter]:
    """Parameters under the layout table's names: layers and experts numbered over the whole model."""
    return {
        names.global_name(name, chunk, parallel): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def place_of(parallel: ParallelContext) -> Place:
    """Where this rank stands among those that share matrices."""
    return Place(
        tp_rank=parallel.tp_rank, tp_size=parallel.tp_size, etp_rank=parallel.etp_rank, etp_size=parallel.etp_size
    )


def check_weights(spec: ModelSpec, folder: str, head: Head = "language") -> WeightReader:
    """Open a Hugging Face or converted folder whose tensors are those of the model, by names and shapes.

    A value head may be missing.

    Raises:
        ConversionError: a file or tensor is missing, damaged, misshapen or unmapped.
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
    """Fill this rank's shards from a checked folder, reading only the bytes they need.

    A value head that is not there is 0.

    Raises:
        ConversionError: a parameter has no layout, or another shape.
    """
    table, place = layout_table(spec, parallel.tp_size, head), place_of(parallel)
    known = reader.names()
    for name, parameter in parameters.items():
        if name not in table:
            raise ConversionError(f"Megatron parameter {name} has no layout. Add it to megatron_rl/models/table.py.")
        layout = table[name]
        if tuple(parameter.shape) != place.shape(layout):
            raise ConversionError(f"{name}: shard {tuple(parameter.shape)}, layout {place.shape(layout)}.")
        # rows that pad the vocabulary stay 0
        shard = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        pieces = place.slices(layout)
        if not (head == "value" and name == "output_layer.weight" and VALUE_HEAD not in known):
            fill_shard(shard, pieces, reader.read)
        set_weight(parameter, shard)
