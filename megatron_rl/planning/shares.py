"""Number of weight elements that each pipeline stage of a model holds on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megatron_rl.config.parallel import ParallelSection
from megatron_rl.errors import ConfigError
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import Head, layout_table
from megatron_rl.weights.layout import Layout, Place


@dataclass(frozen=True, kw_only=True)
class StageShare:
    """Number of weight elements on one rank of a stage; all ranks of a stage hold the same number."""

    num_layers: int
    dense: int
    """Elements outside of experts."""
    experts: int
    """Elements of the experts that are on this rank."""
    output: int
    """Elements of the output layer, which is also the embedding if they are tied; 0 except on the last stage."""
    matrices: int
    """Elements of the matrices that LoRA or FP8 may store in fewer bits."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@cache
def stage_shares(spec: ModelSpec, parallel: ParallelSection, head: Head = "language") -> list[StageShare]:
    """Return the share of a rank, one entry per pipeline stage.

    Raises:
        ConfigError: the layers do not divide by the stages.
    """
    tp, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    table = layout_table(replace(spec, num_layers=1), tp, head)  # all layers are identical
    place = Place(tp_size=tp, etp_size=parallel.expert_tensor_size)
    layer = [name for name in table if name.startswith("decoder.layers.0.")]
    dense = sum(_size(table[name], place) for name in layer if not table[name].expert)
    experts = sum(_size(table[name], place) for name in layer if table[name].expert) // parallel.expert_parallel_size
    matrices = experts + sum(
        _size(table[name], place)
        for name in layer
        if not table[name].expert and name.endswith("weight") and not table[name].replicated
    )
    embedding, output, norm = (
        _size(table[name], place)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")
    )
    shares = []
    tied = spec.tied_embeddings and head == "language"
    for stage, num_layers in enumerate(layers_of_stages(spec, parallel)):
        is_first, is_last = stage == 0, stage == stages - 1
        outside_layers = embedding * is_first + (norm + output * (not (tied and is_first))) * is_last
        shares.append(
            StageShare(
                num_layers=num_layers,
                dense=num_layers * dense + outside_layers,
                experts=num_layers * experts,
                output=output if is_last else 0,
                matrices=num_layers * matrices,
            )
        )
    return shares


def layers_of_stages(spec: ModelSpec, parallel: ParallelSection) -> Sequence[int]:
    """Return the number of layers of every pipeline stage, as Megatron-Core assigns them.

    Raises:
        ConfigError: the layers do not divide by the stages.
    """
    stages = parallel.pipeline_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
    if stages == 1:
        return [spec.num_layers]
    if first is None and last is None:
        num_slots = spec.num_layers + embedding + loss
        if num_slots % stages:
            raise ConfigError(
                f"parallel.pipeline_parallel_size={stages} does not divide the model's {num_slots} layers. "
                f"Set it to a divisor of {num_slots}."
            )
        each = num_slots // stages
        return [each - embedding, *[each] * (stages - 2), each - loss]
    inner = stages - (first is not None) - (last is not None)
    rest = spec.num_layers - (first or 0) - (last or 0)
    if rest < 0 or (rest % inner if inner else rest):
        raise ConfigError(
            f"parallel.num_layers_in_first_pipeline_stage={first}, num_layers_in_last_pipeline_stage={last}: the other "
            f"{rest} layers do not divide by {inner} stages. Change either."
        )
    middle = [rest // inner] * inner if inner else []
    return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]


def _size(layout: Layout, place: Place) -> int:
    return prod(place.shape(layout))
