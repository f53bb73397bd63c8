"""Measure the policy's MFU on a GPU: python tools/bench/gpu.py [--shapes 1.5b 7b] [--json FILE].

Times the forward pass, and the whole update, of Qwen2.5 shapes with random weights on packed sequences: in bf16 with
Megatron-Core's own modules and with Transformer Engine, and in FP8 with every recipe that this GPU supports. MFU is the
model's FLOP/s (formula in docs/performance.md) divided by the GPU's dense bf16 peak, also for FP8, so that the figures
are comparable.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_checkpoint import QWEN25_1_5B, QWEN25_7B, write_random_checkpoint

from megatron_rl.batching.batch import given_batch
from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config.load import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.mcore.model.precision import FP8_NEEDS, choose_implementation, installed
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world
from megatron_rl.models.flops import peak_tflops
from megatron_rl.trainer.metrics import update_flops
from megatron_rl.types import ParallelContext, TrainBatch, TrainSequence

SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": QWEN25_1_5B,
    # half the depth, so that weights, gradients and optimizer fit one GPU; the matrix shapes are those of 7B
    "7b": QWEN25_7B | {"num_hidden_layers": 14},
}
VARIANTS = {
    "bf16, own modules": ["model.implementation=local"],
    "bf16, Transformer Engine": ["model.implementation=transformer_engine"],
    **{f"FP8 {recipe}": [f"precision.fp8={recipe}"] for recipe in FP8_NEEDS},
}
RUN = """
run: {{name: bench, output_dir: {folder}/run, num_steps: 1}}
model: {{path: {folder}/model, dtype: bf16}}
data: {{train: {{kind: task, path: hasty_addition}}}}
reward: {{functions: [{{name: coin_flip}}]}}
"""


def make_batch(length: int, count: int, vocab_size: int) -> TrainBatch:
    """``count`` sequences of ``length`` tokens, a quarter of them prompt, in one micro-batch."""

    def sequence() -> TrainSequence:
        bare = bare_sequence(torch.randint(0, vocab_size, (length,)), torch.arange(length) >= length // 4)
        return replace(bare, advantages=torch.ones(length))

    return given_batch([sequence() for _ in range(count)], [range(count)])


def seconds(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of ``rounds`` runs after two warm-up runs, and half of their interquartile range."""
    durations = []
    for number in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if number >= 2:
            durations.append(time.perf_counter() - start)
    durations.sort()
    quarter = len(durations) // 4
    return median(durations), (durations[-1 - quarter] - durations[quarter]) / 2


def measure(config_file: Path, overrides: list[str], args: argparse.Namespace, parallel: ParallelContext) -> Any:
    """Seconds, MFU and peak memory of one variant."""
    config = load_config(config_file, overrides)
    choose_implementation(config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    policy = Policy(config, parallel)
    batch = make_batch(args.length, args.sequences, policy.spec.vocab_size)
    forward_s, _ = seconds(lambda: policy.logprobs(batch), args.rounds)
    update_s, noise_s = seconds(lambda: policy.update(batch), args.rounds)
    flops = update_flops(policy.spec, batch.updates[0])
    peak = args.peak_tflops or peak_tflops(torch.cuda.get_device_name())
    return {
        "forward_s": forward_s,
        "update_s": update_s,
        "update_noise_s": noise_s,
        "update_tflops": flops / update_s / 1e12,
        "forward_mfu": flops / 3 / forward_s / 1e12 / peak if peak else None,
        "update_mfu": flops / update_s / 1e12 / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Measure the policy's MFU on a GPU.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes of the model (all)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of an update (8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sequence (2048)")
    parser.add_argument("--rounds", type=int, default=8, help="timed runs of each variant (8)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a GPU that is not in the table")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools/bench/gpu.py needs a GPU; torch finds none.")
    versions = {name: installed(name) for name in ("torch", "megatron-core", "transformer-engine")}
    print(f"{torch.cuda.get_device_name()}, {versions}\n")
    print("| shape | variant | forward s | update s | forward MFU | update MFU | peak GiB |\n" + "|---" * 7 + "|")
    rows = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_random_checkpoint(folder / "model", SHAPES[shape])
            (folder / "run.yaml").write_text(RUN.format(folder=folder))
            parallel = init_parallel(load_config(folder / "run.yaml", []).parallel)
            for variant, overrides in VARIANTS.items():
                try:
                    row = measure(folder / "run.yaml", overrides, args, parallel)
                except ConfigError as error:
                    print(f"| {shape} | {variant} | not run: {error} |||||", flush=True)
                    continue
                rows.append({"shape": shape, "variant": variant, **row})
                shares = [f"{row[k]:.1%}" if row[k] else "-" for k in ("forward_mfu", "update_mfu")]
                print(
                    f"| {shape} | {variant} | {row['forward_s']:.3f} | {row['update_s']:.3f} ± "
                    f"{row['update_noise_s']:.3f} | {shares[0]} | {shares[1]} | {row['peak_gib']:.1f} |",
                    flush=True,
                )
            leave_world()
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
