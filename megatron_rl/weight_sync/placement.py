"""Parameters of each rank of a training layout, computed without processes, for plans and estimates."""

import itertools

from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import layout_table
from megatron_rl.weight_sync.plan import ParametersByRank
from megatron_rl.weights.layout import Place


def parameters_by_rank(spec: ModelSpec, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1) -> ParametersByRank:
    """Parameter names and tensor-parallel position of every rank, as Megatron-Core distributes them evenly.

    Args:
        tp: tensor-parallel size; these ranks are adjacent.
        pp: number of pipeline stages, each with equally many layers; the outermost dimension.
        dp: data-parallel size.
        ep: expert-parallel size, within the data-parallel ranks; the matrices of an expert are not split.
    """
    table = layout_table(spec, tp)
    held = []
    for stage, replica, tp_rank in itertools.product(range(pp), range(dp), range(tp)):
        names = [name for name in table if _is_held(spec, name, stage, pp, replica % ep, ep)]
        held.append((names, Place(tp_rank=tp_rank, tp_size=tp, etp_rank=0, etp_size=1)))
    return held


def _is_held(spec: ModelSpec, name: str, stage: int, pp: int, ep_rank: int, ep: int) -> bool:
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        if name == "output_layer.weight" and spec.tied_embeddings and pp == 1:
            return False
        return stage == (0 if name.startswith("embedding") else pp - 1)
    if int(parts[2]) // (spec.num_layers // pp) != stage:
        return False
    if "local_experts" not in parts or spec.moe is None:
        return True
    return int(parts[parts.index("local_experts") + 1]) // (spec.moe.num_experts // ep) == ep_rank
