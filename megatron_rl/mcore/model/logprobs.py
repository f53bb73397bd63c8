"""Log-probability and entropy from hidden states, without ever holding the logits of all tokens.

The output layer's product and the softmax over the vocabulary are taken for a chunk of tokens at a
time and taken again for the gradient; the vocabulary stays split over the tensor-parallel ranks.
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
    """Log-probability of the labels and entropy of the tempered distribution.

    Args:
        hidden: [T, H], the same on every tensor-parallel rank; its gradient is this rank's part of the sum.
        weight: [V / tp, H], this rank's rows of the padded vocabulary.
        labels: [T] int64, whole-vocabulary ids.
        group: tensor-parallel process group.
        temperature: logits are divided by it, as the sampler did.
        vocab_size: real size; the padding beyond it gets no probability.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        logprobs [T] and entropy [T] in nats, float32, both differentiable.
    """
    head = _Head(group, weight.size(0), temperature, vocab_size)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, labels, head, chunk_tokens)
    return logprobs, entropy


class _Head:
    """What turns hidden states into this rank's tempered logits."""

    def __init__(self, group: Any, columns: int, temperature: float, vocab_size: int) -> None:
        self.group = group
        self.temperature = temperature
        self.first = group.rank() * columns
        self.real = min(columns, max(0, vocab_size - self.first))
        """Columns that are no padding."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[C, V / tp] float32."""
        logits = matmul(hidden, weight.t()).float()  # before the division, as the sampler does
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        # finite, so that 0 * log 0 in the entropy stays 0
        logits[:, self.real :] = -1e4
        return logits

    def own(self, labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Columns [C, 1] of the labels on this rank, and which labels [C] are there."""
        local = labels - self.first
        mine = (local >= 0) & (local < columns)
        return local.clamp(0, columns - 1).unsqueeze(-1), mine

    def reduce(self, values: Tensor, op: Any) -> Tensor:
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
            column, mine = head.own(labels[span], weight.size(0))
            chosen = shifted.gather(-1, column).squeeze(-1) * mine
            weighted = torch.linalg.vecdot(exponentials, shifted)
            total, weighted, chosen = head.reduce(
                torch.stack([exponentials.sum(-1), weighted, chosen]), dist.ReduceOp.SUM
            )
            log_total = total.log()
            logprobs[span] = chosen - log_total
            entropy[span] = log_total - weighted / total
            normaliser[span] = peak + log_total
            if hidden.size(0) <= chunk_tokens:  # one chunk fits, so it may as well stay for the gradient
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
        # the sum over chunks is kept in float32, which 16-bit weights would round at every chunk
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.size(0), ctx.chunk_tokens):
            span = slice(start, start + ctx.chunk_tokens)
            if kept is not None:
                surprise = kept
            else:
                surprise = head.logits(hidden[span], weight).sub_(normaliser[span].unsqueeze(-1))
            gradient = surprise.exp()  # probabilities, and then the gradient of the logits
            factor = torch.zeros_like(entropy[span]) if grad_logprobs is None else -grad_logprobs[span]
            if grad_entropy is None:
                gradient.mul_(factor.unsqueeze(-1))
            else:
                slope = (surprise + entropy[span].unsqueeze(-1)).mul_(-grad_entropy[span].unsqueeze(-1))
                gradient.mul_(slope.add_(factor.unsqueeze(-1)))
            if grad_logprobs is not None:
                column, mine = head.own(labels[span], weight.size(0))
                gradient.scatter_add_(-1, column, (grad_logprobs[span] * mine).unsqueeze(-1))
            if head.temperature != 1.0:
                gradient.div_(head.temperature)
            gradient[:, head.real :] = 0
            gradient = gradient.to(weight.dtype)
            grad_hidden[span] = matmul(gradient, weight)
            if grad_weight is not None:
                grad_weight += matmul(gradient.t(), hidden[span])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
