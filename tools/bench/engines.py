"""Run the quickstart's GRPO on several engines, from the same fine-tuned models: python tools/bench/engines.py.

Prints the mean held-out accuracy over the seeds at every evaluation, per engine, with the standard deviation between
seeds. The learning curves must agree within it.
"""

import argparse
from pathlib import Path

from megatron_rl.cli import run_logged
from megatron_rl.metrics.sinks import read_rows
from megatron_rl.reporting.study import Curve, curve_of, curve_table, markdown

ROOT = Path(__file__).resolve().parents[2]

METRIC = "val/exact_match"
ENVIRONMENTS = {"embedded": ".venv", "vllm": ".venv-vllm", "sglang": ".venv-sglang"}
# the same number of parameters as the quickstart's model, with a head size that the engines' CPU kernels support
HEADS = ("--num-attention-heads", "2", "--num-key-value-heads", "1")


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Compare the quickstart's learning curve on several engines.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--engines", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), help="engines (all)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "engines", help="folder of the runs (runs/engines)"
    )
    args = parser.parse_args()
    curves = {
        engine: [curve(args.folder / f"seed_{seed}", seed, engine) for seed in args.seeds] for engine in args.engines
    }
    print(markdown(curve_table("engine", curves)))


def curve(folder: Path, seed: int, engine: str) -> Curve:
    """Held-out accuracy by step of one GRPO run; trains it unless it has finished."""
    model = folder / "sft" / "checkpoints" / "step_001800" / "hf"
    if not model.exists():
        _run("embedded", folder / "sft.log", "python", "tools/make_toy_model.py", "--output", str(folder / "init"),
             "--seed", str(seed), *HEADS)  # fmt: skip
        _train("embedded", folder / "sft.log", seed, "sft", folder / "init", folder / "sft")
    run = folder / engine
    _train(engine, folder / f"{engine}.log", seed, "grpo", model, run)
    return curve_of(read_rows(run / "metrics.jsonl"), METRIC)


def _train(engine: str, log: Path, seed: int, recipe: str, model: Path, run: Path) -> None:
    _run(
        engine, log, "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "megatron_rl.train",
        "--config", f"configs/quickstart/{recipe}.yaml", f"model.path={model}", f"run.output_dir={run}",
        f"run.seed={seed}", f"rollout.engine={engine}",
    )  # fmt: skip


def _run(engine: str, log: Path, *command: str) -> None:
    run_logged(command, log, programs=ROOT / ENVIRONMENTS[engine] / "bin", cwd=ROOT)


if __name__ == "__main__":
    main()
