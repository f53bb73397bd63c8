"""Commands whose output goes to a file."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_logged(command: Sequence[str], log: Path, *, cwd: Path = ROOT, programs: Path | None = None) -> None:
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
