"""Compare the plan with measurements on this machine: python tools/bench/plan.py [--time].

Each row starts its own ranks, which build a random model and make an update. The measured memory is the peak of torch's
allocator on the rank that needs most (as torch.cuda.max_memory_allocated reports it on a GPU). With --time the rows
have the seconds of an update, and the plan is made for this machine as the doctor measures it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.planning.hardware import Hardware

PROMPT, RESPONSE = 16, 1008
NUM_SEQUENCES = 4
DENSE = {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1536, "vocab_size": 16384}
HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 16384,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
RUN = """
run: {{name: plan, output_dir: {folder}/run, num_steps: 1}}
model: {{path: {folder}/{family}, dtype: fp32}}
data: {{train: {{kind: task, path: hasty_addition, demonstration_field: demonstration}}, max_prompt_tokens: {prompt}}}
rollout: {{source: demonstrations, num_prompts_per_step: {sequences}, group_size: 1, max_new_tokens: {response}}}
algorithm: {{loss: nll}}
batching: {{max_tokens_per_micro_batch: 4096}}
"""


@dataclass(frozen=True)
class Case:
    """A configuration that is both planned and measured."""

    title: str
    overrides: tuple[str, ...] = ()
    world_size: int = 1
    family: str = "qwen2"


ONE_EACH = "batching.max_tokens_per_micro_batch=1024"
TP2 = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
PP2 = "parallel.pipeline_parallel_size=2"
CASES = (
    Case("one rank"),
    Case("bf16 with fp32 masters", ("model.dtype=bf16",)),
    Case("full recomputation", ("memory.recompute=full",)),
    Case(
        "norms and feed-forward blocks recomputed",
        ("memory.recompute=selective", "memory.recompute_modules=[core_attn,layernorm,mlp]"),
    ),
    Case("micro-batches of one sequence", (ONE_EACH,)),
    Case("LoRA adapters only", ("lora.rank=16", "memory.recompute=full")),
    Case("DP2, optimizer sharded", (), 2),
    Case("TP2 with sequence parallelism", TP2, 2),
    Case("PP2, four micro-batches", (PP2, ONE_EACH), 2),
    Case("EP2, 8 experts", ("parallel.expert_parallel_size=2",), 2, "qwen3_moe"),
)  # fmt: skip

LAYOUTS = (
    Case("DP2", (), 2),
    Case("DP2, full recomputation", ("memory.recompute=full",), 2),
    Case("TP2", TP2, 2),
    Case("TP2, full recomputation", (*TP2, "memory.recompute=full"), 2),
    Case("CP2", ("parallel.context_parallel_size=2",), 2),
    Case("PP2, four micro-batches", (PP2, ONE_EACH), 2),
    Case("PP2, one micro-batch", (PP2,), 2),
)
ROUNDS = 2
Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def write_models(folder: Path) -> None:
    """Write both models, and the configuration of a run for each."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    for family, model in (
        ("qwen2", Qwen2ForCausalLM(Qwen2Config(**HEADS, **DENSE))),
        ("qwen3_moe", Qwen3MoeForCausalLM(Qwen3MoeConfig(**HEADS, **EXPERTS))),
    ):
        model.save_pretrained(folder / family)
        text = RUN.format(folder=folder, family=family, prompt=PROMPT, response=RESPONSE, sequences=NUM_SEQUENCES)
        (folder / f"{family}.yaml").write_text(text)


def peak_mb_of_an_update(config_file: Path, overrides: list[str]) -> float:
    """Peak of torch's allocator on this rank in one update, in MB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds_of_updates(config_file, overrides, 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes)) / 1e6


def seconds_of_updates(config_file: Path, overrides: list[str], count: int) -> list[float]:
    """Seconds of each of ``count`` updates of a new model; collective."""
    import torch

    import megatron_rl.trainer.setup  # noqa: F401  everything that a run imports
    from megatron_rl.batching.batch import given_batch
    from megatron_rl.batching.sequences import bare_sequence
    from megatron_rl.config import load_config
    from megatron_rl.distributed.collectives import barrier
    from megatron_rl.mcore.policy import Policy
    from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world

    config = load_config(config_file, overrides)
    parallel = init_parallel(config.parallel)
    policy = Policy(config, parallel)
    generator = torch.Generator().manual_seed(parallel.dp_rank)
    length, num_rows = PROMPT + RESPONSE, NUM_SEQUENCES // parallel.dp_size
    rows = [torch.randint(0, policy.spec.vocab_size, (length,), generator=generator) for _ in range(num_rows)]
    per_micro_batch = max(1, config.batching.max_tokens_per_micro_batch * parallel.cp_size // length)
    batches = [range(start, min(start + per_micro_batch, num_rows)) for start in range(0, num_rows, per_micro_batch)]
    batch = given_batch([bare_sequence(row, torch.arange(length) >= PROMPT) for row in rows], batches)
    durations = []
    for _ in range(count):
        barrier(parallel)
        start = time.perf_counter()
        policy.update(batch)
        barrier(parallel)
        durations.append(time.perf_counter() - start)
    leave_world()
    return durations


def run_captured(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command and return its exit status and output."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measured_mb(folder: Path, case: Case, run: Run = run_captured) -> float:
    """Measured peak in MB of the rank that needs most.

    Args:
        run: runs a command.

    Raises:
        RuntimeError: a rank fails.
    """
    return max(result["peak_mb"] for result in measure_ranks(folder, case, "memory", run))


def measured_seconds(folder: Path, case: Case) -> float:
    """Measured seconds of an update: the fastest but for the first one, on the slowest rank.

    Raises:
        RuntimeError: a rank fails.
    """
    return max(min(result["seconds"][1:]) for result in measure_ranks(folder, case, "time"))


def measure_ranks(folder: Path, case: Case, what: str, run: Run = run_captured) -> list[dict[str, Any]]:
    """Run a case under torchrun; the figures that each rank prints.

    Args:
        what: ``memory`` or ``time``.
        run: runs a command.

    Raises:
        RuntimeError: a rank fails.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.world_size}"),
        *(__file__, "--measure", what, str(folder / f"{case.family}.yaml"), *case.overrides),
    ]
    done = run(command)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or len(results) != case.world_size:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return results


def planned_mb(folder: Path, case: Case) -> float:
    """Planned peak in MB of the rank that needs most."""
    from megatron_rl.config import load_config
    from megatron_rl.models import read_model_spec
    from megatron_rl.planning.memory import model_memory
    from megatron_rl.planning.workload import workload_of

    config = load_config(folder / f"{case.family}.yaml", list(case.overrides))
    stages = model_memory(read_model_spec(config.model.path), config, workload_of(config), case.world_size)
    return max(sum(stage.parts.values()) + stage.activations for stage in stages) / 1e6


def planned_seconds(folder: Path, case: Case, hardware: "Hardware") -> float:
    """Planned seconds of an update."""
    from megatron_rl.config import load_config
    from megatron_rl.planning.plan import make_plan

    config = load_config(folder / f"{case.family}.yaml", list(case.overrides))
    plan = make_plan(config, hardware, case.world_size, mean_prompt=PROMPT, mean_response=RESPONSE)
    return plan.seconds["update"]


def this_machine(folder: Path) -> "Hardware":
    """This machine as the doctor measures it with two ranks."""
    from megatron_rl.planning.hardware import read_hardware

    path = folder / "hardware.yaml"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    doctor = str(Path(__file__).parents[1] / "doctor.py")
    subprocess.run([*launch, doctor, "--measure", str(path)], capture_output=True, check=True)
    return read_hardware(str(path))


def show_memory(folder: Path) -> None:
    """Print planned and measured memory of all cases."""
    print("| configuration | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|")
    for case in CASES:
        planned, measured = planned_mb(folder, case), measured_mb(folder, case)
        print(f"| {case.title} | {planned:.0f} | {measured:.0f} | {planned / measured:.2f} |", flush=True)


def show_time(folder: Path) -> None:
    """Print planned and measured seconds of all layouts, fastest first, and how many pairs are ordered correctly."""
    hardware = this_machine(folder)
    planned = {case.title: planned_seconds(folder, case, hardware) for case in LAYOUTS}
    durations: dict[str, list[float]] = {case.title: [] for case in LAYOUTS}
    for _ in range(ROUNDS):
        for case in LAYOUTS:
            durations[case.title].append(measured_seconds(folder, case))
    measured = {title: median(seconds) for title, seconds in durations.items()}
    print(f"{hardware.tflops * 1000:.0f} GFLOP/s and {hardware.link_gb_s:.2f} GB/s of all-reduce between two ranks\n")
    print("| layout of two ranks | planned, s | measured, s (least and most) | planned / measured |\n|---|---|---|---|")
    for title in sorted(measured, key=lambda title: measured[title]):
        least, most = min(durations[title]), max(durations[title])
        ratio = planned[title] / measured[title]
        print(f"| {title} | {planned[title]:.2f} | {measured[title]:.2f} ({least:.2f} to {most:.2f}) | {ratio:.2f} |")
    distinct = [
        (a, b)
        for a, b in combinations(measured, 2)
        if max(durations[a]) < min(durations[b]) or max(durations[b]) < min(durations[a])
    ]
    right = sum((planned[a] < planned[b]) == (measured[a] < measured[b]) for a, b in distinct)
    print(f"\n{right} of the {len(distinct)} pairs whose measurements do not overlap are in the right order")


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Compare the plan with measurements on this machine.")
    parser.add_argument("--time", action="store_true", help="compare the seconds of layouts instead of memory")
    parser.add_argument("--measure", nargs="+", metavar=("WHAT", "FILE OVERRIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, config_file, *overrides = args.measure
        path = Path(config_file)
        if what == "memory":
            result: dict[str, Any] = {"peak_mb": peak_mb_of_an_update(path, overrides)}
        else:
            result = {"seconds": seconds_of_updates(path, overrides, 1 + ROUNDS)}
        os.write(1, f"{json.dumps(result)}\n".encode())  # one write call, because the ranks share the pipe
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        (show_time if args.time else show_memory)(folder)


if __name__ == "__main__":
    main()
