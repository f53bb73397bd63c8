"""Log-probability and entropy from hidden states, without ever holding the logits of all tokens.

The output layer and the softmax over the vocabulary are computed for one chunk of tokens at a time and recomputed for
the gradient; the vocabulary stays split over the tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.models.cpu_linear import matmul


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Any,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels and entropy of the distribution, both at the given temperature.

    Args:
        hidden: [T, H], the same on every tensor-parallel rank; its gradient is this rank's summand of the total.
        weight: [V / tp, H], this rank's rows of the padded vocabulary.
        labels: [T] int64, token ids of the whole vocabulary.
        group: tensor-parallel process group.
        temperature: logits are divided by it, as the engine does when it samples.
        vocab_size: size without padding; padding gets no probability.
        chunk_tokens: number of tokens whose logits are in memory at once.

    Returns:
        logprobs [T] and entropy [T] in nats, float32, both differentiable.
    """
    head = _Head(group, weight.size(0), temperature, vocab_size)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, labels, head, chunk_tokens)
    return logprobs, entropy


class _Head:
    """Computes this rank's logits, divided by the temperature, from hidden states."""

    def __init__(self, group: Any, columns: int, temperature: float, vocab_size: int) -> None:
        self.group = group
        self.temperature = temperature
        self.first = group.rank() * columns
        """First token id of this rank's part of the vocabulary."""
        self.num_real = min(columns, max(0, vocab_size - self.first))
        """Number of columns that are not padding."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the [C, V / tp] float32 logits of C tokens."""
        logits = matmul(hidden, weight.t()).float()  # float32 before the division, as in the engine
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        # a finite value, so that 0 * log 0 in the entropy is 0
        logits[:, self.num_real :] = -1e4
        return logits

    def local_columns(self, labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Return the labels' columns [C, 1] on this rank, and a bool mask [C] of the labels that this rank holds."""
        local = labels - self.first
        is_local = (local >= 0) & (local < columns)
        return local.clamp(0, columns - 1).unsqueeze(-1), is_local

    def reduce(self, values: Tensor, op: Any) -> Tensor:
        """All-reduce values in place over the tensor-parallel ranks."""
        if self.group.size() > 1:
            dist.all_reduce(values, op=op, group=self.group)
        return values


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: _Head, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logprobs, entropy, normaliser = hidden.new_empty(3, hidden.size(0), dtype=torch.float32)
        kept = None
        for start in range(0, hidden.size(0), chunk_tokens):
            span = slice(start, start + chunk_tokens)
            logits = head.logits(hidden[span], weight)
            peak = head.reduce(logits.amax(-1), dist.ReduceOp.MAX)
            shifted = logits.sub_(peak.unsqueeze(-1))
            exponentials = shifted.exp()
            column, is_local = head.local_columns(labels[span], weight.size(0))
            label_logits = shifted.gather(-1, column).squeeze(-1) * is_local
            weighted = torch.linalg.vecdot(exponentials, shifted)
            total, weighted, label_logits = head.reduce(
                torch.stack([exponentials.sum(-1), weighted, label_logits]), dist.ReduceOp.SUM
            )
            log_total = total.log()
            logprobs[span] = label_logits - log_total
            entropy[span] = log_total - weighted / total
            normaliser[span] = peak + log_total
            if hidden.size(0) <= chunk_tokens:  # with a single chunk, keep the log-probabilities for the gradient
                kept = shifted.sub_(log_total.unsqueeze(-1))
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        ctx.save_for_backward(hidden, weight, labels, entropy, normaliser, kept)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, labels, entropy, normaliser, kept = ctx.saved_tensors
        head: _Head = ctx.head
        grad_hidden = torch.empty_like(hidden)
        # accumulate over chunks in float32: a 16-bit sum would be rounded after every chunk
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.size(0), ctx.chunk_tokens):
            span = slice(start, start + ctx.chunk_tokens)
            if kept is not None:
                log_probs = kept
            else:
                log_probs = head.logits(hidden[span], weight).sub_(normaliser[span].unsqueeze(-1))
            gradient = log_probs.exp()  # probabilities; turned into the gradient of the logits below
            factor = torch.zeros_like(entropy[span]) if grad_logprobs is None else -grad_logprobs[span]
            if grad_entropy is None:
                gradient.mul_(factor.unsqueeze(-1))
            else:
                slope = (log_probs + entropy[span].unsqueeze(-1)).mul_(-grad_entropy[span].unsqueeze(-1))
                gradient.mul_(slope.add_(factor.unsqueeze(-1)))
            if grad_logprobs is not None:
                column, is_local = head.local_columns(labels[span], weight.size(0))
                gradient.scatter_add_(-1, column, (grad_logprobs[span] * is_local).unsqueeze(-1))
            if head.temperature != 1.0:
                gradient.div_(head.temperature)
            gradient[:, head.num_real :] = 0
            gradient = gradient.to(weight.dtype)
            grad_hidden[span] = matmul(gradient, weight)
            if grad_weight is not None:
                grad_weight += matmul(gradient.t(), hidden[span])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
