"""Check this machine and, optionally, a run: python tools/doctor.py [--config FILE] [key=value …].

Runs alone, under torchrun or under srun. Prints one line per check, with a remedy; names the host of a slow or broken
rank. The exit status is 1 if a check finds an error.
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
from megatron_rl.doctor.speeds import all_reduce_gb_s, check_speeds, measure, measured_hardware
from megatron_rl.errors import CheckpointError, MegatronRLError
from megatron_rl.evaluation.in_training import read_benchmark_suite
from megatron_rl.mcore.runtime.parallel import init_parallel, leave_world
from megatron_rl.run_folder import RunFolder


def check_run(config: RunConfig, resume: str, world_size: int | None) -> Iterator[Finding]:
    """Check what is the same on every host, on one rank. Afterwards the run's data sets are in the cache.

    Args:
        resume: value of ``--resume`` of the training.
        world_size: number of ranks of the run; None if unknown, because the doctor was not started under a launcher.
    """

    def layout() -> str:
        assert world_size is not None
        validate(config, world_size)
        return f"it can be trained by {world_size} ranks"

    def data() -> str:
        tokenizer = load_tokenizer(config.model.path)
        counts = [f"{len(load_prompts(config.data.train, config.data, tokenizer).prompts)} training prompts"]
        if config.data.validation is not None:
            held_out = load_prompts(config.data.validation, config.data, tokenizer).prompts
            counts.append(f"{len(held_out)} held-out prompts")
        suite = read_benchmark_suite(config, tokenizer)
        return ", ".join([*counts, *([f"{len(suite.benchmarks)} benchmarks"] if suite is not None else [])])

    if world_size is not None:
        yield attempt("layout", layout)
    yield attempt("data", data)
    yield check_resume(config, resume)


def check_resume(config: RunConfig, resume: str) -> Finding:
    """Check the checkpoint that the run would resume from."""
    try:
        checkpoint = RunFolder(config.run.output_dir).find_resume(resume)
        if checkpoint is not None:
            check_resumable(checkpoint, config)
    except CheckpointError as failure:
        if resume == "auto":
            return warning("checkpoint", str(failure), "the run resumes from the previous checkpoint, if there is one")
        return error("checkpoint", str(failure), "see above")
    except MegatronRLError as failure:
        return error("checkpoint", str(failure), "see above")
    return ok("checkpoint", f"resumes from {checkpoint}" if checkpoint else "none: starts at step 0")


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(prog="tools/doctor.py", description="Check this machine and, optionally, a run.")
    parser.add_argument(
        "--config", metavar="FILE", help="also check this run: its model, data, engine, layout and checkpoint"
    )
    parser.add_argument(
        "--measure",
        metavar="FILE",
        type=Path,
        help="write the measured speeds as a YAML file for tools/plan.py --hardware",
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="checkpoint that the run would resume from (auto)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(args.config, args.overrides) if args.config else None
        parallel = init_parallel(ParallelSection(timeout_minutes=30))
    except MegatronRLError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 1
    host = socket.gethostname()
    # the first rank of each host checks it
    hosts = gather_objects(host, parallel)
    own_findings = [(host, finding) for finding in check_host(config)] if hosts.index(host) == parallel.rank else []
    if is_main and config is not None:
        world_size = parallel.world_size if "WORLD_SIZE" in os.environ else None
        own_findings += [(host, finding) for finding in check_run(config, args.resume, world_size)]
    findings = [finding for part in gather_objects(own_findings, parallel) for finding in part]
    speeds, link = measure(parallel), all_reduce_gb_s(parallel)
    findings += check_speeds(speeds, link)
    hardware = measured_hardware(parallel, speeds, link)
    leave_world()
    if is_main:
        print(report(findings))
        if args.measure is not None:
            args.measure.write_text(yaml.safe_dump(asdict(hardware)))
    return 1 if worst(findings) == "error" else 0


if __name__ == "__main__":
    sys.exit(main())
