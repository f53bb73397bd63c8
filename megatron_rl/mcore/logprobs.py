"""Log-probability and entropy from vocabulary-parallel logits, without gathering the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        size = logits.size(-1)
        logits = logits.float()
        peak = logits.amax(-1)
        _all_reduce(peak, group, dist.ReduceOp.MAX)
        shifted = logits - peak.unsqueeze(-1)
        exponentials = shifted.exp()

        local = labels - group.rank() * size
        mine = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1).unsqueeze(-1)
        chosen = shifted.gather(-1, local).squeeze(-1) * mine
        sums = torch.stack([exponentials.sum(-1), (exponentials * shifted).sum(-1), chosen])
        _all_reduce(sums, group, dist.ReduceOp.SUM)
        total, weighted, chosen = sums

        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), shifted, log_total, entropy, local, mine)
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        probabilities, shifted, log_total, entropy, local, mine = ctx.saved_tensors
        gradient = torch.zeros_like(probabilities)
        if grad_logprobs is not None:
            gradient -= grad_logprobs.unsqueeze(-1) * probabilities
            gradient.scatter_add_(-1, local, (grad_logprobs * mine).unsqueeze(-1))
        if grad_entropy is not None:
            surprise = shifted - log_total.unsqueeze(-1) + entropy.unsqueeze(-1)
            gradient -= grad_entropy.unsqueeze(-1) * probabilities * surprise
        return gradient, None, None


def vocab_parallel_logprobs(
    logits: Tensor, labels: Tensor, group: Any, *, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels and entropy of the tempered distribution.

    Args:
        logits: [..., V / tp] of any float type, this rank's part of the padded vocabulary.
        labels: [...] int64, whole-vocabulary ids.
        group: tensor-parallel process group.
        temperature: logits are divided by it, as the sampler did.
        vocab_size: real size; the padding beyond it gets no probability.

    Returns:
        logprobs [...] and entropy [...] in nats, float32, both differentiable.
    """
    logits = logits.float()  # before the division, as the sampler does
    if temperature != 1.0:
        logits = logits / temperature
    first = group.rank() * logits.size(-1)
    if first + logits.size(-1) > vocab_size:
        padding = torch.arange(first, first + logits.size(-1), device=logits.device) >= vocab_size
        # finite, so that 0 * log 0 in the entropy stays 0
        logits = logits.masked_fill(padding, -1e4)
    logprobs, entropy = _VocabParallelLogprobs.apply(logits, labels, group)
    return logprobs, entropy


def _all_reduce(values: Tensor, group: Any, op: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
