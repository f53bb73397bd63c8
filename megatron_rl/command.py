"""What the commands that train share: their arguments, and how they fail."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
