"""What is wrong with this machine: python tools/doctor.py [--config FILE] [key=value …], alone, under torchrun or srun.

One line for each check, with what to do about it; ranks that are slow or broken are named with their host. The status
is 1 where something will not work.
"""

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_rl.checkpointing.resume import check_resumable
from megatron_rl.config import RunConfig, load_config, validate
from megatron_rl.config.parallel import ParallelSection
from megatron_rl.data.prompts import load_prompts
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.doctor.finding import Finding, error, ok, report, warning, worst
from megatron_rl.doctor.host import attempt, check_host
from megatron_rl.doctor.speeds import all_reduce_gb_s, described, judge, measure
from megatron_rl.errors import CheckpointError, MegatronRLError
from megatron_rl.evaluation.in_training import read_benchmark_suite
from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world
from megatron_rl.run_folder import RunFolder


def check_run(config: RunConfig, resume: str, world_size: int | None) -> Iterator[Finding]:
    """What is the same on every host, for one rank to look at. Data sets are in the cache afterwards.

    Args:
        resume: as training takes it.
        world_size: None: not known, as it was not started like a run.
    """

    def layout() -> str:
        assert world_size is not None
        validate(config, world_size)
        return f"it can be trained by {world_size} ranks"

    def data() -> str:
        tokenizer = load_tokenizer(config.model.path)
        found = [f"{len(load_prompts(config.data.train, config.data, tokenizer).prompts)} training prompts"]
        if config.data.validation is not None:
            held_out = load_prompts(config.data.validation, config.data, tokenizer).prompts
            found.append(f"{len(held_out)} held-out prompts")
        suite = read_benchmark_suite(config, tokenizer)
        return ", ".join([*found, *([f"{len(suite.exams)} benchmarks"] if suite is not None else [])])

    if world_size is not None:
        yield attempt("layout", layout)
    yield attempt("data", data)
    yield beginning(config, resume)


def beginning(config: RunConfig, resume: str) -> Finding:
    """Where the run would go on."""
    try:
        checkpoint = RunFolder(config.run.output_dir).find_resume(resume)
        if checkpoint is not None:
            check_resumable(checkpoint, config)
    except CheckpointError as failure:
        if resume == "auto":
            return warning("checkpoint", str(failure), "the run goes on from the one before, if there is one")
        return error("checkpoint", str(failure), "see above")
    except MegatronRLError as failure:
        return error("checkpoint", str(failure), "see above")
    return ok("checkpoint", f"goes on from {checkpoint}" if checkpoint else "none: begins at step 0")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/doctor.py", description="What is wrong with this machine.")
    parser.add_argument("--config", metavar="FILE", help="also check the model, engine and folder of a run")
    parser.add_argument(
        "--measure", metavar="FILE", type=Path, help="write what was measured, for tools/plan.py --hardware"
    )
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where the run would begin")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(asked.config, asked.overrides) if asked.config else None
        parallel = init_parallel(ParallelSection(timeout_minutes=30))
    except MegatronRLError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 1
    host = socket.gethostname()
    # one rank of each host looks at it
    firsts = gather_objects(host, parallel)
    mine = [(host, one) for one in check_host(config)] if firsts.index(host) == parallel.rank else []
    if is_main and config is not None:
        world_size = parallel.world_size if "WORLD_SIZE" in os.environ else None
        mine += [(host, one) for one in check_run(config, asked.resume, world_size)]
    findings = [one for part in gather_objects(mine, parallel) for one in part]
    speeds, link = measure(parallel), all_reduce_gb_s(parallel)
    findings += judge(speeds, link)
    hardware = described(parallel, speeds, link)
    leave_world()
    if is_main:
        print(report(findings))
        if asked.measure is not None:
            asked.measure.write_text(yaml.safe_dump(asdict(hardware)))
    return 1 if worst(findings) == "error" else 0


if __name__ == "__main__":
    sys.exit(main())
