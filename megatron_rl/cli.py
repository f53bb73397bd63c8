"""What the commands that train share: their arguments, and how they fail."""

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
    """A command under way."""

    is_main: bool
    status: int = 0


def parse_arguments(arguments: Sequence[str] | None, program: str, description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; may name a base: file")
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and print the configuration, then stop")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the run folder's latest checkpoint; never: refuse a used folder; PATH: from there",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optimizer.lr=1e-6")
    return parser.parse_intermixed_args(arguments)


@contextmanager
def reported() -> Iterator[Command]:
    """The body as a command: what goes wrong is printed as one line, and is its status."""
    command = Command(is_main=os.environ.get("RANK", "0") == "0")
    try:
        yield command
    except MegatronRLError as error:
        # what another rank found is printed there only once: by the first rank, which raises it too
        if command.is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        command.status = 1


def run_logged(command: Sequence[str], log: Path, *, cwd: Path | None = None, programs: Path | None = None) -> None:
    """Run a command; end this process with where to look if it fails.

    Args:
        log: gets all that the command prints, after what is there.
        programs: folder that is searched for programs first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"] if programs is None else f"{programs}{os.pathsep}{os.environ['PATH']}"
    with log.open("a") as output:
        status = subprocess.run(
            command, cwd=cwd, env=os.environ | {"PATH": path}, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if status:
        sys.exit(f"{' '.join(command)} ended with {status}; see {log}")
