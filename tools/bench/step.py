"""Time one GRPO step of this project, of TRL and of a plain PyTorch loop, on the same model and the same work.

make bench-step                                                   # installs TRL in its own environment; all sizes
python tools/bench/step.py --without-trl --sizes 1m --rounds 20   # without TRL

The contenders take turns, one step each, so that other load on the machine affects all of them equally.
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


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description="Time one GRPO step of this project, TRL and a plain PyTorch loop.")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of the model, in parameters (all)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="threads of each contender (1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every response (16)")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each contender, at least 2 (10)")
    parser.add_argument("--warmup", type=int, default=3, help="unmeasured steps before them (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, prompts and sampling (0)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--trl-python", help="Python interpreter with trl 1.16.0")
    parser.add_argument("--without-trl", action="store_true", help="leave TRL out")
    args = parser.parse_args()
    if min(args.threads) < 1 or args.new_tokens < 1 or args.rounds < 2 or args.warmup < 0:
        parser.error("expected --threads and --new-tokens of at least 1, --rounds of at least 2, --warmup of 0 or more")
    if args.without_trl == bool(args.trl_python):
        parser.error("give either --trl-python or --without-trl")
    if args.trl_python and shutil.which(args.trl_python) is None:
        parser.error(f"--trl-python {args.trl_python} cannot be run. `make bench-step` installs one.")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: the folder does not exist")
    return args


def main() -> None:
    """Compare all contenders for every size and number of threads."""
    args = parse_arguments()
    contenders = {OURS: ("contenders.ours", sys.executable)}
    if args.trl_python:
        contenders["TRL"] = ("contenders.trl_step", args.trl_python)
    contenders["reference"] = ("contenders.reference", sys.executable)
    learners = {"overhead": ("contenders.overhead", sys.executable)}
    results = []
    print(f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}; ± is half the IQR\n")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), size, args.seed)
            for threads in args.threads:
                work = Workload(folder=folder, threads=threads, new_tokens=args.new_tokens, seed=args.seed)
                try:
                    loops = compare(size, work, contenders, warmup=args.warmup, rounds=args.rounds)
                    print(loop_table(loops), flush=True)
                    updates = compare(size, work, learners, warmup=args.warmup, rounds=args.rounds)
                except ContenderFailed as error:
                    sys.exit(str(error))
                print(overhead_line(updates) + "\n", flush=True)
                results += [as_json(loops), as_json(updates)]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
