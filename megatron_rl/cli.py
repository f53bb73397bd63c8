"""Shared by the commands: argument parsing, error reporting, logged subprocesses."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import MegatronRLError


@dataclass
class Command:
    """State of a running command."""

    is_main: bool
    """Whether this is the first rank."""
    status: int = 0
    """Exit status of the process."""


def parse_arguments(arguments: Sequence[str] | None, program: str, description: str) -> argparse.Namespace:
    """Parse the command line of a training command.

    Args:
        arguments: command-line arguments; None: those of the process.
        program: name of the command, for the help text.
        description: description of the command, for the help text.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; may extend another by base:")
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve, check and print the configuration; no training"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the latest checkpoint in the run folder, if any; never: start anew, an error if the "
        "folder holds a run; PATH: from that checkpoint or run folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optimizer.lr=1e-6")
    return parser.parse_intermixed_args(arguments)


@contextmanager
def report_errors() -> Iterator[Command]:
    """Run the body as a command: print an error of this package in one line and set the exit status to 1."""
    command = Command(is_main=os.environ.get("RANK", "0") == "0")
    try:
        yield command
    except MegatronRLError as error:
        # all ranks raise the error, so that printing it on the first one suffices
        if command.is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        command.status = 1


def run_logged(command: Sequence[str], log: Path, *, cwd: Path | None = None, programs: Path | None = None) -> None:
    """Run a command with its output in a log file; exit with a pointer to the log if it fails.

    Args:
        command: program and arguments.
        log: file to which stdout and stderr are appended.
        cwd: working directory; None: the current one.
        programs: folder that is put first in PATH; None: PATH is unchanged.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"] if programs is None else f"{programs}{os.pathsep}{os.environ['PATH']}"
    with log.open("a") as output:
        status = subprocess.run(
            command, cwd=cwd, env=os.environ | {"PATH": path}, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if status:
        sys.exit(f"{' '.join(command)} exited with status {status}; see {log}")
