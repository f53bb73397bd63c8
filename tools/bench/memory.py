"""Measure what each memory setting saves: python tools/bench/memory.py.

Each row is a separate process that makes one update of a random model on one rank. The figure is the rise of the
process's peak memory during the update (or the memory that offloading to the host freed).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (1024,) * 4
SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 16384}
RUN = """
run: {{name: memory, output_dir: {folder}/run, num_steps: 1}}
model: {{path: {folder}/model, dtype: fp32}}
data: {{train: {{kind: task, path: hasty_addition}}}}
rollout: {{source: demonstrations}}
algorithm: {{loss: nll}}
"""
ALL_LOGITS = "batching.logprob_chunk_tokens=100000"  # all logits of the batch at once
ROWS: dict[str, list[str]] = {
    "all logits at once, no recomputation": [ALL_LOGITS],
    "logits of 512 tokens at a time": ["batching.logprob_chunk_tokens=512"],
    "+ attention recomputed": ["batching.logprob_chunk_tokens=512", "memory.recompute=selective"],
    "+ norms and feed-forward blocks recomputed": [
        "batching.logprob_chunk_tokens=512",
        "memory.recompute=selective",
        "memory.recompute_modules=[core_attn,layernorm,mlp]",
    ],
    "+ whole layers recomputed": ["batching.logprob_chunk_tokens=512", "memory.recompute=full"],
    "+ LoRA adapters only (lora.rank=16)": [
        "batching.logprob_chunk_tokens=512",
        "memory.recompute=full",
        "lora.rank=16",
    ],
    "+ frozen weights in 8 bits (lora.quantize=int8)": [
        "batching.logprob_chunk_tokens=512",
        "memory.recompute=full",
        "lora.rank=16",
        "lora.quantize=int8",
    ],
    "or frozen weights in 4 bits (lora.quantize=nf4)": [
        "batching.logprob_chunk_tokens=512",
        "memory.recompute=full",
        "lora.rank=16",
        "lora.quantize=nf4",
    ],
    "all weights trained, whole layers recomputed in pairs": [
        "batching.logprob_chunk_tokens=512",
        "memory.recompute=full",
        "memory.recompute_num_layers=2",
    ],
}
OFFLOAD = ["params", "grads", "optimizer"]


def measure(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Figures of one update, in MiB and seconds.

    Returns:
        risen_mib: rise of the peak memory during the update.
        seconds: duration of the update.
        freed_mib: memory that ``memory.offload`` freed.
        learning_mib: gradients and optimizer.
        weights_mib: weights.
    """
    import time

    import torch

    from megatron_rl.batching.batch import given_batch
    from megatron_rl.batching.sequences import bare_sequence
    from megatron_rl.config.load import load_config
    from megatron_rl.mcore.policy import Policy
    from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

    config = load_config(folder / "run.yaml", overrides)
    policy = Policy(config, init_parallel(config.parallel))
    tokens = [torch.randint(0, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    batch = given_batch([bare_sequence(row, torch.ones_like(row).bool()) for row in tokens], [range(len(LENGTHS))])
    before, start = _peak_mib(), time.perf_counter()
    policy.update(batch)
    seconds = time.perf_counter() - start
    risen = _peak_mib() - before
    parts = policy.learner.memory()
    freed = policy.learner.to_host() / 2**20
    policy.learner.to_device()
    leave_world()
    learning = (parts["grads"] + parts["optimizer"]) / 2**20
    weights = parts["params"] / 2**20
    return {
        "risen_mib": risen,
        "seconds": seconds,
        "freed_mib": freed,
        "learning_mib": learning,
        "weights_mib": weights,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _row(folder: Path, overrides: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Measure what each memory setting saves.")
    parser.add_argument("--measure", nargs="+", metavar=("FOLDER", "OVERRIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, *overrides = args.measure
        print(json.dumps(measure(Path(folder), overrides)))
        return
    from megatron_rl.models.toy import make_model, make_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model("qwen2", tied=True, max_position_embeddings=2048, **SIZES).save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        (folder / "run.yaml").write_text(RUN.format(folder=folder))
        print(f"{len(LENGTHS)} sequences of {LENGTHS[0]} tokens, {SIZES}, fp32\n")
        columns = ("what", "peak of an update, MiB", "weights, MiB", "gradients and optimizer, MiB", "seconds")
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for title, overrides in ROWS.items():
            row = _row(folder, overrides)
            memory = f"{row['risen_mib']:.0f} | {row['weights_mib']:.1f} | {row['learning_mib']:.1f}"
            print(f"| {title} | {memory} | {row['seconds']:.1f} |", flush=True)
        print("\n| memory.offload | freed, MiB |\n|---|---|")
        for part in OFFLOAD:
            print(f"| {part} | {_row(folder, [f'memory.offload=[{part}]'])['freed_mib']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
