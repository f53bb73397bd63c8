"""Router losses of mixture-of-experts models, from Megatron's tracker."""

from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.types import ParallelContext

# Megatron's name -> (metric name, process group whose ranks' values add up to one loss; None: each rank's is whole)
LOSSES = {
    "load_balancing_loss": ("moe/aux_loss", "tp_cp"),
    "seq_load_balancing_loss": ("moe/aux_loss", "tp_cp"),
    "global_load_balancing_loss": ("moe/aux_loss", "tp_dp_cp"),
    "z_loss": ("moe/z_loss", None),
}


def take_router_metrics(num_micro_batches: int, parallel: ParallelContext) -> dict[str, Reduction]:
    """Return the last update's mean router losses over layers and micro-batches, and clear Megatron's tracker.

    The losses are reported without their coefficients. With perfectly balanced experts, the auxiliary loss equals the
    number of experts per token.
    """
    metrics: dict[str, Reduction] = {}
    for name, record in get_moe_layer_wise_logging_tracker().items():
        metric, summed_over = LOSSES[name]
        values = record["values"]
        num_local_layers = int((values != 0).sum())
        counts = summed_over is None or getattr(parallel.groups, summed_over).rank() == 0
        metrics[metric] = Mean(float(values.sum()), num_local_layers * num_micro_batches * counts)
    clear_aux_losses_tracker()
    return metrics
