"""How evenly the router spreads tokens over experts, from Megatron's own record."""

from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.types import ParallelContext

# Megatron's names -> ours and the group over whose ranks the loss is a sum
LOSSES = {
    "load_balancing_loss": ("moe/aux_loss", "tp_cp"),
    "seq_load_balancing_loss": ("moe/aux_loss", "tp_cp"),
    "global_load_balancing_loss": ("moe/aux_loss", "tp_dp_cp"),
    "z_loss": ("moe/z_loss", None),
}


def take_router_metrics(num_micro_batches: int, parallel: ParallelContext) -> dict[str, Reduction]:
    """Mean router losses over layers and micro-batches of the update just made, before their coefficients.

    An auxiliary loss is the number of chosen experts where all of them get the same share.
    """
    found: dict[str, Reduction] = {}
    for name, record in get_moe_layer_wise_logging_tracker().items():
        ours, summed_over = LOSSES[name]
        values = record["values"]
        layers_here = int((values != 0).sum())
        counts = summed_over is None or getattr(parallel.groups, summed_over).rank() == 0
        found[ours] = Mean(float(values.sum()), layers_here * num_micro_batches * counts)
    clear_aux_losses_tracker()
    return found
