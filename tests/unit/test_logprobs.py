"""Chunked log-probabilities against torch's softmax, and their peak memory."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.mcore.model.logprobs import linear_logprobs
from tests.covering import chosen
from tests.limits import LIMIT_S

ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("outputs_with_loss", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_those_of_torch(
    outputs_with_loss: str, temperature: float, chunk_tokens: int
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    labels, vocab_size = torch.randint(0, 11, (8,)), 11
    scales = torch.randn(2, 8)
    if outputs_with_loss != "both":
        scales[int(outputs_with_loss == "logprobs")] = 0

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        parts = []
        if outputs_with_loss != "entropy":
            parts.append((scales[0] * logprobs).sum())
        if outputs_with_loss != "logprobs":
            parts.append((scales[1] * entropy).sum())
        return torch.stack(parts).sum()

    actual = linear_logprobs(
        hidden, weight, labels, ONE_RANK, temperature=temperature, vocab_size=vocab_size, chunk_tokens=chunk_tokens
    )
    gradients = torch.autograd.grad(loss(*actual), [hidden, weight])

    whole = ((hidden @ weight.t())[:, :vocab_size] / temperature).log_softmax(-1)
    expected = whole.gather(1, labels[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(loss(*expected), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_has_a_zero_gradient() -> None:
    hidden, weight = torch.randn(0, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    logprobs, _ = linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), ONE_RANK, temperature=1.0, vocab_size=13, chunk_tokens=4
    )
    (gradient,) = torch.autograd.grad(logprobs.sum(), [weight])
    assert not gradient.any()


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """The sum over many small chunks is rounded no more than that of one large chunk."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 8).bfloat16()
    labels = torch.randint(0, 32, (512,))
    gradients = []
    for chunk_tokens in (4, 512):
        weight = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        logprobs, _ = linear_logprobs(
            hidden, weight, labels, ONE_RANK, temperature=1.0, vocab_size=32, chunk_tokens=chunk_tokens
        )
        gradients.append(torch.autograd.grad(logprobs.sum(), [weight])[0])
    # each product is rounded to bf16 before it is summed, so a few elements differ by half a unit in the last place
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=0.1)


MEASURE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
import megatron_rl.mcore
from megatron_rl.mcore.model.logprobs import linear_logprobs
from megatron_rl.models.logit_chunks import default_chunk_tokens
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()  # resource.getrusage includes the parent's peak
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
share, vocabulary, hidden_size = int(sys.argv[1]), 152064, 16
tokens = 8 * 2048 // share
weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
def forward_and_backward(tokens):
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    logprobs, entropy = linear_logprobs(
        hidden, weight, labels, group, temperature=1.0, vocab_size=vocabulary,
        chunk_tokens=default_chunk_tokens(vocabulary) // share,
    )
    (logprobs + 0.1 * entropy).sum().backward()
forward_and_backward(4)  # what is allocated once does not count
before = peak()
forward_and_backward(tokens)
print((peak() - before) / (4 * tokens * vocabulary))
"""


@pytest.mark.parametrize("share", chosen([1, 4], [4]))
def test_peak_memory_of_a_large_vocabulary(share: int) -> None:
    """Forward and backward of [8 x 2048] tokens and 152k entries need under 0.2 of the memory of the fp32 logits.

    ``make test`` takes a quarter of the tokens, in chunks of a quarter of the default.
    """
    command = [sys.executable, "-c", MEASURE, str(share)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert 0 < float(done.stdout.split()[-1]) < 0.2
