"""Time one GRPO step side by side: this project, TRL and a plain PyTorch loop, on the same model and the same work.

make bench-step                                                   sets TRL up in an environment of its own, all sizes
python tools/bench/step.py --without-trl --sizes 1m --rounds 20   without TRL

Contenders take turns, a step each, so that whatever else the machine does hits all of them alike.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from contenders.compare import compare
from contenders.contender import ContenderFailed
from contenders.report import OURS, as_json, loop_table, overhead_line
from contenders.workload import SIZES, Workload, write_inputs


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="One GRPO step of this project, TRL and a plain PyTorch loop.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="parameters of the model")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="threads of each contender")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every response")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each contender, at least 2")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--trl-python", help="interpreter with trl 1.16.0")
    parser.add_argument("--without-trl", action="store_true", help="leave TRL out")
    found = parser.parse_args()
    if min(found.threads) < 1 or found.new_tokens < 1 or found.rounds < 2 or found.warmup < 0:
        parser.error("expected --threads and --new-tokens of at least 1, --rounds of at least 2, --warmup of 0 or more")
    if found.without_trl == bool(found.trl_python):
        parser.error("give either --trl-python or --without-trl")
    if found.trl_python and shutil.which(found.trl_python) is None:
        parser.error(f"--trl-python {found.trl_python} cannot be run. `make bench-step` sets one up.")
    if found.json and not found.json.resolve().parent.is_dir():
        parser.error(f"--json {found.json}: its folder does not exist")
    return found


def main() -> None:
    """Every size with every number of threads."""
    asked = arguments()
    contenders = {OURS: ("contenders.ours", sys.executable)}
    if asked.trl_python:
        contenders["TRL"] = ("contenders.trl_step", asked.trl_python)
    contenders["reference"] = ("contenders.reference", sys.executable)
    learners = {"overhead": ("contenders.overhead", sys.executable)}
    results = []
    print(f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}; ± half the middle half\n")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), size, asked.seed)
            for threads in asked.threads:
                work = Workload(folder=folder, threads=threads, new_tokens=asked.new_tokens, seed=asked.seed)
                try:
                    loops = compare(size, work, contenders, warmup=asked.warmup, rounds=asked.rounds)
                    print(loop_table(loops), flush=True)
                    updates = compare(size, work, learners, warmup=asked.warmup, rounds=asked.rounds)
                except ContenderFailed as error:
                    sys.exit(str(error))
                print(overhead_line(updates) + "\n", flush=True)
                results += [as_json(loops), as_json(updates)]
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
