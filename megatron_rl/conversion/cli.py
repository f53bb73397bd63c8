"""The shared parts of the command lines of the conversion tools."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rl.conversion.ranks import Ranks, joined_ranks
from megatron_rl.conversion.work import default_workers
from megatron_rl.errors import MegatronRLError

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def common_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of both directions of conversion."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--input", required=True, help="folder to read; it is not modified")
    parser.add_argument("--output", required=True, help="folder to write; must be absent or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="dtype of the output (default: dtype of the input)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="threads per process")
    parser.add_argument(
        "--verify", action="store_true", help="read input and output again and compare them bit for bit"
    )
    return parser


def parse_bytes(text: str) -> int:
    """Parse a size such as ``5GB`` or ``500MiB``; returns bytes.

    Raises:
        argparse.ArgumentTypeError: the text is not such a size.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if matched is None or float(matched[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size, expected one such as 5GB or 500MiB")
    return int(float(matched[1]) * _UNITS[matched[2].upper()])


def run(work: Callable[[Ranks], None], target: Path) -> int:
    """Run a conversion on every rank, print size and speed or the error, and return the exit status."""
    with joined_ranks() as ranks:
        start = time.monotonic()
        try:
            work(ranks)
        except MegatronRLError as error:
            if ranks.is_main:
                print(f"error: {error}", file=sys.stderr)
            return 1
        if ranks.is_main:
            seconds = time.monotonic() - start
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            print(f"{target}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")
    return 0
