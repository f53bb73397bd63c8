"""How near the plan is to what is measured: python tools/bench_plan.py.

Every row is a world of its own that builds a random model and makes an update; measured is the peak of what torch's
allocator had given out, of the rank that needs most (as torch.cuda.max_memory_allocated says it on a GPU).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

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
data: {{train: {{kind: task, path: hasty_addition}}, max_prompt_tokens: {prompt}}}
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


P = "parallel"
CASES = (
    Case("one rank"),
    Case("bf16 with fp32 masters", ("model.dtype=bf16",)),
    Case("whole layers computed again", ("memory.recompute=full",)),
    Case(
        "norms and feed-forward blocks computed again",
        ("memory.recompute=selective", "memory.recompute_modules=[core_attn,layernorm,mlp]"),
    ),
    Case("micro-batches of one sequence", ("batching.max_tokens_per_micro_batch=1024",)),
    Case("adapters alone learn", ("lora.rank=16", "memory.recompute=full")),
    Case("DP2, optimizer sharded", (), 2),
    Case("TP2 with sequence parallelism", (f"{P}.tensor_parallel_size=2", f"{P}.sequence_parallel=true"), 2),
    Case("PP2, four micro-batches", (f"{P}.pipeline_parallel_size=2", "batching.max_tokens_per_micro_batch=1024"), 2),
    Case("EP2, 8 experts", (f"{P}.expert_parallel_size=2",), 2, "qwen3_moe"),
)  # fmt: skip


def write_models(folder: Path) -> None:
    """Both models, and the configuration of the runs."""
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


def measure(config_file: Path, overrides: list[str]) -> dict[str, float]:
    """Peak of this rank in MB, over an update."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import megatron_rl.loop  # noqa: F401  everything that a run imports
    from megatron_rl.batching.plan import given_batch
    from megatron_rl.batching.sequences import bare_sequence
    from megatron_rl.config import load_config
    from megatron_rl.mcore.parallel import init_parallel, leave_world
    from megatron_rl.mcore.policy import Policy

    config = load_config(config_file, overrides)
    parallel = init_parallel(config.parallel)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        policy = Policy(config, parallel)
        generator = torch.Generator().manual_seed(parallel.dp_rank)
        length, mine = PROMPT + RESPONSE, NUM_SEQUENCES // parallel.dp_size
        rows = [torch.randint(0, policy.spec.vocab_size, (length,), generator=generator) for _ in range(mine)]
        room = max(1, config.batching.max_tokens_per_micro_batch // length)
        batches = [range(start, min(start + room, mine)) for start in range(0, mine, room)]
        sequences = [bare_sequence(row, torch.arange(length) >= PROMPT) for row in rows]
        policy.update(given_batch(sequences, batches, num_updates=1))
    leave_world()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return {"peak_mb": max(accumulate(sizes)) / 1e6}


def measured_mb(folder: Path, case: Case) -> float:
    """Of the rank that needs most.

    Raises:
        RuntimeError: a rank fails.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.world_size}"),
        *(__file__, "--measure", str(folder / f"{case.family}.yaml"), *case.overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line)["peak_mb"] for line in done.stdout.splitlines() if line.startswith('{"peak_mb"')]
    if done.returncode or len(found) != case.world_size:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return float(max(found))


def planned_mb(folder: Path, case: Case) -> float:
    """The same from the configuration alone."""
    from megatron_rl.config import load_config
    from megatron_rl.models import read_model_spec
    from megatron_rl.planning.memory import model_memory
    from megatron_rl.planning.workload import workload_of

    config = load_config(folder / f"{case.family}.yaml", list(case.overrides))
    stages = model_memory(read_model_spec(config.model.path), config, workload_of(config), case.world_size)
    return max(sum(stage.parts.values()) + stage.activations for stage in stages) / 1e6


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", nargs="+", metavar=("FILE", "OVERRIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        config_file, *overrides = arguments.measure
        print(json.dumps(measure(Path(config_file), overrides)), flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        print("| configuration | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|")
        for case in CASES:
            planned, measured = planned_mb(folder, case), measured_mb(folder, case)
            print(f"| {case.title} | {planned:.0f} | {measured:.0f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
