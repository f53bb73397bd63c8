"""What is wrong with this machine: python tools/doctor.py [--config FILE] [key=value …], alone, under torchrun or srun.

One line for each check, with what to do about it; ranks that are slow or broken are named with their host. The status
is 1 where something will not work.
"""

import argparse
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_rl.collective import gather_objects
from megatron_rl.config import load_config
from megatron_rl.config.machine import ParallelSection
from megatron_rl.doctor.finding import report, worst
from megatron_rl.doctor.host import check_host
from megatron_rl.doctor.speeds import all_reduce_gb_s, described, judge, measure
from megatron_rl.errors import MegatronRLError
from megatron_rl.mcore.parallel import init_parallel, leave_world


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/doctor.py", description="What is wrong with this machine.")
    parser.add_argument("--config", metavar="FILE", help="also check the model, engine and folder of a run")
    parser.add_argument(
        "--measure", metavar="FILE", type=Path, help="write what was measured, for tools/plan.py --hardware"
    )
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
