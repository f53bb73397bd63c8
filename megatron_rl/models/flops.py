"""Floating-point operations of a model, and peak rates of GPUs."""

from megatron_rl.models.spec import ModelSpec

# part of the device's name -> dense bf16 peak in TFLOP/s; source: NVIDIA's data sheets
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def forward_flops(spec: ModelSpec, *, num_tokens: int, sum_squared_lengths: int, num_logit_tokens: int) -> float:
    """Return the operations of one forward pass; a backward pass needs twice as many.

    Counts two operations for each multiplication of a token with a weight (in a mixture of experts only those of the
    chosen experts), and for the scores and weighted values of causal attention, half of the square of every sequence's
    length. Does not count embeddings, norms, rotations, softmax, padding or recomputation.

    Args:
        num_tokens: tokens of all sequences.
        sum_squared_lengths: sum of the squared lengths of all sequences.
        num_logit_tokens: tokens whose logits are computed.

    Source: PaLM, arXiv 2204.02311, appendix B, with causal attention halved.
    """
    heads = spec.num_heads * spec.head_dim
    attention = spec.hidden_size * (heads + 2 * spec.num_query_groups * spec.head_dim) + heads * spec.hidden_size
    if spec.moe is None:
        feed_forward = 3 * spec.hidden_size * spec.ffn_hidden_size
    else:
        chosen = 3 * spec.hidden_size * spec.moe.ffn_hidden_size * spec.moe.experts_per_token
        feed_forward = chosen + spec.hidden_size * spec.moe.num_experts
    weights = spec.num_layers * (attention + feed_forward)
    scores = spec.num_layers * 2 * heads * sum_squared_lengths / 2
    return 2.0 * (num_tokens * weights + scores + num_logit_tokens * spec.hidden_size * spec.vocab_size)


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in TFLOP/s; None if it is not in the table."""
    matching = [name for name in PEAK_TFLOPS if all(word in device_name for word in name.split())]
    return PEAK_TFLOPS[max(matching, key=len)] if matching else None
