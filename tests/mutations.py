"""Plant the faults of faults.yaml, a line each, and report which of them the tests catch.

Usage: python -m tests.mutations [--only TEXT] [--output FILE]. Each fault is planted in a copy of the tree. The tests
that should catch it run first; if they pass, the other tests of make test run, and after them the cases that only
make test-all has. A fault is caught by the first test that fails.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FEW = ["-m", "not exhaustive"]


@dataclass(frozen=True)
class Fault:
    """One changed line, or part of a line."""

    name: str
    file: str
    """Below megatron_rl."""
    old: str
    """Occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """Files below tests that should catch it."""


@dataclass(frozen=True)
class Outcome:
    """Which tests caught a fault; None: none did, or they were not needed."""

    test: str | None
    test_all: str | None
    seconds: float


def main() -> int:
    """Run the command; the exit status is 1 if a fault was not caught by make test."""
    parser = argparse.ArgumentParser(
        description="Plant the faults of faults.yaml and report which of them the tests catch."
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose name contains this text")
    parser.add_argument("--workers", type=int, default=2, help="faults that are tested at the same time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    given = yaml.safe_load((ROOT / "tests/faults.yaml").read_text())
    faults = [Fault(**{**one, "tests": tuple(one["tests"])}) for one in given if args.only in one["name"]]
    for fault in faults:
        count = (ROOT / "megatron_rl" / fault.file).read_text().count(fault.old)
        assert count == 1, f"{fault.name}: {fault.old!r} occurs {count} times in {fault.file}"
    with ThreadPoolExecutor(args.workers) as pool:
        rows = [row(fault, outcome) for fault, outcome in zip(faults, pool.map(plant, faults), strict=True)]
    table = "| fault | in | caught by make test | by make test-all | seconds |\n|---|---|---|---|---|\n" + "".join(rows)
    print(table)
    if args.output:
        args.output.write_text(table)
    return int("| no |" in table)


def plant(fault: Fault) -> Outcome:
    """Plant a fault in a copy of the tree and run the tests until one fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "wandb", "build", "*.egg-info"))
        shutil.copy(ROOT / ".gitignore", tree)
        path = tree / "megatron_rl" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
        likely = [f"tests/{name}" for name in fault.tests]
        ignored = [word for name in (*likely, "tests/slurm") for word in ("--ignore", name)]
        unit, others = ["tests/unit", *ignored], ["tests", "--ignore", "tests/unit", *ignored]
        caught = next(filter(None, (first_failure(tree, [*FEW, *files]) for files in (likely, unit, others))), None)
        rest = (["-m", "exhaustive", *files] for files in (likely, unit, others))
        caught_by_all = caught or next(filter(None, (first_failure(tree, files) for files in rest)), None)
        print(f"{fault.name}: {caught_by_all or 'not caught'}", file=sys.stderr, flush=True)
        return Outcome(caught, caught_by_all, time.monotonic() - start)


def first_failure(tree: Path, arguments: Sequence[str]) -> str | None:
    """Return the first test that fails in a tree; None if all pass.

    Raises:
        RuntimeError: pytest could not run the tests.
    """
    command = [sys.executable, "-m", "pytest", "--exitfirst", "--quiet", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (1, 2) or failed is None:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return failed[1]


def row(fault: Fault, outcome: Outcome) -> str:
    """Return the row of a fault."""
    caught = [one.replace("tests/", "") if one else "no" for one in (outcome.test, outcome.test_all)]
    by_all = "the same" if outcome.test else caught[1]
    return f"| {fault.name} | {fault.file} | {caught[0]} | {by_all} | {outcome.seconds:.0f} |\n"


if __name__ == "__main__":
    sys.exit(main())
