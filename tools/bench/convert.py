"""Time checkpoint conversion against ``cp``: python tools/bench/convert.py [--models NAME …] [--rounds N].

Uses random bf16 weights of real models' shapes. Each round copies the Hugging Face folder with ``cp``, converts it to
Megatron, and converts that back, flushing the bytes to the disk each time. The final Hugging Face folder is compared
with the original, bit for bit. Prints GB/s, the ratio to ``cp`` in the same round, and the converter's peak resident
memory.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders.report import Spread

TOOLS = Path(__file__).parents[1]
MODELS = ("qwen2.5-1.5b", "qwen2.5-7b")
COPY, TO_MEGATRON, TO_HF = "cp", "HF to Megatron", "Megatron to HF"


class BenchFailed(RuntimeError):
    """A command failed, or a conversion there and back changed a tensor."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Cost of one command."""

    seconds: float
    peak_rss_bytes: int


def measure(command: list[str]) -> Measured:
    """Run a command, including the time until its output is on the disk.

    Raises:
        BenchFailed: its exit status is not 0.
    """
    os.sync()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise BenchFailed(f"{' '.join(command)} ended with {process.returncode}:\n{output.read().decode()}")
    os.sync()
    return Measured(seconds=time.perf_counter() - start, peak_rss_bytes=usage.ru_maxrss * 1024)


def in_new_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a new process, because a child's peak memory starts at that of its parent.

    Raises:
        BenchFailed: the function failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise BenchFailed(f"{function.__name__} failed")


def touch_memory(num_bytes: int) -> None:
    """Allocate, write and release ``num_bytes`` of memory.

    The host of a virtual machine provides memory on first use, which can take longer than the measured command. After
    this, every command finds pages for its output.
    """
    kept = []
    for _ in range(0, num_bytes, 2**26):
        kept.append(bytearray(b"1" * 2**26))


def free_memory() -> int:
    """Bytes of memory that nothing uses, not even the page cache."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemFree"].split()[0]) * 1024


def write_model(folder: Path, name: str) -> None:
    """Write random weights of a model's shapes.

    Args:
        name: one of MODELS.
    """
    from random_checkpoint import QWEN25_1_5B, QWEN25_7B, write_random_checkpoint

    write_random_checkpoint(folder, dict(zip(MODELS, (QWEN25_1_5B, QWEN25_7B), strict=True))[name])


def check_same(first: Path, second: Path) -> None:
    """Check that two Hugging Face folders have the same tensors, bit for bit."""
    import torch

    from megatron_rl.weights.hf_files import HFReader

    one, two = HFReader(first), HFReader(second)
    assert set(one.names()) == set(two.names())
    for name in one.names():
        left, right = (reader.read(name, (slice(None),)) for reader in (one, two))
        assert left.dtype == right.dtype, name
        assert torch.equal(left.view(torch.int16), right.view(torch.int16)), name


def bench(name: str, folder: Path, *, rounds: int, workers: int | None) -> dict[str, list[Measured]]:
    """Measurements of every command over all rounds.

    Args:
        name: one of MODELS.
        folder: working folder.
        workers: threads of the converter; None: its default.
    """
    source, copy, megatron, back = (folder / part for part in ("hf", "copy", "megatron", "back"))
    in_new_process(write_model, source, name)
    options = [] if workers is None else ["--workers", str(workers)]

    def tool(script: str, source: Path, target: Path) -> list[str]:
        return [sys.executable, str(TOOLS / script), "--input", str(source), "--output", str(target), *options]

    commands = {
        COPY: ["cp", "-r", str(source), str(copy)],
        TO_MEGATRON: tool("convert_hf_to_megatron.py", source, megatron),
        TO_HF: tool("convert_megatron_to_hf.py", megatron, back),
    }
    size = sum(path.stat().st_size for path in source.iterdir())
    measured: dict[str, list[Measured]] = {what: [] for what in commands}
    for _ in range(rounds):
        for what, command in commands.items():
            in_new_process(touch_memory, min(size, free_memory() // 2))
            measured[what].append(measure(command))
            shutil.rmtree(copy, ignore_errors=True)
        in_new_process(check_same, source, back)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    return measured


def report(name: str, size: int, measured: dict[str, list[Measured]]) -> str:
    """Table of one model's measurements."""
    copied = [one.seconds for one in measured[COPY]]
    lines = [f"{name}, {size / 1e9:.2f} GB", f"{'':16}{'GB/s':>14}{'of cp':>16}{'peak memory':>14}"]
    for what, runs in measured.items():
        speed = _text([size / 1e9 / one.seconds for one in runs])
        ratio = _text([copy / one.seconds for copy, one in zip(copied, runs, strict=True)])
        peak = max(one.peak_rss_bytes for one in runs) / 1e9
        lines.append(f"{what:16}{speed:>14}{ratio:>16}{f'{peak:.2f} GB':>14}")
    return "\n".join(lines)


def _text(values: list[float]) -> str:
    return Spread.of(values).text(2) if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Time conversion against cp.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="shapes of the models (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each model (3)")
    parser.add_argument("--workers", type=int, help="threads of the converter (default: the converter's default)")
    parser.add_argument(
        "--folder", help="working folder, with room for four times the model (default: the temporary folder)"
    )
    parser.add_argument("--json", help="file for all measurements")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measured = bench(name, Path(folder), rounds=args.rounds, workers=args.workers)
            size = sum(path.stat().st_size for path in (Path(folder) / "hf").glob("*.safetensors"))
        print(report(name, size, measured), flush=True)
        results[name] = {"bytes": size, **{what: [asdict(one) for one in runs] for what, runs in measured.items()}}
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
